"""Two DiTs that share the way from noise to data: one for high noise, one for low."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from kinema.models.attention import Attention
from kinema.models.dit.axes import Expert
from kinema.models.dit.compiled import Compiler
from kinema.models.dit.config import DiTConfig
from kinema.models.dit.extras import Extras
from kinema.models.dit.model import NO_EXTRAS, DiT
from kinema.models.dit.segments import Grid
from kinema.models.dit.sublayers import Block
from kinema.models.dit.timesteps import Timesteps
from kinema.models.sequence import SequenceGroup


class Experts(nn.Module):
    """Clips from `expert_boundary` on go to the expert for high noise, the others to the one for low.

    Balaji et al. 2022 (eDiff-I), section 4; Wan 2.2. With `expert=high` or `low` only that one has gradients: a step in
    which one of two trained experts got no clip would leave its ranks without a part of the sum that ZeRO waits for.
    """

    def __init__(self, config: DiTConfig, latent_channels: int, text_width: int) -> None:
        super().__init__()
        self.config = config
        self.latent_channels, self.text_width = latent_channels, text_width
        alone = replace(config, expert_boundary=0.0, expert=Expert.both)
        self.high, self.low = (DiT(alone, latent_channels, text_width) for _ in range(2))
        self.high.requires_grad_(config.expert is not Expert.low)
        self.low.requires_grad_(config.expert is not Expert.high)

    def forward(
        self, latents: Sequence[Tensor], timesteps: Timesteps, text: Sequence[Tensor], extras: Extras = NO_EXTRAS
    ) -> list[Tensor]:
        """As `DiT.forward`. Of a clip with a timestep for each frame, the noisiest frame decides."""
        is_high = [bool(times.max() >= self.config.expert_boundary) for times in timesteps]
        predictions = dict[int, Tensor]()
        for expert, wanted in ((self.high, True), (self.low, False)):
            clips = [clip for clip, high in enumerate(is_high) if high is wanted]
            if not clips:
                continue
            times = timesteps[clips] if isinstance(timesteps, Tensor) else [timesteps[clip] for clip in clips]
            found = expert([latents[i] for i in clips], times, [text[i] for i in clips], extras.take(clips))
            predictions |= dict(zip(clips, found, strict=True))
        return [predictions[clip] for clip in range(len(latents))]

    def all_blocks(self) -> list[Block]:
        """As `DiT.all_blocks`, of both."""
        return [*self.high.all_blocks(), *self.low.all_blocks()]

    def replace_attention(self, replace: Callable[[Attention], Attention]) -> None:
        """As `DiT.replace_attention`, in both."""
        self.high.replace_attention(replace)
        self.low.replace_attention(replace)

    def compile_blocks(self, compiler: Compiler) -> None:
        """As `DiT.compile_blocks`, in both."""
        self.high.compile_blocks(compiler)
        self.low.compile_blocks(compiler)

    def share_tokens(self, group: SequenceGroup) -> None:
        """As `DiT.share_tokens`, both."""
        self.high.share_tokens(group)
        self.low.share_tokens(group)

    def flops(self, grid: Grid, text_tokens: int, image_tokens: int = 0) -> float:
        """As `DiT.flops`: of the one expert that a clip goes to."""
        return self.high.flops(grid, text_tokens, image_tokens)


def make_denoiser(config: DiTConfig, latent_channels: int, text_width: int) -> DiT | Experts:
    """The model of a config: one DiT, or two with `expert_boundary`."""
    kind = Experts if config.expert_boundary else DiT
    return kind(config, latent_channels, text_width)


def join_experts(high: dict[str, Tensor], low: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of two DiTs -> those of `Experts`."""
    return {f"{name}.{key}": x for name, part in (("high", high), ("low", low)) for key, x in part.items()}


def split_experts(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inverse."""
    return _part(tensors, "high."), _part(tensors, "low.")


def name_in_expert(name: str) -> str:
    """A name of a tensor or layer of `Experts` as its expert has it; names of one DiT stay as they are."""
    return name.removeprefix("high.").removeprefix("low.")


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}

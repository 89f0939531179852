"""Models of every preset, and a pack for each whose tokens, words and heads no number of ranks divides."""

from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from kinema.models.dit import (
    AttentionPattern,
    CrossNorm,
    DiTConfig,
    Extras,
    Rope,
    Sound,
    StreamConfig,
    TextEdge,
    make_denoiser,
)

PRESETS = Path(__file__).parents[2] / "configs" / "model"
GRIDS = [(3, 2, 3), (1, 1, 3), (2, 3, 2)]
"""33 tokens, not in the order of their size."""
WORDS = [5, 1, 5]
CHANNELS, TEXT = 3, 48
SIZE = {"width": 24, "depth": 2, "num_heads": 3, "rope_axes": [4, 2, 2], "rope_theta": 20.0, "mlp_ratio": 2.0}


def preset(name: str) -> DiTConfig:
    values = OmegaConf.load(PRESETS / f"{name}.yaml")
    values.pop("defaults")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DiTConfig), values))
    assert isinstance(config, DiTConfig)
    return config


def configs() -> dict[str, DiTConfig]:
    """Every tiny preset, and choices that none of them makes."""
    found = {path.stem: preset(path.stem) for path in sorted(PRESETS.glob("*_tiny.yaml"))}
    wan, ltx2, hunyuan = (found[f"{name}_tiny"] for name in ("wan", "ltx2", "hunyuan"))
    joint = {"text": TextEdge.joint, "attention": AttentionPattern.factorised}
    window = {"attention": AttentionPattern.windowed, "window": [2, 2, 2]}
    return found | {
        "wan with an image and control": replace(
            wan, image_width=7, condition_channels=2, control_channels=2, control_layers=[1]
        ),
        "ltx 2.3": replace(
            ltx2, modulated_captions=True, head_gates=True, audio=replace(ltx2.audio or StreamConfig(), crossed=True)
        ),
        "the first frame given": replace(hunyuan, first_frame_given=True, guidance=True),
        "minimax with sound": replace(found["minimax_tiny"], audio_channels=5),
        "windows": DiTConfig(**SIZE, **window, cross_norm=CrossNorm.affine),
        "factorised, and joint": DiTConfig(**SIZE, **joint),
        "two heads": DiTConfig(**SIZE | {"num_heads": 2, "rope_axes": [4, 4, 4]}, text=TextEdge.shared),
    }


def model(config: DiTConfig) -> nn.Module:
    """Random in every parameter: zero gates would hide all that lies behind them."""
    torch.manual_seed(0)
    made = make_denoiser(config, CHANNELS, config.text_channels or TEXT).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


class Inputs:
    """Latents, timesteps, captions and whatever else a config demands, drawn from a seed."""

    def __init__(self, config: DiTConfig, seed: int = 0, dtype: torch.dtype = torch.float64, *, clips: int = 3) -> None:
        grids, words = (GRIDS, WORDS) if clips > 1 else ([(1, 1, 1)], [1])  # one clip is less than ranks can share
        self.clips = clips
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        patch = config.patch_size
        self.shapes = [tuple(n * p for n, p in zip(grid, patch, strict=True)) for grid in grids]
        self.latents = [self.draw(CHANNELS, *shape) for shape in self.shapes]
        self.text = [self.draw(count, config.text_channels or TEXT) for count in words]
        self.timesteps = torch.tensor([0.3, 0.8, 0.55], dtype=dtype)[:clips]
        self.extras = Extras(
            channels=self.given(config.condition_channels),
            control=self.given(config.control_channels),
            image=[self.draw(n, config.image_width) for n in (2, 4, 3)[:clips]] if config.image_width else None,
            guidance=[6.0, 1.0, 3.0][:clips] if config.guidance else None,
            fps=[8.0, 12.0, 24.0][:clips] if config.rope is Rope.seconds else None,
            audio=self.sound(config),
        )

    def with_gradients(self) -> "Inputs":
        for x in (*self.latents, *self.text):
            x.requires_grad_()
        return self

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def given(self, channels: int) -> list[Tensor] | None:
        return [self.draw(channels, *shape) for shape in self.shapes] if channels else None

    def sound(self, config: DiTConfig) -> Sound | None:
        times = torch.tensor([0.2, 0.9, 0.4], dtype=self.dtype)[: self.clips]
        if config.audio_channels:
            return Sound([self.draw(config.audio_channels, n, 2) for n in (3, 1, 4)[: self.clips]], times)
        if config.audio is None:
            return None
        text = [self.draw(n, config.audio.text_width or TEXT) for n in (2, 3, 1)[: self.clips]]
        return Sound([self.draw(config.audio.channels, n) for n in (4, 1, 6)[: self.clips]], times, text)

    def outputs(self, module: nn.Module) -> list[Tensor]:
        """What the model says of every clip, and of its sound."""
        if not hasattr(module, "predict_streams"):
            return module(self.latents, self.timesteps, self.text, self.extras)
        found = module.predict_streams(self.latents, self.timesteps, self.text, self.extras)
        return [*found.video, *(found.audio or [])]

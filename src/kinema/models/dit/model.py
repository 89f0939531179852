"""The DiT: its parts, how they start, and the way of a pack through it."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.attention import Attention, Lengths
from kinema.models.dit.blocks import blocks, slots_of
from kinema.models.dit.conditioning import (
    Condition,
    ExactLinear,
    HeadTable,
    LinearModulation,
    PooledEmbedding,
    TimestepEmbedding,
    means,
    modulated,
)
from kinema.models.dit.config import (
    AttentionPattern,
    DiTConfig,
    HeadModulation,
    ModulationSource,
    NormKind,
    PositionEmbedding,
    Rope,
    TextEdge,
    TextEmbedding,
)
from kinema.models.dit.extras import Extras
from kinema.models.dit.layers import (
    Activate,
    Counts,
    JointAttention,
    Linear,
    SegmentAttention,
    SingleStream,
    Sublayer,
)
from kinema.models.dit.norms import Norm
from kinema.models.dit.patches import patchify, token_grid, unpatchify
from kinema.models.dit.refiner import TextRefiner
from kinema.models.dit.segments import Grid, Segments, Span, Tokens, clip_segment, video_segment
from kinema.models.position import fractional_rope, grid_positions, rope_3d, sincos_3d, sincos_quarters

Timesteps: TypeAlias = Tensor | Sequence[Tensor]
"""(B,), or for each clip one of every frame of tokens (T / patch_size[0],); in [0, 1]."""

NO_EXTRAS = Extras()
IMAGE_NORM_EPSILON = 1e-5


class DiT(nn.Module):
    """Diffusion transformer over packs: clips of any size in one call, each with its timestep and caption.

    Peebles and Xie 2023, with spacetime patches, positions in three axes, and the caption by cross-attention
    (PixArt-alpha, Chen et al. 2023) or in one softmax with the video (Esser et al. 2024); `DiTConfig` says which.
    Linear layers start from Xavier's uniform distribution with zero biases; everything that modulates, the last
    layer, and the way back of what has no gate start at zero. Hence every block of a new model is the identity, and
    its prediction is exactly zero.
    """

    def __init__(self, config: DiTConfig, latent_channels: int, text_width: int) -> None:
        super().__init__()
        self.config = config
        self.latent_channels, self.text_width = latent_channels, text_width
        width = config.width
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]

        self.patch_embedding = Linear((latent_channels + config.condition_channels) * patch, width)
        self.text_embedding = _text_embedding(config, text_width)
        places = (config.image_positions, config.image_width)
        self.image_positions = nn.Parameter(torch.zeros(places)) if config.image_positions else None
        self.image_embedding = _image_embedding(config) if config.image_width else None
        self.timestep_embedding = TimestepEmbedding(config.timestep_channels, config.condition_width)
        self.pooled_text = ExactLinear(text_width, config.condition_width) if config.pooled_text else None
        self.pooled_embedding = (
            PooledEmbedding(config.pooled_width, config.condition_width) if config.pooled_width else None
        )
        self.guidance_embedding = (
            TimestepEmbedding(config.timestep_channels, config.condition_width) if config.guidance else None
        )

        made = blocks(config)
        table = config.modulation is ModulationSource.table
        self.shared_modulation = ExactLinear(config.condition_width, slots_of(made[0]) * width) if table else None
        self.blocks = nn.ModuleList(made)

        def norm() -> Norm:
            return Norm(NormKind.layer, width, config.norm_eps, affine=config.norm_affine)

        self.final_norm = norm() if config.final_norm else None
        self.head_norm = norm()
        linear = config.head_modulation is HeadModulation.linear
        self.head_modulation = ExactLinear(config.condition_width, 2 * width) if linear else HeadTable(width)
        self.head = Linear(width, latent_channels * patch)
        self._initialise()

    def forward(
        self, latents: Sequence[Tensor], timesteps: Timesteps, text: Sequence[Tensor], extras: Extras = NO_EXTRAS
    ) -> list[Tensor]:
        """latents (C, T, H, W) each, timesteps (B,) in [0, 1], text (L, text_width) each -> like latents.

        Clips and captions may all differ in size. Equal shapes side by side are fastest, so clips are sorted
        by shape on the way in and put back on the way out. Instead of (B,), timesteps may be one tensor for each
        clip with a timestep for every frame of tokens: a given frame has 0 where the others have noise.
        """
        self._check(latents, timesteps, text)
        self._check_extras(latents, extras)
        order = sorted(range(len(latents)), key=lambda clip: tuple(latents[clip].shape))
        if order == list(range(len(latents))):
            return self._forward_sorted(latents, timesteps, text, extras)
        times = timesteps[order] if isinstance(timesteps, Tensor) else [timesteps[clip] for clip in order]
        predictions = self._forward_sorted(
            [latents[clip] for clip in order], times, [text[clip] for clip in order], extras.take(order)
        )
        place = {clip: index for index, clip in enumerate(order)}
        return [predictions[place[clip]] for clip in range(len(latents))]

    def _forward_sorted(
        self, latents: Sequence[Tensor], timesteps: Timesteps, text: Sequence[Tensor], extras: Extras
    ) -> list[Tensor]:
        grids = [token_grid(clip.shape, self.config.patch_size) for clip in latents]
        words = torch.cat(list(text))
        lengths = tuple(len(caption) for caption in text)
        condition = self._condition(timesteps, words, lengths, extras)
        segments = self._segments(grids, text, extras, condition)

        given = (
            latents if extras.channels is None else [torch.cat(x) for x in zip(latents, extras.channels, strict=True)]
        )
        video = self.patch_embedding(patchify(given, self.config.patch_size)).to(condition.embedding.dtype)
        if self.config.position_embedding is not PositionEmbedding.none:
            video = video + self._places(grids, video)
        tokens: Tokens = {"video": video, "text": self._captions(words, lengths, timesteps)}
        if self.image_embedding is not None and extras.image is not None:
            tokens["image"] = self.image_embedding(torch.cat([self._placed(image) for image in extras.image]))
        for each in self.blocks:
            tokens = each(tokens, segments, condition)

        if self.final_norm is not None:
            tokens["video"] = self.final_norm(tokens["video"])
        patches = self._head(tokens["video"], segments["video"].rows, condition)
        return unpatchify(patches.to(latents[0].dtype), grids, self.config.patch_size)

    def _head(self, video: Tensor, rows: Lengths, condition: Condition) -> Tensor:
        linear = self.config.head_modulation is HeadModulation.linear
        both = self.head_modulation(condition.embedding if linear else condition)
        shift, scale = both.chunk(2, dim=-1)
        return self.head(modulated(self.head_norm(video), shift, scale, rows))

    def _placed(self, image: Tensor) -> Tensor:
        return image if self.image_positions is None else image + self.image_positions

    def _captions(self, words: Tensor, lengths: Lengths, timesteps: Timesteps) -> Tensor:
        if not isinstance(self.text_embedding, TextRefiner):
            embedded = self.text_embedding(words)
            if self.config.text is TextEdge.cross:
                return embedded
            return embedded.to(torch.promote_types(embedded.dtype, torch.float32))  # a residual stream, like the video
        assert isinstance(timesteps, Tensor)
        return self.text_embedding(words, lengths, timesteps)

    def _condition(self, timesteps: Timesteps, words: Tensor, lengths: Lengths, extras: Extras) -> Condition:
        rows = timesteps if isinstance(timesteps, Tensor) else torch.cat(list(timesteps))
        embedding = self.timestep_embedding(rows)
        clips = []  # what is the same for all frames of a clip
        if self.pooled_text is not None:
            clips.append(self.pooled_text(means(words.to(embedding.dtype), lengths)))
        if self.pooled_embedding is not None and extras.pooled is not None:
            clips.append(self.pooled_embedding(torch.stack(list(extras.pooled))))
        if self.guidance_embedding is not None and extras.guidance is not None:
            clips.append(self.guidance_embedding(rows.new_tensor(list(extras.guidance))))
        for clip in clips:
            embedding = embedding + (clip if isinstance(timesteps, Tensor) else _for_frames(clip, timesteps))
        active = F.silu(embedding)
        shared = None if self.shared_modulation is None else self.shared_modulation(active)
        return Condition(embedding, active, shared)

    def _segments(
        self, grids: Sequence[Grid], text: Sequence[Tensor], extras: Extras, condition: Condition
    ) -> Segments:
        """Angles (dtype and device of the condition), cuts and orders, made once; blocks only read them."""
        like = condition.embedding
        spans = {*self.config.spans, Span.clip}
        segments = {
            "video": video_segment(grids, _rows(grids, len(like)), self._rope(grids, like), spans, like.device),
            "text": clip_segment(tuple(len(caption) for caption in text)),
        }
        if extras.image is not None:
            segments["image"] = clip_segment(tuple(len(image) for image in extras.image))
        return segments

    def _rope(self, grids: Sequence[Grid], like: Tensor) -> tuple[Tensor, Tensor] | None:
        """The rotary table of every token."""
        if self.config.rope is Rope.none:
            return None
        tables = []
        for positions, clips in _runs(grids, like.device):
            table = self._angles(positions, like.dtype)
            tables.append([part.repeat(clips, *[1] * (part.ndim - 1)) for part in table])
        cos, sin = (torch.cat(parts) for parts in zip(*tables, strict=True))
        return cos, sin

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        config = self.config
        if config.rope is Rope.axes:
            return rope_3d(positions, config.head_dim, config.rope_axes, config.rope_theta, dtype)
        units, patch, extent = (
            positions.new_tensor(x) for x in (config.rope_units, config.patch_size, config.rope_extent)
        )
        fractions = positions * units * patch / extent
        return fractional_rope(fractions, config.width, config.num_heads, config.rope_theta, dtype)

    def _places(self, grids: Sequence[Grid], like: Tensor) -> Tensor:
        """The sine and cosine embedding of every token, (N, width)."""
        config = self.config
        waves = sincos_3d if config.position_embedding is PositionEmbedding.sincos else sincos_quarters
        scale = torch.tensor(config.position_scale, device=like.device)
        parts = [
            waves(positions / scale, config.width, config.rope_theta, like.dtype).repeat(clips, 1)
            for positions, clips in _runs(grids, like.device)
        ]
        return torch.cat(parts)

    def _check(self, latents: Sequence[Tensor], timesteps: Timesteps, text: Sequence[Tensor]) -> None:
        if not len(latents) == len(timesteps) == len(text) > 0:
            raise ValueError(
                f"the model got {len(latents)} clips, {len(timesteps)} timesteps, {len(text)} captions: it "
                "needs one timestep and one caption for each clip, and at least one clip."
            )
        for clip in latents:
            if clip.ndim != 4 or clip.shape[0] != self.latent_channels:
                raise ValueError(
                    f"a clip of latents has shape {tuple(clip.shape)} where the model was built for "
                    f"(C={self.latent_channels}, T, H, W)."
                )
        for times in [timesteps] if isinstance(timesteps, Tensor) else timesteps:
            if times.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"timesteps have dtype {times.dtype}: keep them float32, half precision merges some.")
        if not isinstance(timesteps, Tensor):
            if self.config.text is not TextEdge.cross or self.config.text_embedding is TextEmbedding.refiner:
                raise ValueError(
                    f"a timestep for each frame leaves captions without one, which model.text={self.config.text.name} "
                    f"with model.text_embedding={self.config.text_embedding.name} needs. Give one timestep a clip."
                )
            for clip, times in zip(latents, timesteps, strict=True):
                frames = clip.shape[1] // self.config.patch_size[0]
                if times.shape != (frames,):
                    raise ValueError(
                        f"timesteps of shape {tuple(times.shape)} for a clip of {clip.shape[1]} latent frames: each "
                        f"frame of tokens needs one, ({frames},) with model.patch_size={self.config.patch_size}."
                    )
        for caption in text:
            if caption.ndim != 2 or caption.shape[1] != self.text_width or len(caption) == 0:
                raise ValueError(
                    f"text embeddings have shape {tuple(caption.shape)}, the model was built for "
                    f"(L >= 1, {self.text_width}). An empty caption is the encoder's null text, never empty."
                )

    def _check_extras(self, latents: Sequence[Tensor], extras: Extras) -> None:
        for key, name in EXTRAS.items():
            built, given = getattr(self.config, key), getattr(extras, name)
            if bool(built) != (given is not None):
                raise ValueError(
                    f"model.{key}={built} but extras.{name} is {'missing' if built else 'given'}: a model reads "
                    "exactly the conditions that it was built for."
                )
            if given is not None and len(given) != len(latents):
                raise ValueError(f"extras.{name} has {len(given)} entries for {len(latents)} clips.")
        for clip, channels in zip(latents, extras.channels or [], strict=extras.channels is not None):
            expected = (self.config.condition_channels, *clip.shape[1:])
            if channels.shape != expected:
                raise ValueError(f"extras.channels has shape {tuple(channels.shape)} for a clip that needs {expected}.")
        for image in extras.image or []:
            if self.config.image_positions not in (0, len(image)):
                raise ValueError(
                    f"extras.image has {len(image)} tokens, the model has places for exactly model.image_positions="
                    f"{self.config.image_positions}."
                )
            if image.ndim != 2 or image.shape[1] != self.config.image_width or len(image) == 0:
                raise ValueError(
                    f"extras.image has shape {tuple(image.shape)} where the model was built for "
                    f"(L >= 1, {self.config.image_width})."
                )

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        zero: list[nn.Linear] = [self.head]
        zero += [linear for linear in (self.shared_modulation, self.head_modulation) if isinstance(linear, nn.Linear)]
        zero += [module.linear for module in self.modules() if isinstance(module, LinearModulation)]
        # Without a gate the last layer of the operation is what makes a new block the identity.
        zero += [m.operation.project for m in self.modules() if isinstance(m, Sublayer) and m.slots == 0]
        for linear in zero:
            nn.init.zeros_(linear.weight)

    def replace_attention(self, replace: Callable[[Attention], Attention]) -> None:
        """Put `replace(present)` behind the door of every attention; sequence parallelism wraps it so."""
        for module in self.modules():
            if isinstance(module, SegmentAttention | JointAttention | SingleStream):
                module.attention = replace(module.attention)

    def flops(self, tokens: int, text_tokens: int, frames: int | None = None, image_tokens: int = 0) -> float:
        """Floating-point operations of the forward pass on one clip; a multiply and an add are two.

        Matrix products only; backward takes twice as many. Factorised attention needs `frames` of tokens too.
        """
        if self.config.attention is AttentionPattern.full:
            seen = {Span.clip: tokens}
        elif frames is None:
            raise ValueError("model.attention=factorised: flops needs frames, the number of token frames.")
        else:
            seen = {Span.frame: tokens // frames, Span.place: frames}
        counts = Counts({"video": tokens, "text": text_tokens, "image": image_tokens}, seen)
        products = sum(module.products(counts) for module in self.modules() if isinstance(module, Sublayer))
        for name, module in self.named_modules():  # layers outside the blocks see each token, or each clip, once
            if isinstance(module, nn.Linear) and ".operation." not in name:
                part = name.split(".")[0]
                kind = None if isinstance(module, ExactLinear) else EDGES.get(part)
                products += module.weight.numel() * (counts.tokens[kind] if kind else 1)
        return 2.0 * products


EDGES = {"patch_embedding": "video", "head": "video", "text_embedding": "text", "image_embedding": "image"}
"""Parts outside the blocks that see every token of a segment; the others see one row a clip."""

EXTRAS = {"condition_channels": "channels", "image_width": "image", "pooled_width": "pooled", "guidance": "guidance"}
"""Key of the config -> what it makes the model demand."""


def _text_embedding(config: DiTConfig, text_width: int) -> nn.Module:
    """Captions to the model's width."""
    if config.text_embedding is TextEmbedding.refiner:
        return TextRefiner(config, text_width)
    first = Linear(text_width, config.width)
    if config.text_embedding is TextEmbedding.linear:
        return first
    return nn.Sequential(first, Activate(config.text_activation), Linear(config.width, config.width))


def _image_embedding(config: DiTConfig) -> nn.Sequential:
    """Image tokens to the model's width: norm, an MLP of the image's own width, norm."""
    given, width = config.image_width, config.width
    norms = (Norm(NormKind.layer, channels, IMAGE_NORM_EPSILON, affine=True) for channels in (given, width))
    return nn.Sequential(next(norms), Linear(given, given), nn.GELU(), Linear(given, width), next(norms))


def _runs(grids: Sequence[Grid], device: torch.device) -> Iterator[tuple[Tensor, int]]:
    """Token positions (n, 3) of each run of equal grids, and how many clips it has."""
    for grid, group in groupby(grids):
        yield grid_positions(*grid, device=device), len(list(group))


def _rows(grids: Sequence[Grid], rows: int) -> Lengths:
    """Tokens of each row of the condition: whole clips, or their frames where there are as many rows as frames."""
    if rows == len(grids):
        return tuple(t * h * w for t, h, w in grids)
    return tuple(h * w for t, h, w in grids for _ in range(t))


def _for_frames(clips: Tensor, timesteps: Sequence[Tensor]) -> Tensor:
    """One row a clip -> one row for each of its frames."""
    frames = torch.tensor([len(times) for times in timesteps], device=clips.device)
    return clips.repeat_interleave(frames, dim=0)

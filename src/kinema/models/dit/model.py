"""The DiT: its configuration, how the bricks are put together, and the way of a pack through it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.attention import Attention, AttentionKernel, Lengths, attention_of
from kinema.models.dit.conditioning import (
    TIMESTEP_CHANNELS,
    Condition,
    ExactLinear,
    LinearModulation,
    TableModulation,
    TimestepEmbedding,
    modulated_norm,
)
from kinema.models.dit.layers import SLOTS, Activation, Block, FeedForward, Linear, SegmentAttention, Sublayer
from kinema.models.dit.patches import patchify, token_grid, unpatchify
from kinema.models.dit.segments import Grid, Segments, Span, Tokens, text_segment, video_segment
from kinema.models.position import check_rope_axes, grid_positions, rope_3d, sincos_3d


class AttentionPattern(Enum):
    """Which tokens of a clip see each other in self-attention."""

    full = "full"
    """Every token sees every other: one attention over the clip."""
    factorised = "factorised"
    """First within each frame, then over time at each place: cheaper for long clips."""


class PositionEmbedding(Enum):
    """What a token is told of its place beside the rotary embedding, which only shows distances."""

    none = "none"
    sincos = "sincos"
    """Sines and cosines added to it (Vaswani et al. 2017): it knows the frame's edges. Small models learn
    the faster for it.
    """


class ModulationSource(Enum):
    """Where the shift, scale and gate of a block come from."""

    table = "table"
    """One linear layer for all blocks and a learned table in each (adaLN-single)."""
    linear = "linear"
    """A linear layer in each block (adaLN-Zero): about a third more weights, hardly more time."""


@dataclass
class DiTConfig:
    """Size and shape of the diffusion transformer."""

    width: int = 192
    """Channels of a token."""
    depth: int = 6
    """Number of blocks."""
    num_heads: int = 6
    """Attention heads; each is width / num_heads channels wide."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over width."""
    patch_size: list[int] = field(default_factory=lambda: [1, 2, 2])
    """Latent frames, rows and columns that one token holds."""
    attention: AttentionPattern = AttentionPattern.full
    attention_kernel: AttentionKernel = AttentionKernel.sdpa
    activation: Activation = Activation.gelu
    modulation: ModulationSource = ModulationSource.table
    qk_norm: bool = True
    """RMS-normalise queries and keys per head: stable in bfloat16 and at high learning rates."""
    rope_axes: list[int] = field(default_factory=lambda: [12, 10, 10])
    """Channels of a head that turn with time, height and width; even, and their sum is the head width."""
    rope_theta: float = 10000.0
    """Base of the wavelengths of both position embeddings: they lie between 2 pi and 2 pi * theta tokens."""
    position_embedding: PositionEmbedding = PositionEmbedding.none
    pooled_text: bool = False
    """Add the mean of the text embeddings to the timestep's: the caption also modulates every block."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        for name in ("width", "depth", "num_heads", "mlp_ratio", "rope_theta"):
            if getattr(self, name) <= 0:
                raise ValueError(f"model.{name}={getattr(self, name)} must be above zero.")
        if self.width % (2 * self.num_heads):
            usable = [heads for heads in range(1, self.width + 1) if self.width % (2 * heads) == 0]
            raise ValueError(
                f"model.num_heads={self.num_heads} must divide model.width={self.width} into heads of an "
                f"even width: rotary positions turn channel pairs. Usable: {usable or 'an even width'}."
            )
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(
                f"model.patch_size={self.patch_size} must be three numbers from 1 up (frames, rows, columns)."
                " Type for example model.patch_size=[1,2,2]."
            )
        check_rope_axes(self.rope_axes, self.head_dim)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads

    @property
    def hidden_width(self) -> int:
        """Channels inside the MLP."""
        return round(self.width * self.mlp_ratio)

    @property
    def spans(self) -> list[Span]:
        """The self-attentions of a block, in order."""
        return [Span.clip] if self.attention is AttentionPattern.full else [Span.frame, Span.place]


class DiT(nn.Module):
    """Diffusion transformer over packs: clips of any size in one call, each with its timestep and caption.

    Peebles and Xie 2023, with spacetime patches, rotary positions in three axes, and the caption by
    cross-attention (PixArt-alpha, Chen et al. 2023). Linear layers start from Xavier's uniform distribution
    with zero biases; everything that modulates, and the last layer, starts at zero. Hence every block of a
    new model is the identity, and its prediction is exactly zero.
    """

    def __init__(self, config: DiTConfig, latent_channels: int, text_width: int) -> None:
        super().__init__()
        self.config = config
        self.latent_channels, self.text_width = latent_channels, text_width
        width = config.width
        patch_channels = latent_channels * config.patch_size[0] * config.patch_size[1] * config.patch_size[2]

        self.patch_embedding = Linear(patch_channels, width)
        self.text_embedding = nn.Sequential(Linear(text_width, width), nn.GELU(), Linear(width, width))
        self.timestep_embedding = TimestepEmbedding(width)
        self.pooled_text = ExactLinear(text_width, width) if config.pooled_text else None

        slots = SLOTS * (len(config.spans) + 2)
        table = config.modulation is ModulationSource.table
        self.shared_modulation = ExactLinear(width, slots * width) if table else None
        self.blocks = nn.ModuleList(_block(config, slots) for _ in range(config.depth))

        self.head_modulation = ExactLinear(width, 2 * width)
        self.head = Linear(width, patch_channels)
        self._initialise()

    def forward(self, latents: Sequence[Tensor], timesteps: Tensor, text: Sequence[Tensor]) -> list[Tensor]:
        """latents (C, T, H, W) each, timesteps (B,) in [0, 1], text (L, text_width) each -> like latents.

        Clips and captions may all differ in size. Equal shapes side by side are fastest, so clips are sorted
        by shape on the way in and put back on the way out.
        """
        self._check(latents, timesteps, text)
        order = sorted(range(len(latents)), key=lambda clip: tuple(latents[clip].shape))
        if order == list(range(len(latents))):
            return self._forward_sorted(latents, timesteps, text)
        predictions = self._forward_sorted(
            [latents[clip] for clip in order], timesteps[order], [text[clip] for clip in order]
        )
        place = {clip: index for index, clip in enumerate(order)}
        return [predictions[place[clip]] for clip in range(len(latents))]

    def _forward_sorted(self, latents: Sequence[Tensor], timesteps: Tensor, text: Sequence[Tensor]) -> list[Tensor]:
        grids = [token_grid(clip.shape, self.config.patch_size) for clip in latents]
        lengths = tuple(len(caption) for caption in text)
        words = torch.cat(list(text))

        condition = self._condition(timesteps, words, lengths)
        segments = self._segments(grids, lengths, condition.embedding)
        video = self.patch_embedding(patchify(latents, self.config.patch_size)).to(condition.embedding.dtype)
        if self.config.position_embedding is PositionEmbedding.sincos:
            video = video + self._places(grids, video)
        tokens: Tokens = {"video": video, "text": self.text_embedding(words)}
        for block in self.blocks:
            tokens = block(tokens, segments, condition)

        shift, scale = self.head_modulation(condition.embedding).chunk(2, dim=-1)
        patches = self.head(modulated_norm(tokens["video"], shift, scale, segments["video"].lengths))
        return unpatchify(patches.to(latents[0].dtype), grids, self.config.patch_size)

    def _condition(self, timesteps: Tensor, words: Tensor, lengths: Lengths) -> Condition:
        embedding = self.timestep_embedding(timesteps)
        if self.pooled_text is not None:
            embedding = embedding + self.pooled_text(_means(words.to(embedding.dtype), lengths))
        embedding = F.silu(embedding)
        shared = None if self.shared_modulation is None else self.shared_modulation(embedding)
        return Condition(embedding, shared)

    def _segments(self, grids: Sequence[Grid], text_lengths: Lengths, like: Tensor) -> Segments:
        """Angles (device and dtype of `like`), cuts and orders are made here once; blocks only read them."""
        config = self.config
        tables = []
        for positions, clips in _runs(grids, like.device):
            table = rope_3d(positions, config.head_dim, config.rope_axes, config.rope_theta, like.dtype)
            tables.append([part.repeat(clips, 1) for part in table])
        cos, sin = (torch.cat(parts) for parts in zip(*tables, strict=True))
        return {
            "video": video_segment(grids, (cos, sin), {*config.spans, Span.clip}),
            "text": text_segment(text_lengths),
        }

    def _places(self, grids: Sequence[Grid], like: Tensor) -> Tensor:
        """The sine and cosine embedding of every token, (N, width)."""
        width, theta = self.config.width, self.config.rope_theta
        runs = _runs(grids, like.device)
        return torch.cat([sincos_3d(positions, width, theta, like.dtype).repeat(clips, 1) for positions, clips in runs])

    def _check(self, latents: Sequence[Tensor], timesteps: Tensor, text: Sequence[Tensor]) -> None:
        if not len(latents) == len(timesteps) == len(text) > 0:
            raise ValueError(
                f"the model got {len(latents)} clips, {len(timesteps)} timesteps, {len(text)} captions: it "
                "needs one timestep and one caption for each clip, and at least one clip."
            )
        if timesteps.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"timesteps have dtype {timesteps.dtype}: keep them float32, half precision merges some.")
        for clip in latents:
            if clip.ndim != 4 or clip.shape[0] != self.latent_channels:
                raise ValueError(
                    f"a clip of latents has shape {tuple(clip.shape)} where the model was built for "
                    f"(C={self.latent_channels}, T, H, W)."
                )
        for caption in text:
            if caption.ndim != 2 or caption.shape[1] != self.text_width or len(caption) == 0:
                raise ValueError(
                    f"text embeddings have shape {tuple(caption.shape)}, the model was built for "
                    f"(L >= 1, {self.text_width}). An empty caption is the encoder's null text, never empty."
                )

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        zero: list[nn.Linear] = [self.head, self.head_modulation]
        if self.shared_modulation is not None:
            zero.append(self.shared_modulation)
        zero += [module.linear for module in self.modules() if isinstance(module, LinearModulation)]
        for linear in zero:
            nn.init.zeros_(linear.weight)

    def replace_attention(self, replace: Callable[[Attention], Attention]) -> None:
        """Put `replace(present)` behind the door of every attention; sequence parallelism wraps it so."""
        for module in self.modules():
            if isinstance(module, SegmentAttention):
                module.attention = replace(module.attention)

    def flops(self, tokens: int, text_tokens: int, frames: int | None = None) -> float:
        """Floating-point operations of the forward pass on one clip; a multiply and an add are two.

        Matrix products only; backward takes twice as many. Factorised attention needs `frames` of tokens too.
        """
        config, width = self.config, self.config.width
        if config.attention is AttentionPattern.full:
            seen = tokens
        elif frames is None:
            raise ValueError("model.attention=factorised: flops needs frames, the number of token frames.")
        else:
            seen = tokens // frames + frames
        spans = len(config.spans)

        linear = tokens * width * (spans * 4 * width + 2 * width + 2 * config.hidden_width)
        words = text_tokens * width * 2 * width
        mixing = 2 * tokens * width * (seen + text_tokens)
        edges = tokens * width * 2 * self.patch_embedding.in_features
        edges += text_tokens * width * (self.text_width + width)
        slots = SLOTS * (spans + 2)
        blocks_with_linear = 1 if config.modulation is ModulationSource.table else config.depth
        rows = TIMESTEP_CHANNELS + width + (self.text_width if config.pooled_text else 0)
        rows += blocks_with_linear * slots * width + 2 * width
        return 2.0 * (config.depth * (linear + words + mixing) + edges + width * rows)


def _block(config: DiTConfig, slots: int) -> Block:
    """Self-attention over each span, cross-attention to the caption, then the MLP."""
    attention = attention_of(config.attention_kernel)

    def look(answers: str, span: Span) -> Sublayer:
        operation = SegmentAttention(
            config.width,
            config.num_heads,
            "video",
            answers,
            attention=attention,
            qk_norm=config.qk_norm,
            span=span,
        )
        return Sublayer("video", operation)

    sublayers = [look("video", span) for span in config.spans]
    sublayers.append(look("text", Span.clip))
    sublayers.append(Sublayer("video", FeedForward(config.width, config.hidden_width, config.activation)))
    source = TableModulation if config.modulation is ModulationSource.table else LinearModulation
    return Block(sublayers, source(config.width, slots))


def _runs(grids: Sequence[Grid], device: torch.device) -> Iterator[tuple[Tensor, int]]:
    """Token positions (n, 3) of each run of equal grids, and how many clips it has."""
    for grid, group in groupby(grids):
        yield grid_positions(*grid, device=device), len(list(group))


def _means(words: Tensor, lengths: Lengths) -> Tensor:
    """Mean over each caption's tokens: (M, K) -> (B, K)"""
    return torch.stack([caption.mean(0) for caption in words.split(lengths)])

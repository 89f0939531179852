"""How timesteps (and optionally the whole caption) reach the blocks: embeddings and adaptive layer norm."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.attention import Lengths, attention
from kinema.models.dit.axes import NormKind
from kinema.models.dit.norms import Norm
from kinema.models.dit.segments import joined, totals

TIMESTEP_EPSILON = 1e-6
SHARED_SLOTS = 3  # shift, scale and gate


class ExactLinear(nn.Linear):
    """A linear layer that computes in float32 (or float64) whatever its weights' dtype and autocast say.

    bfloat16 would round neighbouring timesteps, and their modulation, onto one another. It sees one row per
    clip, so precision costs nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) of any float dtype -> (..., out) in at least float32."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x.to(dtype), self.weight.to(dtype), bias)


def sinusoids(timesteps: Tensor, channels: int, scale: float) -> Tensor:
    """Timesteps (B,) in [0, 1] -> cosines and sines (B, channels) of wavelengths from 2 pi to 2 pi * 10000.

    Vaswani et al. 2017, section 3.5, in the precision of the timesteps, which are multiplied by `scale` first.
    """
    half = channels // 2
    steps = torch.arange(half, dtype=timesteps.dtype, device=timesteps.device)
    angles = scale * timesteps[:, None] * torch.exp(-math.log(10000.0) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    """Sinusoids and two linear layers, in float32 throughout."""

    def __init__(
        self,
        channels: int,
        width: int,
        scale: float,
        *,
        bias: bool = True,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.scale = channels, scale
        self.expand = ExactLinear(channels, hidden or width, bias)
        self.project = ExactLinear(hidden or width, width, bias)

    def forward(self, timesteps: Tensor) -> Tensor:
        """timesteps (R,) in [0, 1] -> (R, D)."""
        return self.project(F.silu(self.expand(sinusoids(timesteps, self.channels, self.scale))))


class NormedTimesteps(nn.Module):
    """Sinusoids behind a norm, and from the same sinusoids a layer for what all sublayers share (Cosmos)."""

    def __init__(self, channels: int, scale: float, *, bias: bool) -> None:
        super().__init__()
        self.channels, self.scale = channels, scale
        self.norm = Norm(NormKind.rms, channels, TIMESTEP_EPSILON, affine=True)
        self.expand = ExactLinear(channels, channels, bias)

    def forward(self, timesteps: Tensor) -> Tensor:
        """timesteps (R,) in [0, 1] -> (R, channels)."""
        return self.norm(sinusoids(timesteps, self.channels, self.scale))

    def for_all(self, timesteps: Tensor) -> Tensor:
        """timesteps (R,) -> (R, channels), what shared modulation is made of."""
        return F.silu(self.expand(sinusoids(timesteps, self.channels, self.scale)))


class MeanPooling(ExactLinear):
    """The mean of a caption to the timestep's width, in float32 throughout."""

    def forward(self, words: Tensor, lengths: Lengths) -> Tensor:  # type: ignore[override]  # what it pools, and how
        """words (M, channels) -> (B, D)"""
        return super().forward(means(words, lengths))


class AttentionPooling(nn.Module):
    """The mean of a caption asks its tokens and itself (Radford et al. 2021, CLIP), in float32 throughout."""

    def __init__(self, channels: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (ExactLinear(channels, channels) for _ in range(3))
        self.project = ExactLinear(channels, width)
        self.num_heads = num_heads

    def forward(self, words: Tensor, lengths: Lengths) -> Tensor:
        """words (M, channels) -> (B, D)"""
        ones, mean = (1,) * len(lengths), means(words, lengths)
        tokens, counts = joined([mean, words], [ones, lengths]), totals([ones, lengths])
        with torch.autocast(words.device.type, enabled=False):
            q, k, v = self._heads(self.query(mean)), self._heads(self.key(tokens)), self._heads(self.value(tokens))
            return self.project(attention(q, k, v, ones, counts).flatten(1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.num_heads, -1))

    def products(self, words: int) -> int:
        """Multiplications on one caption."""
        layers = self.query.weight.numel() + self.project.weight.numel()
        return layers + 2 * (words + 1) * (self.key.weight.numel() + self.key.out_features)


class PooledEmbedding(nn.Module):
    """One vector a caption to the timestep's width: two linear layers, in float32 throughout."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.expand = ExactLinear(channels, width)
        self.project = ExactLinear(width, width)

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled (B, channels) -> (B, D)"""
        return self.project(F.silu(self.expand(pooled)))


class NormedPooled(nn.Module):
    """The same by one linear layer and a norm with weights."""

    def __init__(self, channels: int, width: int, eps: float) -> None:
        super().__init__()
        self.project = ExactLinear(channels, width)
        self.norm = Norm(NormKind.layer, width, eps, affine=True)

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled (B, channels) -> (B, D)"""
        return self.norm(self.project(pooled))


class Condition(NamedTuple):
    """What every block reads; one row a clip, or one a latent frame where frames have timesteps of their own. Float32.

    Tokens of a row lie together, so a row is never written out token by token: 6 of them at 27 000 tokens of
    3072 channels would be 2 GB in every block.
    """

    raw: Tensor
    """(R, D), the embedding itself."""
    embedding: Tensor
    """(R, D), after its SiLU."""
    shared: Tensor | None
    """(R, slots * D), the modulation that all blocks share, or (R, 3 * D), that all sublayers do; none when each block
    has a linear layer of its own.
    """


class TableModulation(nn.Module):
    """A learned offset to modulation that all blocks share: adaLN-single (Chen et al. 2023, PixArt-alpha).

    A linear layer in each block instead would add almost half as many weights again.
    """

    def __init__(self, width: int, rows: Sequence[int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(len(rows) * width))
        self.width, self.rows = width, list(rows)

    def forward(self, condition: Condition) -> Tensor:
        """-> (R, slots * D)"""
        assert condition.shared is not None
        shared = condition.shared.unflatten(1, (-1, self.width))
        taken = shared if len(self.rows) == shared.shape[1] else shared[:, self.rows]
        return taken.flatten(1) + self.table


class LinearModulation(nn.Module):
    """A linear layer of the block's own: adaLN-Zero (Peebles and Xie 2023, section 3.2)."""

    def __init__(self, condition_width: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear = ExactLinear(condition_width, sum(sizes))

    def forward(self, condition: Condition) -> Tensor:
        """-> (R, sum of sizes)"""
        return self.linear(condition.embedding)


class LowRankModulation(nn.Module):
    """The product of two thin linear layers for each of some sublayers, beside what they share: adaLN-LoRA.

    Gupta et al. 2023 (W.A.L.T.) and NVIDIA 2025 (Cosmos). `slots` has one entry for each; one that takes fewer than
    three vectors takes the first of the shared ones.
    """

    def __init__(self, condition_width: int, width: int, rank: int, slots: Sequence[int]) -> None:
        super().__init__()
        self.sizes = [width * count for count in slots]
        self.down = nn.ModuleList(ExactLinear(condition_width, rank, bias=False) for _ in slots)
        self.up = nn.ModuleList(ExactLinear(rank, size, bias=False) for size in self.sizes)

    def forward(self, condition: Condition) -> Tensor:
        """-> (R, sum of slots * D)"""
        assert condition.shared is not None
        parts = [
            up(down(condition.embedding)) + condition.shared[:, :size]
            for down, up, size in zip(self.down, self.up, self.sizes, strict=True)
        ]
        return torch.cat(parts, dim=-1)


class CaptionCondition(nn.Module):
    """A clip's timestep to the shift and scale behind which all blocks read its caption (LTX-2.3)."""

    def __init__(self, channels: int, width: int, scale: float) -> None:
        super().__init__()
        self.embedding = TimestepEmbedding(channels, width, scale)
        self.linear = ExactLinear(width, 2 * width)
        self.width = width

    def forward(self, timesteps: Tensor) -> Tensor:
        """timesteps (B,) -> (B, 2, D)"""
        return self.linear(F.silu(self.embedding(timesteps))).unflatten(1, (2, self.width))


class HeadTable(nn.Module):
    """Shift and scale before the last layer: a learned table added to the embedding (Chen et al. 2023)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2 * width))

    def forward(self, condition: Condition) -> Tensor:
        """-> (R, 2 * D)"""
        return torch.cat([condition.raw, condition.raw], dim=1) + self.table


def means(words: Tensor, lengths: Lengths) -> Tensor:
    """Mean over each caption's tokens: (M, K) -> (B, K)"""
    return torch.stack([caption.mean(0) for caption in words.split(list(lengths))])

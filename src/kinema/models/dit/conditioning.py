"""How timesteps (and optionally the whole caption) reach the blocks: embeddings and adaptive layer norm."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.attention import Lengths, is_uniform

TIMESTEP_CHANNELS = 256
TIMESTEP_SCALE = 1000.0  # the sinusoids were made for DDPM's 1000 steps (Ho et al. 2020)


class ExactLinear(nn.Linear):
    """A linear layer that computes in float32 (or float64) whatever its weights' dtype and autocast say.

    bfloat16 would round neighbouring timesteps, and their modulation, onto one another. It sees one row per
    clip, so precision costs nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) of any float dtype -> (..., out) in at least float32."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


def sinusoids(timesteps: Tensor, channels: int = TIMESTEP_CHANNELS) -> Tensor:
    """Timesteps (B,) in [0, 1] -> cosines and sines (B, channels) of wavelengths from 2 pi to 2 pi * 10000.

    Vaswani et al. 2017, section 3.5, in the precision of the timesteps, which are scaled by 1000 first.
    """
    half = channels // 2
    steps = torch.arange(half, dtype=timesteps.dtype, device=timesteps.device)
    angles = TIMESTEP_SCALE * timesteps[:, None] * torch.exp(-math.log(10000.0) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    """Sinusoids and two linear layers, in float32 throughout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = ExactLinear(TIMESTEP_CHANNELS, width)
        self.project = ExactLinear(width, width)

    def forward(self, timesteps: Tensor) -> Tensor:
        """timesteps (B,) in [0, 1] -> (B, D)."""
        return self.project(F.silu(self.expand(sinusoids(timesteps))))


class Condition(NamedTuple):
    """What every block reads about a clip; one row a clip, float32."""

    embedding: Tensor
    """(B, D), after its SiLU."""
    shared: Tensor | None
    """(B, slots * D), the modulation that all blocks share; none when each block has its own linear layer."""


class TableModulation(nn.Module):
    """A learned offset to modulation that all blocks share: adaLN-single (Chen et al. 2023, PixArt-alpha).

    A linear layer in each block instead would add almost half as many weights again.
    """

    def __init__(self, width: int, slots: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(slots * width))

    def forward(self, condition: Condition) -> Tensor:
        """-> (B, slots * D)"""
        assert condition.shared is not None
        return condition.shared + self.table


class LinearModulation(nn.Module):
    """A linear layer of the block's own: adaLN-Zero (Peebles and Xie 2023, section 3.2)."""

    def __init__(self, width: int, slots: int) -> None:
        super().__init__()
        self.linear = ExactLinear(width, slots * width)

    def forward(self, condition: Condition) -> Tensor:
        """-> (B, slots * D)"""
        return self.linear(condition.embedding)


def modulated_norm(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then scale and shift by rows from `spread`: (N, D) -> (N, D)."""
    normed = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
    return torch.addcmul(shift, normed.view(len(shift), -1, normed.shape[-1]), 1 + scale).view_as(tokens)


def gated_sum(tokens: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """tokens + gate * update, with rows from `spread`: (N, D), (N, D) -> (N, D)."""
    shape = len(gate), -1, tokens.shape[-1]
    return torch.addcmul(tokens.view(shape), gate, update.view(shape)).view_as(tokens)


def spread(rows: Tensor, lengths: Lengths) -> Tensor:
    """One row a clip (B, K) -> a tensor that broadcasts over the clips' tokens.

    Clips of equal length n: (B, 1, K), beside tokens viewed as (B, n, K), without a copy. Else (1, N, K).
    """
    if is_uniform(lengths):
        return rows[:, None]
    return torch.cat([row.expand(length, -1) for row, length in zip(rows.split(1), lengths, strict=True)])[
        None
    ]

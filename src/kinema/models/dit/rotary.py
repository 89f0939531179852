"""Rotary tables of clips with their own grid and frame rate."""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from kinema.models.dit.axes import Rope
from kinema.models.dit.config import DiTConfig
from kinema.models.dit.segments import Grid, Turns
from kinema.models.position import centred, fractional_rope, grid_positions, middles, mixed_rope, rope_3d

Angles = Callable[[Tensor, float, torch.dtype], Turns]
"""(N, 3) positions, frames a second and dtype -> cos and sin."""


class Rotary:
    """How far queries and keys of each token turn; `Rope` says which channels, and with what."""

    def __init__(self, config: DiTConfig) -> None:
        self.config = config

    def clips(
        self, grids: Sequence[Grid], fps: Sequence[float] | None, like: Tensor, frequencies: Tensor | None
    ) -> Turns:
        """Every token of clips, one after the other; `frequencies` are those of rope=learned."""

        def angles(positions: Tensor, rate: float, dtype: torch.dtype) -> Turns:
            if frequencies is None:
                return self._angles(positions, rate, dtype)
            cos, sin = mixed_rope(centred(positions, self.config.rope_side), frequencies)
            return cos.to(dtype), sin.to(dtype)

        return self._tables(grids, fps, like, angles)

    def times(
        self, grids: Sequence[Grid], fps: Sequence[float] | None, like: Tensor, clock: tuple[int, int, float]
    ) -> Turns:
        """The same for the time of tokens alone, on `DiTConfig.exchange_clock`."""
        width, heads, longest = clock

        def angles(positions: Tensor, rate: float, dtype: torch.dtype) -> Turns:
            seconds = self.middles(positions, rate)[:, :1]
            return fractional_rope(seconds / longest, width, heads, self.config.rope_theta, dtype, exact=True)

        return self._tables(grids, fps, like, angles)

    def middles(self, positions: Tensor, rate: float) -> Tensor:
        """Seconds, rows and columns of pixels of the middle of each token, (N, 3)."""
        return middles(positions, self.config.patch_size, self.config.rope_units, rate)

    def _tables(self, grids: Sequence[Grid], fps: Sequence[float] | None, like: Tensor, angles: Angles) -> Turns:
        tables = []
        rates = [self.config.rope_fps] * len(grids) if fps is None else fps
        for (grid, rate), group in groupby(zip(grids, rates, strict=True)):
            table, clips = angles(grid_positions(*grid, device=like.device), rate, like.dtype), len(list(group))
            tables.append([part.repeat(clips, *[1] * (part.ndim - 1)) for part in table])
        cos, sin = (torch.cat(parts) for parts in zip(*tables, strict=True))
        return cos, sin

    def _angles(self, positions: Tensor, rate: float, dtype: torch.dtype) -> Turns:
        config = self.config
        if config.rope is Rope.seconds:
            fractions = self.middles(positions, rate) / positions.new_tensor(config.rope_extent)
            turning = fractions[:, [axis for axis, extent in enumerate(config.rope_extent) if extent]]
            return fractional_rope(turning, config.width, config.num_heads, config.rope_theta, dtype, exact=True)
        if config.rope is Rope.axes:
            if rate != config.rope_fps:
                positions[:, 0] = positions[:, 0] / rate * config.rope_fps
            axes, scale = config.rope_axes, config.rope_scale
            return rope_3d(positions, config.head_dim, axes, config.rope_theta, dtype, scale, config.rope_still)
        units, patch, extent = (
            positions.new_tensor(x) for x in (config.rope_units, config.patch_size, config.rope_extent)
        )
        fractions = positions * units * patch / extent
        return fractional_rope(fractions, config.width, config.num_heads, config.rope_theta, dtype)

"""Position embeddings that are added to tokens: with the patches, or again in blocks."""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from kinema.models.dit.config import DiTConfig, PositionEmbedding
from kinema.models.dit.segments import Grid
from kinema.models.position import grid_positions, sincos_3d, sincos_quarters, sincos_space, sincos_time

Waves = Callable[[Tensor, int, float, torch.dtype], Tensor]

AT_START: dict[PositionEmbedding, Waves] = {
    PositionEmbedding.sincos: sincos_3d,
    PositionEmbedding.sincos_quarters: sincos_quarters,
    PositionEmbedding.sincos_apart: sincos_space,
}


class Places(nn.Module):
    """What tokens are told of where they lie, beside the rotary embedding; `PositionEmbedding` says which."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config

    def at_start(self, grids: Sequence[Grid], like: Tensor) -> Tensor | None:
        """(N, D) in the dtype of `like`, to be added to the patches; None for nothing."""
        waves = AT_START.get(self.config.position_embedding)
        return None if waves is None else self._waves(waves, grids, like)

    def in_blocks(self, grids: Sequence[Grid], like: Tensor) -> Tensor | None:
        """(N, D), to be added in the blocks that are placed; None for nothing."""
        if self.config.position_embedding is not PositionEmbedding.sincos_apart:
            return None
        later = [tokens for t, h, w in grids for tokens in [t > 1] * (t * h * w)]  # a single frame has no time
        return self._waves(sincos_time, grids, like) * torch.tensor(later, device=like.device)[:, None]

    def _waves(self, waves: Waves, grids: Sequence[Grid], like: Tensor) -> Tensor:
        width, theta = self.config.width, self.config.rope_theta
        parts = []
        for grid, group in groupby(grids):
            positions = grid_positions(*grid, device=like.device) / self._units(grid, like.device)
            parts.append(waves(positions, width, theta, like.dtype).repeat(len(list(group)), 1))
        return torch.cat(parts)

    def _units(self, grid: Grid, device: torch.device) -> Tensor:
        """Tokens along each axis that count as one."""
        stretched = [
            size / extent if extent else 1.0 for size, extent in zip(grid, self.config.position_extent, strict=True)
        ]
        return torch.tensor(stretched, device=device) * torch.tensor(self.config.position_scale, device=device)

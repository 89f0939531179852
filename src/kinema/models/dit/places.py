"""Position embeddings that are added to tokens: with the patches, or again in blocks."""

import math
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from kinema.models.attention import Lengths
from kinema.models.dit.axes import PositionEmbedding
from kinema.models.dit.config import DiTConfig
from kinema.models.dit.segments import Grid
from kinema.models.position import grid_positions, sincos_3d, sincos_quarters, sincos_space, sincos_time

LEARNED_STD = 0.02
LEARNED_EPSILON = 1e-6

Waves = Callable[[Tensor, int, float, torch.dtype], Tensor]

AT_START: dict[PositionEmbedding, Waves] = {
    PositionEmbedding.sincos: sincos_3d,
    PositionEmbedding.sincos_quarters: sincos_quarters,
    PositionEmbedding.sincos_space: sincos_space,
    PositionEmbedding.sincos_apart: sincos_space,
}


class Places(nn.Module):
    """What tokens are told of where they lie, beside the rotary embedding; `PositionEmbedding` says which."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        of_axes = config.position_embedding is PositionEmbedding.learned_axes
        of_tokens = config.position_embedding is PositionEmbedding.learned

        def table(size: int) -> nn.Parameter:
            return nn.Parameter(LEARNED_STD * torch.randn(size, config.width))

        self.axes = nn.ParameterList(table(size) for size in config.position_grid) if of_axes else None
        self.tokens = table(math.prod(config.position_grid)) if of_tokens else None
        self.words = table(config.position_words) if of_tokens else None

    def at_start(self, grids: Sequence[Grid], like: Tensor) -> Tensor | None:
        """(N, D) in the dtype of `like`, to be added to the patches; None for nothing."""
        if self.tokens is not None:
            for grid in grids:
                check_grid(self.config, grid)
            return _exact(self.tokens).repeat(len(grids), 1)
        waves = AT_START.get(self.config.position_embedding)
        return None if waves is None else self._waves(waves, grids, like)

    def of_words(self, lengths: Lengths) -> Tensor | None:
        """(M, D), to be added to captions of these numbers of tokens; None for nothing."""
        if self.words is None:
            return None
        if max(lengths) > len(self.words):
            raise ValueError(
                f"a caption of {max(lengths)} tokens, where model.position_words={len(self.words)} have a place."
            )
        return torch.cat([_exact(self.words[:length]) for length in lengths])

    def in_blocks(self, grids: Sequence[Grid], like: Tensor) -> Tensor | None:
        """(N, D), to be added in the blocks that are placed; None for nothing."""
        if self.axes is not None:
            return torch.cat([self._sum(grid).repeat(len(list(group)), 1) for grid, group in groupby(grids)])
        if self.config.position_embedding is not PositionEmbedding.sincos_apart:
            return None
        parts = self._waves(sincos_time, grids, like).split([t * h * w for t, h, w in grids])
        return torch.cat(
            [part * (t > 1) for part, (t, _, _) in zip(parts, grids, strict=True)]
        )  # one frame has no time

    def _sum(self, grid: Grid) -> Tensor:
        """One vector an axis for every token, their sum brought to a root mean square of one: (n, D)."""
        assert self.axes is not None
        check_grid(self.config, grid)
        t, h, w = (_exact(table[:size]) for table, size in zip(self.axes, grid, strict=True))
        whole = (t[:, None, None] + h[:, None] + w).flatten(0, 2)
        root = torch.linalg.vector_norm(whole, dim=-1, keepdim=True) / math.sqrt(self.config.width)  # flat at zero
        return whole / (root + LEARNED_EPSILON)

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


def check_grid(config: DiTConfig, grid: Grid) -> None:
    """Refuse a clip in which some token would have no learned place, or some learned place no token."""
    learned, largest = config.position_embedding, config.position_grid
    if learned is PositionEmbedding.learned and list(grid) != largest:
        raise ValueError(
            f"a clip of {grid} frames, rows and columns of tokens, where the model has learned places of "
            f"exactly model.position_grid={largest}."
        )
    if learned is PositionEmbedding.learned_axes and any(n > most for n, most in zip(grid, largest, strict=True)):
        raise ValueError(
            f"a clip of {grid} frames, rows and columns of tokens is larger than model.position_grid="
            f"{largest}: the model has learned no place beyond."
        )


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

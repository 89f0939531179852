"""One clock for all that shares a softmax: words, then the clip, and its sound beside it."""

from collections.abc import Sequence
from itertools import accumulate, islice

import torch
from torch import Tensor

from kinema.models.attention import Lengths
from kinema.models.dit.config import DiTConfig
from kinema.models.dit.segments import Grid, Turns
from kinema.models.position import grid_positions, rope_3d, word_positions

EARS = 2


class PackedClock:
    """Rotary tables of rope=packed (MiniMax-H3).

    Words lie a step apart; the clip begins behind the last of them, its latent frames `rope_spans` steps apart. Rows
    and columns lie around the middle of a square of `rope_side` that has the frame's area, whatever its shape. Sound
    runs beside the clip, a step for each latent, one ear at the first column and one at the last.
    """

    def __init__(self, config: DiTConfig) -> None:
        self.config = config

    def words(self, lengths: Lengths, like: Tensor) -> Turns:
        """Of captions with these numbers of tokens."""
        return self._turns(word_positions(lengths, like.device), like.dtype)

    def clips(self, grids: Sequence[Grid], words: Lengths, like: Tensor) -> Turns:
        """Of clips with these token grids, behind so many words each."""
        places = [self._places(grid, count, like.device) for grid, count in zip(grids, words, strict=True)]
        return self._turns(torch.cat(places), like.dtype)

    def sound(self, lengths: Lengths, grids: Sequence[Grid], words: Lengths, like: Tensor) -> Turns:
        """Of sound with these numbers of tokens, both ears together, beside those clips."""
        places = []
        for tokens, grid, count in zip(lengths, grids, words, strict=True):
            times = count + torch.arange(tokens // EARS, device=like.device, dtype=torch.float64)
            edges = self._space(grid, 2, like.device)[[0, -1]]
            both = torch.cartesian_prod(times, edges)
            places.append(torch.stack([both[:, 0], torch.zeros_like(both[:, 0]), both[:, 1]], dim=1))
        return self._turns(torch.cat(places), like.dtype)

    def _places(self, grid: Grid, words: int, device: torch.device) -> Tensor:
        """(t, h, w) of every token of a clip: (N, 3)"""
        spans = self.config.rope_spans
        starts = list(islice(accumulate((spans[i % len(spans)] for i in range(grid[0])), initial=words), grid[0]))
        times = torch.tensor(starts, dtype=torch.float64, device=device)
        axes = [times, self._space(grid, 1, device), self._space(grid, 2, device)]
        where = grid_positions(*grid, device=device).long()
        return torch.stack([places[where[:, axis]] for axis, places in enumerate(axes)], dim=1)

    def _space(self, grid: Grid, axis: int, device: torch.device) -> Tensor:
        """Places of rows (1) or columns (2)."""
        latents = [count * patch for count, patch in zip(grid, self.config.patch_size, strict=True)]
        side = latents[axis] / (latents[1] * latents[2]) ** 0.5
        steps = torch.arange(grid[axis], dtype=torch.float64, device=device) / grid[axis]
        return ((1 - side) / 2 + steps * side) * self.config.rope_side

    def _turns(self, places: Tensor, dtype: torch.dtype) -> Turns:
        config = self.config
        axes, scale = config.rope_axes, config.rope_scale
        return rope_3d(places.float(), config.head_dim, axes, config.rope_theta, dtype, scale, config.rope_still)


def both_ears(latents: Sequence[Tensor]) -> list[Tensor]:
    """(C, T, 2) each -> tokens (T * 2, C), one ear beside the other."""
    return [clip.flatten(1).T for clip in latents]

"""Clips to spacetime patches and back: the only place that knows how a token holds its latents."""

from collections.abc import Sequence
from itertools import groupby

import torch
from einops import rearrange
from torch import Tensor

from kinema.models.dit.segments import Grid


def patchify(latents: Sequence[Tensor], patch_size: Sequence[int]) -> Tensor:
    """Clips (C, T, H, W) -> tokens (N, C * pt * ph * pw), clip after clip, time outermost within each."""
    pt, ph, pw = patch_size
    pattern = "b c (t pt) (h ph) (w pw) -> (b t h w) (c pt ph pw)"
    runs = [torch.stack(list(run)) for _, run in groupby(latents, key=lambda clip: clip.shape)]
    tokens = [rearrange(run, pattern, pt=pt, ph=ph, pw=pw) for run in runs]
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens)


def unpatchify(tokens: Tensor, grids: Sequence[Grid], patch_size: Sequence[int]) -> list[Tensor]:
    """The inverse: tokens (N, C * pt * ph * pw) -> clips (C, T, H, W) of these token grids."""
    pt, ph, pw = patch_size
    pattern = "(b t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)"
    runs = [(t, h, w, len(list(group))) for (t, h, w), group in groupby(grids)]
    parts = tokens.split([t * h * w * clips for t, h, w, clips in runs])
    clips: list[Tensor] = []
    for (t, h, w, _), part in zip(runs, parts, strict=True):
        clips += rearrange(part, pattern, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw).unbind()
    return clips


def token_grid(shape: Sequence[int], patch_size: Sequence[int]) -> Grid:
    """Tokens along time, height and width of a clip (C, T, H, W); patches must fit without a rest."""
    pairs = list(zip(shape[1:], patch_size, strict=True))
    if any(extent % patch or extent == 0 for extent, patch in pairs):
        nearest = [max(round(extent / patch), 1) * patch for extent, patch in pairs]
        raise ValueError(
            f"a clip of latents with shape {tuple(shape)} does not divide into model.patch_size="
            f"{list(patch_size)}: its T, H, W must be multiples of it. Nearest: {nearest}."
        )
    t, h, w = (extent // patch for extent, patch in pairs)
    return t, h, w

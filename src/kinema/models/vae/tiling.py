"""Encoding and decoding of videos too large to do at once: overlapping tiles in space, blended.

Chunks in time are exact (`CausalVAE.encode_chunks`); tiles in space are not, because a tile does not see past
its border. The overlap hides it: a tile counts less the nearer its border.
"""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from kinema.models.vae.autoencoder import CausalVAE
from kinema.models.vae.posterior import Posterior

Span = tuple[int, int]
"""First position and end of a tile along one side."""


def encode_tiled(vae: CausalVAE, video: Tensor, tile: int, overlap: int) -> Posterior:
    """As `vae.encode`, in square tiles; tile and overlap in PIXELS, both multiples of the spatial stride."""
    tile_latent, overlap_latent = _to_latent_pixels(vae, tile, overlap)
    _, _, height, width = vae.latent_shape(*video.shape[2:])
    stride = vae.config.spatial_stride

    def encode(rows: Span, columns: Span) -> Tensor:
        part = video[..., rows[0] * stride : rows[1] * stride, columns[0] * stride : columns[1] * stride]
        return torch.cat(vae.encode(part), dim=1)

    blended = _blend(encode, (height, width), tile_latent, overlap_latent, scale=1)
    mean, logvar = blended.chunk(2, dim=1)
    return Posterior(mean, logvar)


def decode_tiled(vae: CausalVAE, latents: Tensor, tile: int, overlap: int) -> Tensor:
    """As `vae.decode`, in square tiles; tile and overlap in PIXELS, both multiples of the spatial stride."""
    tile_latent, overlap_latent = _to_latent_pixels(vae, tile, overlap)

    def decode(rows: Span, columns: Span) -> Tensor:
        return vae.decode(latents[..., slice(*rows), slice(*columns)])

    height, width = latents.shape[-2:]
    return _blend(decode, (height, width), tile_latent, overlap_latent, scale=vae.config.spatial_stride)


def tile_spans(size: int, tile: int, overlap: int) -> list[Span]:
    """Tiles of equal size covering [0, size), neighbours sharing at least the overlap; or one tile."""
    if size <= tile:
        return [(0, size)]
    count = -(-(size - overlap) // (tile - overlap))
    starts = [i * (size - tile) // (count - 1) for i in range(count)]
    return [(start, start + tile) for start in starts]


def _to_latent_pixels(vae: CausalVAE, tile: int, overlap: int) -> tuple[int, int]:
    """The one place where the settings change from pixels to latent pixels."""
    if (reason := vae.config.needs_whole_frames()) is not None:
        raise ValueError(f"tile={tile}: this VAE cannot work in tiles: {reason}. Encode and decode whole frames.")
    stride = vae.config.spatial_stride
    for name, value in (("tile", tile), ("overlap", overlap)):
        if value % stride:
            legal = f"{value // stride * stride} or {(value // stride + 1) * stride}"
            raise ValueError(f"{name}={value} pixels must be a multiple of the spatial stride {stride}; use {legal}")
    if not 0 <= overlap <= tile // 2 or tile < 1:
        raise ValueError(f"overlap={overlap} pixels must be between 0 and half of tile={tile}: only neighbours blend")
    return tile // stride, overlap // stride


def _blend(run: Callable[[Span, Span], Tensor], size: tuple[int, int], tile: int, overlap: int, scale: int) -> Tensor:
    """Weighted mean of the tiles; size, tile and overlap in latent pixels, outputs `scale` times as large."""
    height, width = size
    total: Tensor | None = None
    weights = torch.zeros(())
    for rows, columns in product(tile_spans(height, tile, overlap), tile_spans(width, tile, overlap)):
        part = run(rows, columns)
        row_weight, column_weight = _ramp(rows, height, overlap, scale), _ramp(columns, width, overlap, scale)
        weight = torch.outer(row_weight, column_weight).to(part)
        if total is None:
            total = part.new_zeros(*part.shape[:-2], height * scale, width * scale)
            weights = part.new_zeros(height * scale, width * scale)
        inside = (..., slice(rows[0] * scale, rows[1] * scale), slice(columns[0] * scale, columns[1] * scale))
        total[inside] += part * weight
        weights[inside] += weight
    assert total is not None
    return total / weights


def _ramp(span: Span, size: int, overlap: int, scale: int) -> Tensor:
    """Weight of each output pixel of a tile: 1 inside, falling to 0 towards borders that have a neighbour.

    It falls in the middle half of the overlap; the outer quarter, where padding shows most, is not used.
    """
    from_border = torch.arange((span[1] - span[0]) * scale) + 0.5
    ramp = torch.ones_like(from_border)
    fall = (from_border / max(overlap * scale, 1) * 2 - 0.5).clamp(0, 1)
    if span[0] > 0 and overlap > 0:
        ramp = torch.minimum(ramp, fall)
    if span[1] < size and overlap > 0:
        ramp = torch.minimum(ramp, fall.flip(0))
    return ramp

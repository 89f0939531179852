"""Tiled encoding and decoding against the whole frame."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kinema.models.vae import CausalVAE, Convolution, VAEConfig, decode_tiled, encode_tiled
from kinema.models.vae.tiling import tile_spans

TILES = [(64, 32), (96, 32), (112, 40)]


@pytest.fixture(scope="module")
def vae() -> CausalVAE:
    torch.manual_seed(0)
    vae = CausalVAE(VAEConfig(latent_channels=5, width=8, decoder_width=8, convolution=Convolution.alternating))
    vae.set_latent_statistics(torch.linspace(-1, 1, 5), torch.linspace(0.5, 2, 5))
    return vae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def video() -> Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 5, 112), torch.linspace(0, 7, 144), indexing="ij")
    frames = [torch.stack([torch.sin(x + t), torch.sin(y * 1.3 - t), torch.cos(x * y * 0.3)]) for t in range(5)]
    return torch.stack(frames, dim=1)[None] * 0.9


def decibels(actual: Tensor, expected: Tensor) -> float:
    """PSNR over the range of the expected."""
    span = expected.max() - expected.min()
    return float(10 * torch.log10(span**2 / (actual - expected).square().mean()))


@pytest.mark.parametrize(("tile", "overlap"), TILES)
def test_tiles_come_close_to_the_whole_frame(vae, video, tile, overlap):
    latents = vae.encode(video)
    tiled = encode_tiled(vae, video, tile, overlap)
    assert decibels(tiled.mean, latents.mean) >= 45
    assert decibels(tiled.logvar, latents.logvar) >= 45
    assert decibels(decode_tiled(vae, latents.mean, tile, overlap), vae.decode(latents.mean)) >= 45


@pytest.mark.parametrize(("tile", "overlap"), TILES)
def test_no_seams_where_tiles_begin_and_end(vae, video, tile, overlap):
    """What tiling adds to the steps from column to column is nowhere more than a fifth of their size."""
    latents = vae.encode(video).mean
    whole = vae.decode(latents)
    added = (decode_tiled(vae, latents, tile, overlap) - whole).diff(dim=-1).abs().mean((0, 1, 2, 3))
    assert added.max() <= 0.2 * whole.diff(dim=-1).abs().mean()


@pytest.mark.parametrize(("tile", "overlap"), [*TILES, (48, 8)])
def test_tiles_are_counted_and_sized_as_asked(vae, video, tile, overlap, monkeypatch):
    sizes: list[tuple[int, int]] = []
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda part: sizes.append(tuple(part.shape[-2:])) or encode(part))
    encode_tiled(vae, video, tile, overlap)
    rows, columns = (-(-(size - overlap) // (tile - overlap)) for size in (112, 144))
    assert sizes == [(tile, tile)] * (rows * columns)


def test_one_tile_is_the_whole_frame_exactly(vae, video):
    latents = vae.encode(video)
    assert torch.equal(encode_tiled(vae, video, 144, 64).mean, latents.mean)
    assert torch.equal(decode_tiled(vae, latents.mean, 144, 64), vae.decode(latents.mean))


def test_spans_cover_everything_and_overlap_enough():
    for size in range(1, 40):
        for tile in range(1, 12):
            for overlap in range(tile // 2 + 1):
                spans = tile_spans(size, tile, overlap)
                assert spans[0][0] == 0
                assert spans[-1][1] == size
                assert all(end - start == min(tile, size) for start, end in spans)
                assert all(a[1] - b[0] >= overlap for a, b in pairwise(spans))


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [(60, 16, "tile=60 pixels must be a multiple of .* 8; use 56 or 64"), (64, 12, "overlap=12"),
     (64, 40, "overlap=40 pixels must be between 0 and half of tile=64"), (0, 0, "tile=0")],
)  # fmt: skip
def test_impossible_tiles_are_refused(vae, video, tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        encode_tiled(vae, video, tile, overlap)
    with pytest.raises(ValueError, match=message):
        decode_tiled(vae, torch.zeros(1, 5, 2, 14, 18), tile, overlap)

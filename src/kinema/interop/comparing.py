"""Our module and the reference's on the same fixed noise: what an export must pass before it is published."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kinema.interop.preset import Record
from kinema.models.dit import DiT
from kinema.models.vae import CausalVAE

LIMIT = 1e-4
"""Largest relative difference that an export may have."""


@dataclass(frozen=True)
class Sample:
    """Fixed inputs of a denoiser: two clips with different timesteps."""

    latents: Tensor
    """(2, C, T, H, W)"""
    timesteps: Tensor
    """(2,) in [0, 1]"""
    text: Tensor
    """(2, L, D)"""

    @classmethod
    def of(cls, model: DiT, seed: int = 0) -> "Sample":
        """A small odd grid of patches, in the sizes that a model takes."""
        generator = torch.Generator().manual_seed(seed)
        sides = [patch * count for patch, count in zip(model.config.patch_size, (3, 3, 5), strict=True)]
        latents = torch.randn(2, model.latent_channels, *sides, generator=generator)
        text = torch.randn(2, 7, model.text_width, generator=generator)
        return cls(latents, torch.tensor([0.3, 0.9]), text)


Call = Callable[[Any, Record, Sample], Tensor]


def wan(reference: Any, config: Record, sample: Sample) -> Tensor:
    """Wan 2.1 and 2.2: timesteps count to 1000."""
    return reference(sample.latents, sample.timesteps * 1000, sample.text).sample


CALLS: dict[str, Call] = {"WanTransformer3DModel": wan}
"""How the forward of each class of the reference takes a sample."""


@torch.no_grad()
def difference(ours: nn.Module, reference: Any, config: Record) -> float:
    """Largest difference of the two outputs, relative to the largest output; of encoder and decoder for a VAE."""
    reference.eval()
    ours.eval()
    if isinstance(ours, CausalVAE):
        return _vae_difference(ours, reference)
    assert isinstance(ours, DiT)
    name = type(reference).__name__
    if name not in CALLS:
        raise ValueError(f"{name}: Kinema cannot run this class for a comparison yet; it has calls for {list(CALLS)}.")
    sample = Sample.of(ours)
    expected = CALLS[name](reference, config, sample)
    return relative(torch.stack(ours(list(sample.latents), sample.timesteps, list(sample.text))), expected)


def _vae_difference(ours: CausalVAE, reference: Any) -> float:
    generator = torch.Generator().manual_seed(0)
    time, space = ours.geometry_strides
    video = torch.rand(1, 3, 2 * time + 1, 3 * space, 5 * space, generator=generator) * 2 - 1
    encoded = reference.encode(video).latent_dist.mean
    latents = torch.randn(encoded.shape, generator=generator)
    mean, std = ours.latent_mean.view(-1, 1, 1, 1), ours.latent_std.view(-1, 1, 1, 1)
    return max(
        relative(ours.encode(video).mean * std + mean, encoded),
        relative(ours.decode(latents), reference.decode(latents * std + mean).sample),
    )


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected value; infinite where shapes or finiteness differ."""
    if actual.shape != expected.shape or not torch.isfinite(expected).all():
        return float("inf")
    scale = expected.abs().max().clamp(min=1e-12)
    return ((actual - expected).abs().max() / scale).item()

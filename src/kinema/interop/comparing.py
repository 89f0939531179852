"""Our module and the reference's on the same fixed noise: what an export must pass before it is published."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kinema.interop.preset import Record
from kinema.models.dit import DiT, Extras
from kinema.models.vae import CausalVAE

LIMIT = 1e-4
"""Largest relative difference that an export may have."""


@dataclass(frozen=True)
class Sample:
    """Fixed inputs of a denoiser: two clips with different timesteps; what a model does not read is None."""

    latents: Tensor
    """(2, C, T, H, W)"""
    timesteps: Tensor
    """(2,) in [0, 1]"""
    text: Tensor
    """(2, L, D)"""
    channels: Tensor | None = None
    """(2, condition_channels, T, H, W)"""
    image: Tensor | None = None
    """(2, L, image_width)"""

    @classmethod
    def of(cls, model: DiT, seed: int = 0) -> "Sample":
        """A small odd grid of patches, and all conditions that the model reads."""
        generator, config = torch.Generator().manual_seed(seed), model.config
        grid = [patch * count for patch, count in zip(config.patch_size, (3, 3, 5), strict=True)]

        def draw(width: int, *rest: int) -> Tensor:
            return torch.randn(2, *rest, width, generator=generator)

        return cls(
            latents=draw(grid[-1], model.latent_channels, *grid[:-1]),
            timesteps=torch.tensor([0.3, 0.9]),
            text=draw(model.text_width, TEXT_BESIDE_IMAGE if config.image_width else 7),
            channels=draw(grid[-1], config.condition_channels, *grid[:-1]) if config.condition_channels else None,
            image=draw(config.image_width, 6) if config.image_width else None,
        )

    def extras(self) -> Extras:
        """The conditions as our model takes them."""
        return Extras(**{name: _rows(getattr(self, name)) for name in ("channels", "image")})

    def given(self) -> Tensor:
        """Noisy latents and given channels together, as references take them."""
        return self.latents if self.channels is None else torch.cat([self.latents, self.channels], dim=1)


def _rows(values: Tensor | None) -> list[Tensor] | None:
    return None if values is None else list(values)


TEXT_BESIDE_IMAGE = 512
"""The reference of Wan finds the image's tokens by counting captions as this long."""

Call = Callable[[Any, Record, Sample], Tensor]


def wan(reference: Any, config: Record, sample: Sample) -> Tensor:
    """Wan 2.1 and 2.2: timesteps count to 1000."""
    return reference(sample.given(), sample.timesteps * 1000, sample.text, sample.image).sample


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
    actual = ours(list(sample.latents), sample.timesteps, list(sample.text), sample.extras())
    return relative(torch.stack(actual), expected)


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

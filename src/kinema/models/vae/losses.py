"""What the VAE is trained to minimise: reconstruction, KL, perceptual distance and a patch discriminator."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kinema.models.vae.discriminator import (
    DiscriminatorNorm,
    PatchDiscriminator,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from kinema.models.vae.perceptual import Perceptual, PyramidDistance, feature_distance
from kinema.models.vae.posterior import Posterior


@dataclass
class VAELossConfig:
    """Weights of the terms; a term of weight 0 is not built and not reported."""

    reconstruction: float = 1.0
    """Mean absolute error of the pixels in [-1, 1]."""
    squared: float = 0.0
    """Mean squared error of the pixels. Small objects count for more than under the absolute error, with
    which a new VAE stays with the plain background for long."""
    kl: float = 1e-3
    """Nats per latent number. A published weight of the sum over latents beside the mean error of the pixels
    is this weight divided by the count of latent numbers."""
    perceptual: float = 0.0
    """Perceptual distance of the kind below."""
    perceptual_kind: Perceptual = Perceptual.pyramid
    perceptual_weights: str | None = None
    """State dict in torchvision's format (.safetensors or .pth) of the network `perceptual_kind`."""
    adversarial: float = 0.0
    adversarial_start_step: int = 0
    """Before this step neither discriminator nor VAE sees an adversarial loss; it is reported as 0."""
    discriminator_width: int = 32
    discriminator_layers: int = 3
    discriminator_norm: DiscriminatorNorm = DiscriminatorNorm.group

    def __post_init__(self) -> None:
        for name in (
            "reconstruction",
            "squared",
            "kl",
            "perceptual",
            "adversarial",
            "adversarial_start_step",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"vae_loss.{name}={getattr(self, name)} must not be negative; 0 turns it off")
        for name in ("discriminator_width", "discriminator_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"vae_loss.{name}={getattr(self, name)} must be at least 1")
        needs_weights = self.perceptual > 0 and self.perceptual_kind is not Perceptual.pyramid
        if needs_weights and self.perceptual_weights is None:
            raise ValueError(
                f"vae_loss.perceptual_kind={self.perceptual_kind.value} needs vae_loss.perceptual_weights: a "
                "local state dict in torchvision's format; or perceptual_kind=pyramid, which needs none"
            )
        if self.perceptual_weights is not None and not needs_weights:
            raise ValueError(
                f"vae_loss.perceptual_weights={self.perceptual_weights} would not be used: set "
                "vae_loss.perceptual above 0 and perceptual_kind to mobilenet_v2 or vgg16, or leave it null"
            )


Terms = dict[str, Tensor]
"""Unweighted value of each configured term, (B,)."""


class VAELoss(nn.Module):
    """The configured terms. Holds the discriminator, whose parameters belong to an optimizer of their own.

    Losses are per clip (B,), so that the caller weights the clips of a step whatever its split.
    """

    def __init__(self, config: VAELossConfig) -> None:
        super().__init__()
        self.config = config
        self.perceptual = self._build_perceptual() if config.perceptual > 0 else None
        self.discriminator = (
            PatchDiscriminator(config.discriminator_width, config.discriminator_layers, config.discriminator_norm)
            if config.adversarial > 0
            else None
        )

    def _build_perceptual(self) -> nn.Module:
        if self.config.perceptual_weights is None:
            return PyramidDistance()
        return feature_distance(self.config.perceptual_kind, self.config.perceptual_weights)

    def generator_loss(
        self, video: Tensor, reconstruction: Tensor, posterior: Posterior, step: int
    ) -> tuple[Tensor, Terms]:
        """Videos (B, 3, T, H, W), posterior before normalisation -> the VAE's weighted sum (B,), terms."""
        terms: Terms = {}
        if self.config.reconstruction > 0:
            terms["reconstruction"] = (reconstruction - video).abs().flatten(1).mean(dim=1)
        if self.config.squared > 0:
            terms["squared"] = (reconstruction - video).square().flatten(1).mean(dim=1)
        if self.config.kl > 0:
            terms["kl"] = posterior.kl()
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(reconstruction, video)
        if self.discriminator is not None:
            terms["adversarial"] = self._adversarial(reconstruction, step)
        total = video.new_zeros(len(video))
        for name, term in terms.items():
            total = total + getattr(self.config, name) * term
        return total, {name: term.detach() for name, term in terms.items()}

    def discriminator_loss(self, video: Tensor, reconstruction: Tensor, step: int) -> tuple[Tensor, Terms]:
        """Videos (B, 3, T, H, W) -> the discriminator's hinge loss (B,), terms; 0 before the start step."""
        assert self.discriminator is not None, "a loss without an adversarial term has no discriminator"
        if not self.adversarial_runs(step):
            return video.new_zeros(len(video)), {"discriminator": video.new_zeros(len(video))}
        real, fake = self.discriminator(video), self.discriminator(reconstruction.detach())
        loss = hinge_discriminator_loss(real, fake)
        return loss, {"discriminator": loss.detach()}

    def adversarial_runs(self, step: int) -> bool:
        """Whether the discriminator takes part at this step (counted from 0)."""
        return self.discriminator is not None and step >= self.config.adversarial_start_step

    def _adversarial(self, reconstruction: Tensor, step: int) -> Tensor:
        if not self.adversarial_runs(step):
            return reconstruction.new_zeros(len(reconstruction))
        assert self.discriminator is not None
        with _frozen(self.discriminator):
            return hinge_generator_loss(self.discriminator(reconstruction))


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Gradients pass through the module within, but its own parameters get none."""
    wanted = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


def psnr(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame in dB, (B, T); videos (B, 3, T, H, W), clamped to [-1, 1]."""
    error = (reconstruction.clamp(-1, 1) - video).float().square().mean(dim=(1, 3, 4))
    return 10 * torch.log10(4.0 / error.clamp(min=1e-12))

"""The diagonal Gaussian that an encoder returns, and the statistics which normalise it."""

from typing import NamedTuple

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)  # exp() of the ends is still finite and above zero in float32


class Posterior(NamedTuple):
    """Diagonal Gaussian over latents: mean and log-variance, each (B, C, T, H, W)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Standard normal noise of the mean's shape -> latents of that shape."""
        if noise.shape != self.mean.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, the posterior {tuple(self.mean.shape)}")
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """Divergence from the standard normal (B,), nats per latent number: independent of the clip's size.

        Kingma and Welling 2013 (Auto-Encoding Variational Bayes), appendix B, averaged instead of summed.
        """
        per_number = 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)
        return per_number.flatten(1).mean(dim=1)


class LatentStatistics:
    """Per-channel mean and standard deviation of latents drawn from posteriors, over any number of clips.

    `totals` (3, C) float64 holds count, sum and sum of squares of each channel: added over ranks, they give
    the result of all clips.
    """

    def __init__(self, channels: int) -> None:
        self.totals = torch.zeros(3, channels, dtype=torch.float64)

    def update(self, posterior: Posterior) -> None:
        """Counts the clips of one posterior (B, C, T, H, W)."""
        mean = posterior.mean.detach().double().cpu()
        squares = mean.square() + posterior.logvar.detach().double().cpu().exp()
        over = (0, 2, 3, 4)
        self.totals += torch.stack([torch.ones_like(mean).sum(over), mean.sum(over), squares.sum(over)])

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Mean (C,) and standard deviation (C,), float32."""
        count, total, squares = self.totals
        if (count == 0).any():
            raise ValueError("latent statistics of no clips: call update() with at least one posterior first")
        mean = total / count
        return mean.float(), (squares / count - mean.square()).clamp(min=0).sqrt().float()

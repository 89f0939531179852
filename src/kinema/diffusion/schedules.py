"""Noise schedules: how much data (alpha) and how much noise (sigma) a noisy clip holds at timestep t.

t = 0 is data and t = 1 is noise everywhere: `noisy = alpha(t) * latents + sigma(t) * noise`.
"""

import math
from enum import Enum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Level(NamedTuple):
    """The coefficients at some timesteps, float64 and of the timesteps' shape.

    `velocity = velocity_noise * noise - velocity_data * latents` is what a velocity model predicts here.
    """

    alpha: Tensor
    sigma: Tensor
    velocity_noise: Tensor
    velocity_data: Tensor


class NoiseSchedule(Protocol):
    """A Gaussian path from data to noise."""

    def alpha(self, t: Tensor) -> Tensor:
        """Timesteps of any shape -> the weight of the data, float64."""

    def sigma(self, t: Tensor) -> Tensor:
        """Timesteps of any shape -> the weight of the noise, float64."""

    def level(self, t: Tensor) -> Level:
        """Timesteps of any shape -> every coefficient there, float64."""


class FlowSchedule:
    """Straight line from data to noise: alpha = 1 - t, sigma = t (Liu et al. 2022; Lipman et al. 2022).

    The velocity is the derivative of the path, noise - latents, at every t.
    """

    def alpha(self, t: Tensor) -> Tensor:
        """Timesteps of any shape -> 1 - t, float64."""
        return 1 - t.double()

    def sigma(self, t: Tensor) -> Tensor:
        """Timesteps of any shape -> t, float64."""
        return t.double()

    def level(self, t: Tensor) -> Level:
        """Timesteps of any shape -> every coefficient there, float64."""
        one = torch.ones_like(t, dtype=torch.float64)
        return Level(self.alpha(t), self.sigma(t), one, one)


class BetaSchedule(Enum):
    """How beta grows over the steps of the forward process."""

    linear = "linear"
    """Ho et al. 2020 (DDPM), section 4."""

    scaled_linear = "scaled_linear"
    """Square roots of beta grow linearly: latent diffusion (Rombach et al. 2022), its released models."""

    cosine = "cosine"
    """Nichol and Dhariwal 2021, section 3.2; betas capped at 0.999."""


class VPSchedule:
    """Variance preserving: alpha^2 + sigma^2 = 1, from a table of betas (Ho et al. 2020, equation 4).

    Table row i (0 to num_steps - 1) is t = (i + 1) / num_steps, and t = 0 is clean data. Between rows
    alpha^2 is interpolated linearly. The velocity is v = alpha * noise - sigma * latents (Salimans and Ho
    2022, section 4).
    """

    def __init__(self, betas: Tensor, *, snr_shift: float = 1.0, zero_terminal_snr: bool = False) -> None:
        """`betas` (num_steps,) in (0, 1); signal-to-noise ratios are divided by `snr_shift`, the last then made 0."""
        alphas_squared = torch.cumprod(1 - betas.double(), dim=0)
        alphas = (alphas_squared / (snr_shift + (1 - snr_shift) * alphas_squared)).sqrt()
        if zero_terminal_snr:
            alphas = to_zero_terminal_snr(alphas)
        self.alphas_squared = torch.cat([torch.ones(1, dtype=torch.float64), alphas**2])  # (num_steps + 1,)

    @property
    def num_steps(self) -> int:
        """Rows of the table."""
        return len(self.alphas_squared) - 1

    def alpha_squared(self, t: Tensor) -> Tensor:
        """Timesteps of any shape -> alpha^2 ("alpha bar" in the paper), float64."""
        table = self.alphas_squared.to(t.device)
        row = t.double() * self.num_steps
        below = row.floor().long().clamp(0, self.num_steps - 1)
        return torch.lerp(table[below], table[below + 1], row - below)

    def alpha(self, t: Tensor) -> Tensor:
        """Timesteps of any shape -> the weight of the data, float64."""
        return self.alpha_squared(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """Timesteps of any shape -> the weight of the noise, float64."""
        return (1 - self.alpha_squared(t)).sqrt()

    def level(self, t: Tensor) -> Level:
        """Timesteps of any shape -> every coefficient there, float64."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        return Level(alpha, sigma, velocity_noise=alpha, velocity_data=sigma)


def to_zero_terminal_snr(alphas: Tensor) -> Tensor:
    """Shift and scale alphas (num_steps,): the last is 0, the first stays (Lin et al. 2023, algorithm 1)."""
    return (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])


def make_betas(schedule: BetaSchedule, num_steps: int, beta_start: float, beta_end: float) -> Tensor:
    """The betas (num_steps,) float64 of the forward process; `cosine` has no start and end."""
    if schedule is BetaSchedule.cosine:
        return cosine_betas(num_steps)
    if schedule is BetaSchedule.scaled_linear:
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64) ** 2
    return torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)


def cosine_betas(num_steps: int, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """Betas (num_steps,) whose alpha^2 is a squared cosine (Nichol and Dhariwal 2021, equation 17)."""
    t = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    alpha_squared = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - alpha_squared[1:] / alpha_squared[:-1]).clamp(max=max_beta)

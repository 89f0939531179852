"""Which timesteps training draws and sampling visits: distributions, the shift, and a picture of both."""

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

if TYPE_CHECKING:
    from kinema.diffusion.objective import Objective


class TimestepDistribution(Enum):
    """How training timesteps are drawn, before any shift."""

    uniform = "uniform"
    logit_normal = "logit_normal"
    """sigmoid of a normal variable: most of the work at middle noise (Esser et al. 2024, section 3.1)."""


class TimestepSpacing(Enum):
    """Which timesteps N steps visit, before any shift; the names are of Lin et al. 2023, table 2."""

    trailing = "trailing"
    """1, (N - 1) / N, ..., 1 / N, and then 0: every step is as long as the others."""

    linspace = "linspace"
    """Evenly from 1 to the smallest timestep of training, and from there in one short step to 0."""


TRAINED_TIMESTEPS = 1000
"""Published models count their timesteps from 1 to this."""


def spaced_timesteps(num_steps: int, spacing: TimestepSpacing, shift: float, num_trained: int) -> Tensor:
    """The timesteps (num_steps,) float64 from 1 down that a sampler visits before 0, shifted.

    `linspace` ends at 1 / num_trained *after* its shift, and the shift is then applied to all of them: so does the flow
    Euler of `diffusers`, and models are published with samples that were made so.
    """
    if spacing is TimestepSpacing.trailing:
        # Counted down and divided, so that 1 and every i / num_steps are exact.
        even = torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps
    else:
        last = shift_timesteps(torch.tensor(1 / num_trained, dtype=torch.float64), shift)
        even = torch.linspace(1, last.item(), num_steps, dtype=torch.float64)
    return shift_timesteps(even, shift)


def stretch_timesteps(t: Tensor, terminal: float) -> Tensor:
    """Timesteps (N,) from 1 down -> stretched so that the last of them is `terminal`; LTX-Video's is 0.1."""
    return 1 - (1 - t) * (1 - terminal) / (1 - t[-1])


def uniform_quantile(u: Tensor) -> Tensor:
    """Probability u in (0, 1] -> the timestep below which a share u of the draws lies."""
    return u


def logit_normal_quantile(u: Tensor, mean: float, std: float) -> Tensor:
    """Probability u in (0, 1] -> timestep, for sigmoid(Normal(mean, std)); Esser et al. 2024, section 3.1."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def shift_timesteps(t: Tensor, shift: Tensor | float) -> Tensor:
    """Move timesteps towards noise (shift > 1) or data (shift < 1); 0 and 1 stay, and shifts multiply.

    Esser et al. 2024 (Stable Diffusion 3), section 5.3.2, equation 23, where shift = sqrt(m / n): it lowers
    the log signal-to-noise ratio by 2 log(shift) at every t.
    """
    return shift * t / (shift * t + (1 - t))  # 1 + (shift - 1) t, written so that 1 stays exactly 1


def in_range(t: Tensor, timestep_range: tuple[float, float]) -> Tensor:
    """Which timesteps lie between two, the lower of them included, the upper only where it is 1."""
    low, high = timestep_range
    return (t >= low) & ((t < high) | ((t == 1) & (high == 1)))


def realised_histogram(
    objective: "Objective",
    grid: Tensor,
    *,
    timestep_range: tuple[float, float] = (0.0, 1.0),
    num_tokens: int | None = None,
    training_tokens: Sequence[int] | None = None,
    num_samples: int = 10_000,
    bins: int = 20,
    seed: int = 0,
) -> dict[str, list[float]]:
    """What the objective really draws, beside the `grid` that the sampler really visits, for the head of a run.

    `num_tokens` is the size of a sampled clip; `training_tokens` are the sizes of the training clips, used in turn,
    where they differ from it. Returns `edges` (bins + 1), `counts` (bins, together those of `num_samples` that fall
    into `timestep_range`, where training draws again until one does) and `sampler`, the grid.
    """
    sizes = training_tokens if num_tokens is None or training_tokens is not None else [num_tokens]
    tokens = None if sizes is None else [sizes[i % len(sizes)] for i in range(num_samples)]
    drawn = objective.sample_timesteps(num_samples, Generator().manual_seed(seed), tokens)
    kept = drawn[in_range(drawn, timestep_range)]
    counts, edges = torch.histogram(kept.double(), bins=bins, range=(0.0, 1.0))
    return {"edges": edges.tolist(), "counts": counts.tolist(), "sampler": grid.tolist()}

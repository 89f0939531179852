"""Solvers: from noise to data in a few calls of the network, for clips of any size together.

Every objective's path becomes the straight one in the variables `straight = x / (alpha + sigma)` and
`tau = sigma / (alpha + sigma)`: there `straight = (1 - tau) * data + tau * noise`, whose slope noise - data
is finite at both ends. So Euler and Heun are written once, and need no derivative of any schedule.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kinema.diffusion.library import as_ours, library_steps, make_scheduler
from kinema.diffusion.objective import DDPM, Clips, Objective, per_clip
from kinema.diffusion.timesteps import TimestepSpacing

Predict = Callable[[Clips, Tensor], Clips]
"""predict(noisy clips, timesteps (B,) float32 on the clips' device) -> the network's predictions."""

Progress = Callable[[int, int], None]
"""progress(steps done, steps in all), after each step."""

After = Callable[[Clips, int, int], None]
"""after(latents, steps done, steps in all), after each step."""


class Solver(Enum):
    """How the sampling ODE is stepped."""

    euler = "euler"
    """First order; one network call a step. The same numbers as ddim."""

    heun = "heun"
    """Second order; two calls a step, one on the last (Karras et al. 2022, algorithm 1)."""

    ddim = "ddim"
    """Deterministic DDIM (Song et al. 2020, equation 12 with sigma = 0)."""

    dpmpp_2m = "dpmpp_2m"
    """DPM-Solver++(2M), second-order multistep; one call a step (Lu et al. 2022, algorithm 2)."""

    unipc = "unipc"
    """UniPC by `diffusers`, multistep with a corrector; one call a step (Zhao et al. 2023)."""

    dpm_multistep = "dpm_multistep"
    """DPM-Solver++ multistep by `diffusers`, with its options; one call a step (Lu et al. 2022)."""

    table_ddim = "table_ddim"
    """DDIM by `diffusers`, with its options: how it spaces the rows of a table, and where it ends."""

    cogvideox_ddim = "cogvideox_ddim"
    """The DDIM that CogVideoX is published with, by `diffusers`."""


LIBRARY = {
    Solver.unipc: "UniPCMultistepScheduler",
    Solver.dpm_multistep: "DPMSolverMultistepScheduler",
    Solver.table_ddim: "DDIMScheduler",
    Solver.cogvideox_ddim: "CogVideoXDDIMScheduler",
}
"""Solvers that the library steps, with its own timesteps, and its class of each."""

FOR_TABLES = (Solver.table_ddim, Solver.cogvideox_ddim)
"""Those of them that step over a table of noise levels only."""


def solve(
    predict: Predict,
    noise: Clips,
    objective: Objective,
    solver: Solver,
    num_steps: int,
    *,
    shift: float | None = None,
    spacing: TimestepSpacing = TimestepSpacing.trailing,
    terminal: float | None = None,
    scheduler: Mapping[str, Any] | None = None,
    num_tokens: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Clips:
    """Unit noise, one (C, T, H, W) a clip -> latents of the same sizes, float32 (float64 from float64 noise).

    The timesteps are `objective.sampling_timesteps(num_steps, shift, num_tokens, spacing, terminal)` of each clip, or
    the library's own for its solvers, which alone read the options `scheduler`; the state is never kept in half
    precision, whatever the network computes in. ValueError as soon as a step leaves latents that are not finite.
    """
    state = [e if e.dtype is torch.float64 else e.float() for e in noise]
    sizes = per_clip(num_tokens, len(noise))

    def predict_like_state(x: Clips, t: Tensor) -> Clips:
        predictions = predict(x, objective.told(t).float().to(x[0].device))
        return [p.to(like.dtype) for p, like in zip(predictions, x, strict=True)]

    def after(x: Clips, step: int, num_steps: int) -> None:
        check_finite(x, solver, step, num_steps)
        if progress is not None:
            progress(step, num_steps)

    if solver in LIBRARY:
        check_library(objective, solver, spacing, terminal)
        schedulers = [scheduler_of(objective, solver, shift, scheduler, tokens) for tokens in sizes]
        return library_steps(predict_like_state, state, objective, schedulers, num_steps, after)
    if scheduler:
        raise ValueError(f"scheduler={dict(scheduler)}: solver={solver.value} is not of the library, and reads none.")
    grids = [objective.sampling_timesteps(num_steps, shift, tokens, spacing, terminal) for tokens in sizes]
    times = torch.stack(grids, dim=1)  # (num_steps + 1, B), float64, on the CPU: its entries are only scalars
    return STEPPERS[solver](predict_like_state, state, objective, times, after)


def visited_timesteps(
    objective: Objective,
    solver: Solver,
    num_steps: int,
    *,
    shift: float | None = None,
    spacing: TimestepSpacing = TimestepSpacing.trailing,
    terminal: float | None = None,
    scheduler: Mapping[str, Any] | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    """The timesteps (num_steps + 1,) float64 at which `solve` asks the model about one clip, and 0 behind them."""
    if solver not in LIBRARY:
        return objective.sampling_timesteps(num_steps, shift, num_tokens, spacing, terminal)
    check_library(objective, solver, spacing, terminal)
    made = scheduler_of(objective, solver, shift, scheduler, num_tokens)
    made.set_timesteps(num_steps)
    return torch.cat([as_ours(made.timesteps, objective), torch.zeros(1, dtype=torch.float64)])


def check_library(objective: Objective, solver: Solver, spacing: TimestepSpacing, terminal: float | None) -> None:
    """Refuse what a solver of the library does not read, and a path that it does not follow."""
    if spacing is not TimestepSpacing.trailing or terminal is not None:
        raise ValueError(
            f"solver={solver.value} has timesteps of its own: timestep_spacing={spacing.value} and "
            f"timestep_terminal={terminal} are for euler, heun, ddim and dpmpp_2m. Leave them out."
        )
    if solver in FOR_TABLES and not isinstance(objective, DDPM):
        raise ValueError(f"solver={solver.value} steps over a table of noise levels (objective=ddpm): type unipc.")


def scheduler_of(
    objective: Objective,
    solver: Solver,
    shift: float | None,
    options: Mapping[str, Any] | None,
    num_tokens: int | None,
) -> Any:
    """The library's scheduler of one clip."""
    shift = objective.shift_for(num_tokens) if shift is None else shift
    return make_scheduler(LIBRARY[solver], objective, shift, dict(options or {}))


def euler(predict: Predict, x: Clips, objective: Objective, times: Tensor, after: After) -> Clips:
    """Follow the slope noise - data of the straightened path."""
    for step, (t, s) in enumerate(pairwise(times), start=1):
        slope = objective.velocity(x, predict(x, t), t)
        x = straight_step(x, slope, objective, t, s)
        after(x, step, len(times) - 1)
    return x


def heun(predict: Predict, x: Clips, objective: Objective, times: Tensor, after: After) -> Clips:
    """Euler, then again with the mean of the slopes at both ends; the last step asks nothing at t = 0."""
    num_steps = len(times) - 1
    for step, (t, s) in enumerate(pairwise(times), start=1):
        slope = objective.velocity(x, predict(x, t), t)
        there = straight_step(x, slope, objective, t, s)
        if step < num_steps:
            slope_there = objective.velocity(there, predict(there, s), s)
            mean_slope = [(a + b) / 2 for a, b in zip(slope, slope_there, strict=True)]
            there = straight_step(x, mean_slope, objective, t, s)
        x = there
        after(x, step, num_steps)
    return x


def ddim(predict: Predict, x: Clips, objective: Objective, times: Tensor, after: After) -> Clips:
    """Split the state into data and noise, and mix them again at the next level."""
    for step, (t, s) in enumerate(pairwise(times), start=1):
        prediction = predict(x, t)
        data, noise = objective.to_data(x, prediction, t), objective.to_noise(x, prediction, t)
        x = objective.add_noise(data, noise, s)
        after(x, step, len(times) - 1)
    return x


def dpmpp_2m(predict: Predict, x: Clips, objective: Objective, times: Tensor, after: After) -> Clips:
    """Exponential integrator on the data prediction, extrapolated linearly in lambda = log(alpha / sigma).

    The first step has no earlier prediction and the last goes to lambda = infinity: both are first order. So
    is the second one when sampling starts at alpha = 0, lambda = -infinity.
    """
    num_steps = len(times) - 1
    data_before: Clips = []
    for step, (t, s) in enumerate(pairwise(times), start=1):
        data = objective.to_data(x, predict(x, t), t)
        direction = data
        if 1 < step < num_steps:
            h = half_log_snr(objective, s) - half_log_snr(objective, t)
            h_before = half_log_snr(objective, t) - half_log_snr(objective, times[step - 2])
            clips = zip(data, data_before, h / (2 * h_before), strict=True)
            direction = [now + share * (now - before) for now, before, share in clips]
        x = data_step(x, direction, objective, t, s)
        data_before = data
        after(x, step, num_steps)
    return x


def straight_step(x: Clips, slope: Clips, objective: Objective, t: Tensor, s: Tensor) -> Clips:
    """One Euler step from t to s (B,) along `slope` = noise - data, in the straightened variables."""
    clips = zip(objective.levels(t), objective.levels(s), x, slope, strict=True)
    moved = []
    for (alpha_t, sigma_t, *_), (alpha_s, sigma_s, *_), clip, direction in clips:
        scale_t, scale_s = alpha_t + sigma_t, alpha_s + sigma_s
        tau_t, tau_s = sigma_t / scale_t, sigma_s / scale_s
        moved.append(scale_s * (clip / scale_t + (tau_s - tau_t) * direction))
    return moved


def data_step(x: Clips, data: Clips, objective: Objective, t: Tensor, s: Tensor) -> Clips:
    """x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - e^-h) data, with e^-h written so that alpha_t may be 0."""
    clips = zip(objective.levels(t), objective.levels(s), x, data, strict=True)
    return [
        (b.sigma / a.sigma) * clip + (b.alpha - a.alpha * b.sigma / a.sigma) * estimate
        for a, b, clip, estimate in clips
    ]


def half_log_snr(objective: Objective, t: Tensor) -> Tensor:
    """lambda = log(alpha / sigma) at timesteps (B,); minus infinity where alpha = 0."""
    level = objective.noise_schedule.level(t)
    return level.alpha.log() - level.sigma.log()


def check_finite(x: Clips, solver: Solver, step: int, num_steps: int) -> None:
    """Refuse to go on from numbers that are none; ValueError says where they came up."""
    if broken := [i for i, clip in enumerate(x) if not clip.isfinite().all()]:
        raise ValueError(
            f"solver={solver.value}: the latents of clips {broken} are not finite after step {step} of {num_steps}. "
            "Type another solver or more steps; if solver=euler has them too, the model's predictions are not finite."
        )


STEPPERS = {Solver.euler: euler, Solver.heun: heun, Solver.ddim: ddim, Solver.dpmpp_2m: dpmpp_2m}

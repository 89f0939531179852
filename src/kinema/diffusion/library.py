"""Samplers of `diffusers`, an optional package, behind the same door as our own: one scheduler for each clip.

Multistep methods keep a memory of the steps before, and published models ship with one of them; the library that
defined their numbers steps here, told by the objective what the network predicts.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from kinema.diffusion.objective import DDPM, Clips, Objective, PredictionTarget
from kinema.diffusion.schedules import BetaSchedule

FLOW_TARGETS = {PredictionTarget.velocity: "flow_prediction", PredictionTarget.data: "sample"}
TABLE_TARGETS = {
    PredictionTarget.noise: "epsilon",
    PredictionTarget.velocity: "v_prediction",
    PredictionTarget.data: "sample",
}
BETAS = {
    BetaSchedule.linear: "linear",
    BetaSchedule.scaled_linear: "scaled_linear",
    BetaSchedule.cosine: "squaredcos_cap_v2",
}


def scheduler_facts(name: str, objective: Objective, shift: float) -> dict[str, Any]:
    """What a scheduler must be told of an objective, in the library's words."""
    if not isinstance(objective, DDPM):
        return {
            "prediction_type": FLOW_TARGETS[objective.prediction_target],
            "use_flow_sigmas": True,
            "flow_shift": shift,
            "num_train_timesteps": objective.num_trained,
        }
    facts = {
        "prediction_type": TABLE_TARGETS[objective.prediction_target],
        "beta_schedule": BETAS[objective.beta_schedule],
        "num_train_timesteps": objective.num_trained,
        "rescale_betas_zero_snr": objective.zero_terminal_snr,
    }
    if objective.beta_schedule is not BetaSchedule.cosine:
        facts["beta_start"], facts["beta_end"] = objective.beta_range
    if name.startswith("CogVideoX"):
        facts["snr_shift_scale"] = objective.snr_shift
    elif objective.snr_shift != 1:
        raise ValueError(f"objective.snr_shift={objective.snr_shift}: {name} knows none. Type solver=cogvideox_ddim.")
    return facts


def make_scheduler(name: str, objective: Objective, shift: float, options: dict[str, Any]) -> Any:
    """A scheduler of the library for one clip; ValueError for options that it lacks or that the objective decides."""
    if find_spec("diffusers") is None:
        raise ValueError(
            f"solver: {name} is a sampler of diffusers, which is missing: pip install 'kinema[diffusers]'."
        )
    made = getattr(import_module("diffusers"), name)
    facts = scheduler_facts(name, objective, shift)
    if wrong := {key: value for key, value in options.items() if facts.get(key, value) != value}:
        known = {key: facts[key] for key in wrong}
        raise ValueError(f"scheduler={wrong} contradicts the objective, which says {known}. Leave these out.")
    parameters = signature(made.__init__).parameters
    if unknown := sorted((options.keys() | facts.keys()) - parameters.keys()):
        raise ValueError(
            f"{name} has no {', '.join(unknown)}: it cannot follow this objective, or scheduler={options}."
        )
    ours = {key: value for key, value in OURS.items() if key in parameters}
    return made(**{**ours, **options, **facts})


OURS = {"timestep_spacing": "trailing", "clip_sample": False}
"""What we choose for tables of noise levels where nobody says otherwise: latents have no bounds."""


def as_ours(counted: Tensor, objective: Objective) -> Tensor:
    """Timesteps as the library counts them -> ours, float64; its rows of a table begin at 0, and ours at 1."""
    first_row = 1 if isinstance(objective, DDPM) else 0
    return (counted.double() + first_row) / objective.num_trained


def library_steps(
    predict: Callable[[Clips, Tensor], Clips],
    x: Clips,
    objective: Objective,
    schedulers: Sequence[Any],
    num_steps: int,
    after: Callable[[Clips, int, int], None],
) -> Clips:
    """Unit noise -> latents; the network is told the timesteps that the scheduler counts, which it may round."""
    for scheduler in schedulers:
        scheduler.set_timesteps(num_steps)
        if hasattr(scheduler, "set_begin_index"):  # of those that round timesteps, and could take one for another
            scheduler.set_begin_index(0)
    for step, counted in enumerate(zip(*(scheduler.timesteps for scheduler in schedulers), strict=True), start=1):
        predictions = predict(x, as_ours(torch.stack(counted), objective))
        clips = zip(schedulers, predictions, counted, x, strict=True)
        x = [scheduler.step(p[None], t, clip[None]).prev_sample[0] for scheduler, p, t, clip in clips]
        after(x, step, num_steps)
    return x

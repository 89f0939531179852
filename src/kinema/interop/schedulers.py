"""Published schedulers: what a `scheduler_config.json` says of the objective, and how its pipeline samples with it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from kinema.diffusion.library import BETAS, TABLE_TARGETS, scheduler_facts
from kinema.diffusion.objective import DDPM, Objective, RectifiedFlow
from kinema.diffusion.solvers import LIBRARY, Solver
from kinema.diffusion.timesteps import TRAINED_TIMESTEPS, TimestepSpacing
from kinema.interop.preset import Record
from kinema.interop.reference import with_defaults


class Scheduled(NamedTuple):
    """A published scheduler in our words."""

    objective: Objective
    sampling: dict[str, Any]
    """Fields of a `SamplingConfig`."""


def scheduled(config: Record, *, gives_sigmas: bool) -> Scheduled:
    """The content of a scheduler_config.json; `gives_sigmas`: its pipeline hands it evenly spaced timesteps itself.

    ValueError for a class, or an option of it, that nothing here follows.
    """
    name = config.get("_class_name", "")
    if name not in READERS:
        raise ValueError(f"scheduler_config.json: {name} is none of {', '.join(READERS)}.")
    whole = with_defaults(name, config)
    if whole.get("num_train_timesteps", TRAINED_TIMESTEPS) != TRAINED_TIMESTEPS:
        raise ValueError(f"scheduler_config.json: num_train_timesteps={whole['num_train_timesteps']} is not 1000.")
    return READERS[name](whole, gives_sigmas)


def flow_euler(config: Record, gives_sigmas: bool) -> Scheduled:
    """FlowMatchEulerDiscreteScheduler: our own Euler on its timesteps."""
    check_off(config, "stochastic_sampling", "invert_sigmas", *OTHER_SIGMAS)
    spacing = TimestepSpacing.trailing if gives_sigmas else TimestepSpacing.linspace
    sampling = {"solver": Solver.euler, "timestep_spacing": spacing, "timestep_terminal": config.get("shift_terminal")}
    if not config.get("use_dynamic_shifting"):
        return Scheduled(RectifiedFlow(timestep_shift=float(config.get("shift", 1.0))), sampling)
    if not gives_sigmas or config.get("time_shift_type", "exponential") != "exponential":
        raise ValueError("scheduler_config.json: use_dynamic_shifting=true is followed only as LTXPipeline has it.")
    return Scheduled(
        RectifiedFlow(
            timestep_shift=math.exp(config["base_shift"]),
            shift_base_tokens=config["base_image_seq_len"],
            shift_top=math.exp(config["max_shift"]),
            shift_top_tokens=config["max_image_seq_len"],
        ),
        sampling,
    )


def flow_multistep(config: Record, gives_sigmas: bool) -> Scheduled:
    """UniPC and DPM-Solver++ on a flow: the library's own, with the options of the release."""
    check_off(config, *OTHER_SIGMAS, "use_dynamic_shifting", "shift_terminal")
    if not config.get("use_flow_sigmas") or config.get("prediction_type") != "flow_prediction" or gives_sigmas:
        raise ValueError(
            f"scheduler_config.json: {config['_class_name']} with use_flow_sigmas={config.get('use_flow_sigmas')}, "
            f"prediction_type={config.get('prediction_type')}: only a flow on its own timesteps is followed."
        )
    return by_library(config, RectifiedFlow(timestep_shift=float(config.get("flow_shift", 1.0))))


def table(config: Record, gives_sigmas: bool) -> Scheduled:
    """DDIM on a table of noise levels: the library's own, with the options of the release."""
    check_off(config, "trained_betas", "thresholding")
    return by_library(
        config,
        DDPM(
            prediction_target=named(TABLE_TARGETS, config["prediction_type"]),
            beta_schedule=named(BETAS, config["beta_schedule"]),
            beta_start=config["beta_start"],
            beta_end=config["beta_end"],
            snr_shift=float(config.get("snr_shift_scale", 1.0)),
            zero_terminal_snr=config["rescale_betas_zero_snr"],
            rows_from_zero=True,
        ),
    )


def by_library(config: Record, objective: Objective) -> Scheduled:
    """The library's own solver, with those of its options that the objective does not decide."""
    name = config["_class_name"]
    decided = scheduler_facts(name, objective, objective.shift_for(None))
    options = {key: value for key, value in config.items() if not key.startswith("_") and key not in decided}
    solver = next(solver for solver, of in LIBRARY.items() if of == name)
    return Scheduled(objective, {"solver": solver, "scheduler": options})


def named(names: dict[Any, str], wanted: str) -> Any:
    """Our word for one of the library's."""
    if wanted not in names.values():
        raise ValueError(f"scheduler_config.json: {wanted} is none of {', '.join(names.values())}.")
    return next(ours for ours, theirs in names.items() if theirs == wanted)


OTHER_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")

READERS: dict[str, Callable[[Record, bool], Scheduled]] = {
    "FlowMatchEulerDiscreteScheduler": flow_euler,
    "UniPCMultistepScheduler": flow_multistep,
    "DPMSolverMultistepScheduler": flow_multistep,
    "DDIMScheduler": table,
    "CogVideoXDDIMScheduler": table,
}
"""Class of the reference -> how its config is read."""


def check_off(config: Record, *keys: str) -> None:
    """Refuse options that change the timesteps in a way that nothing here follows."""
    if on := {key: config[key] for key in keys if config.get(key)}:
        raise ValueError(f"scheduler_config.json: {on} of {config['_class_name']} is not followed here.")

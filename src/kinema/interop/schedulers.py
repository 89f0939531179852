"""Published schedulers: what a `scheduler_config.json` says of the objective, and how its pipeline samples with it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from kinema.diffusion.objective import Objective, RectifiedFlow
from kinema.diffusion.solvers import LIBRARY, Solver
from kinema.diffusion.timesteps import TRAINED_TIMESTEPS, TimestepSpacing
from kinema.interop.preset import Record


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
    if config.get("num_train_timesteps", TRAINED_TIMESTEPS) != TRAINED_TIMESTEPS:
        raise ValueError(f"scheduler_config.json: num_train_timesteps={config['num_train_timesteps']} is not 1000.")
    return READERS[name](config, gives_sigmas)


def flow_euler(config: Record, gives_sigmas: bool) -> Scheduled:
    """FlowMatchEulerDiscreteScheduler: our own Euler on its timesteps."""
    check_off(config, "stochastic_sampling", "invert_sigmas", *OTHER_SIGMAS, "use_dynamic_shifting", "shift_terminal")
    spacing = TimestepSpacing.trailing if gives_sigmas else TimestepSpacing.linspace
    return Scheduled(
        RectifiedFlow(timestep_shift=float(config.get("shift", 1.0))),
        {"solver": Solver.euler, "timestep_spacing": spacing},
    )


def flow_multistep(config: Record, gives_sigmas: bool) -> Scheduled:
    """UniPC and DPM-Solver++ on a flow: the library's own, with the options of the release."""
    check_off(config, *OTHER_SIGMAS, "use_dynamic_shifting", "shift_terminal")
    if not config.get("use_flow_sigmas") or config.get("prediction_type") != "flow_prediction" or gives_sigmas:
        raise ValueError(
            f"scheduler_config.json: {config['_class_name']} with use_flow_sigmas={config.get('use_flow_sigmas')}, "
            f"prediction_type={config.get('prediction_type')}: only a flow on its own timesteps is followed."
        )
    decided = ("use_flow_sigmas", "prediction_type", "flow_shift", "num_train_timesteps")
    options = {key: value for key, value in config.items() if not key.startswith("_") and key not in decided}
    solver = next(solver for solver, name in LIBRARY.items() if name == config["_class_name"])
    shift = float(config.get("flow_shift", 1.0))
    return Scheduled(RectifiedFlow(timestep_shift=shift), {"solver": solver, "scheduler": options})


OTHER_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")

READERS: dict[str, Callable[[Record, bool], Scheduled]] = {
    "FlowMatchEulerDiscreteScheduler": flow_euler,
    "UniPCMultistepScheduler": flow_multistep,
    "DPMSolverMultistepScheduler": flow_multistep,
}
"""Class of the reference -> how its config is read."""


def check_off(config: Record, *keys: str) -> None:
    """Refuse options that change the timesteps in a way that nothing here follows."""
    if on := {key: config[key] for key in keys if config.get(key)}:
        raise ValueError(f"scheduler_config.json: {on} of {config['_class_name']} is not followed here.")

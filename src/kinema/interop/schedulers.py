"""Published schedulers: what a `scheduler_config.json` says of the objective, and how its pipeline samples with it."""

import math
from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

from kinema.diffusion.library import BETAS, TABLE_TARGETS, make_scheduler, scheduler_facts
from kinema.diffusion.objective import DDPM, Objective, PredictionTarget, RectifiedFlow
from kinema.diffusion.solvers import LIBRARY, Solver
from kinema.diffusion.timesteps import TRAINED_TIMESTEPS, TimestepSpacing
from kinema.interop.preset import Record
from kinema.interop.reference import reference_class, with_defaults
from kinema.sampling.pipeline import SamplingConfig


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


def noise_table(config: Record, gives_sigmas: bool) -> Scheduled:
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


def published_scheduler(objective: Objective, sampling: SamplingConfig, *, gives_mu: bool, table: str | None) -> Any:
    """The reference's scheduler that samples as `sampling` says, or the nearest that its pipeline can have.

    `table` is the class of a pipeline that samples a table of noise levels; `gives_mu`: the pipeline tells a dynamic
    shift the clip's size. ValueError for an objective that no scheduler of this pipeline follows.
    """
    target = objective.prediction_target
    if isinstance(objective, DDPM) and table is not None and objective.rows_from_zero:
        return make_scheduler(LIBRARY.get(sampling.solver, table), objective, 1.0, sampling.scheduler)
    if not isinstance(objective, RectifiedFlow) or target is not PredictionTarget.velocity or table is not None:
        wanted = "a table whose rows count from 0 (objective.rows_from_zero=true)" if table else "velocities of a flow"
        raise ValueError(
            f"objective={type(objective).__name__}, prediction_target={target.name}: the scheduler of this pipeline "
            f"samples {wanted}. Type --part transformer."
        )
    if objective.shift_top is not None and gives_mu:
        return reference_class(FLOW_EULER)(**dynamic_shift(objective), shift_terminal=sampling.timestep_terminal)
    if objective.shift_base_tokens is not None:
        raise ValueError(
            f"objective.shift_base_tokens={objective.shift_base_tokens}: the reference's scheduler has one shift for "
            "clips of any size. Type --part transformer, and give its scheduler the shift of your clips."
        )
    shift = objective.timestep_shift if sampling.timestep_shift is None else sampling.timestep_shift
    if sampling.solver in LIBRARY:
        return make_scheduler(LIBRARY[sampling.solver], objective, shift, sampling.scheduler)
    return reference_class(FLOW_EULER)(shift=shift, shift_terminal=sampling.timestep_terminal)


def dynamic_shift(objective: RectifiedFlow) -> dict[str, Any]:
    """A shift on a line of tokens, in the library's words."""
    assert objective.shift_top is not None
    return {
        "use_dynamic_shifting": True,
        "base_shift": round(math.log(objective.timestep_shift), 12),
        "max_shift": round(math.log(objective.shift_top), 12),
        "base_image_seq_len": objective.shift_base_tokens,
        "max_image_seq_len": objective.shift_top_tokens,
    }


def by_library(config: Record, objective: Objective) -> Scheduled:
    """The library's own solver, with those of its options that the objective does not decide."""
    name = config["_class_name"]
    decided = scheduler_facts(name, objective, objective.shift_for(None))
    known = signature(reference_class(name).__init__).parameters  # of other keys the reference reads none either
    options = {key: value for key, value in config.items() if key in known and key not in decided}
    solver = next(solver for solver, of in LIBRARY.items() if of == name)
    return Scheduled(objective, {"solver": solver, "scheduler": options})


def named(names: dict[Any, str], wanted: str) -> Any:
    """Our word for one of the library's."""
    if wanted not in names.values():
        raise ValueError(f"scheduler_config.json: {wanted} is none of {', '.join(names.values())}.")
    return next(ours for ours, theirs in names.items() if theirs == wanted)


FLOW_EULER = "FlowMatchEulerDiscreteScheduler"
OTHER_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")

READERS: dict[str, Callable[[Record, bool], Scheduled]] = {
    "FlowMatchEulerDiscreteScheduler": flow_euler,
    "UniPCMultistepScheduler": flow_multistep,
    "DPMSolverMultistepScheduler": flow_multistep,
    "DDIMScheduler": noise_table,
    "CogVideoXDDIMScheduler": noise_table,
}
"""Class of the reference -> how its config is read."""


def check_off(config: Record, *keys: str) -> None:
    """Refuse options that change the timesteps in a way that nothing here follows."""
    if on := {key: config[key] for key in keys if config.get(key)}:
        raise ValueError(f"scheduler_config.json: {on} of {config['_class_name']} is not followed here.")

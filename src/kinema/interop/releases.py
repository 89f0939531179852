"""What a release says beside its weights: schedule and shift, frame rate, and the shapes that it was made for."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kinema.diffusion.objective import RectifiedFlow
from kinema.interop.reading import Record, read_json

if TYPE_CHECKING:
    from kinema.interop.recognising import Recognised


@dataclass(frozen=True)
class Release:
    """How published weights are meant to be sampled."""

    objective: RectifiedFlow = field(default_factory=RectifiedFlow)
    fps: float = 16.0
    shapes: tuple[tuple[int, int, int], ...] = ()
    guidance_dropout: float = 0.1

    @property
    def objective_schema(self) -> str:
        """The schema of its Hydra group."""
        return "schema_rectified_flow"


SHIFTS = {"wan": 3.0, "hunyuan_video": 7.0, "hunyuan_video15": 5.0, "cosmos": 5.0, "kandinsky": 5.0}


def release_of(dit: "Recognised | None", pipeline: Path | None) -> Release:
    """The release of a transformer; the pipeline's own scheduler decides where there is one."""
    shift = 1.0
    if pipeline is not None:
        shift = scheduler_shift(read_json(pipeline / "scheduler" / "scheduler_config.json"))
    return Release(RectifiedFlow(timestep_shift=shift))


def scheduler_shift(config: Record) -> float:
    """The shift of a flow-matching scheduler's config, whichever of its classes it names."""
    return float(config.get("flow_shift", config.get("shift", 1.0)))

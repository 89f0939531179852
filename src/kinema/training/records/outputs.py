"""What a run tells the world besides its checkpoints: console, metrics, tracker."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kinema.data.account.quarantine import QUARANTINE
from kinema.training.records.metrics import LineFile, MetricsFile, WandbTracker


@dataclass
class Outputs:
    """What the main rank writes besides checkpoints. Other ranks hold the same object and write nothing."""

    run_dir: Path
    is_main: bool
    tracker: WandbTracker | None
    metrics: MetricsFile = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = MetricsFile(self.run_dir)

    def write(self, record: dict[str, Any]) -> None:
        """One record to the metrics file and the tracker."""
        if self.is_main:
            self.metrics.write(record)
            if self.tracker:
                self.tracker.write(record)

    def truncate_after(self, step: int) -> None:
        """Forget what steps wrote that a resumed run will do again; clips not to be tried were read from it before."""
        for lines in (self.metrics, LineFile(self.run_dir / QUARANTINE)):
            lines.truncate_after(step)

    def event(self, step: int, event: str, detail: str) -> None:
        """Something a person should know of, on the console and in the metrics."""
        if self.is_main:
            tqdm.write(f"step {step}: {event}: {detail}")
            self.write({"kind": "event", "step": step, "event": event, "detail": detail})

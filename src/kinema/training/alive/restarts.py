"""A run that a launcher starts again and again without ever saving anything new is stopped."""

import json
import os
from pathlib import Path

from kinema.training.alive.guard import NonFiniteLoss
from kinema.training.checkpoints.store import replace_text

RESTARTS = "restarts.json"


class NoProgress(NonFiniteLoss):
    """Every start ended before the next checkpoint."""


def started_again() -> bool:
    """Whether a launcher or scheduler, and no person, made this start."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def count_restart(run_folder: Path, step: int, limit: int) -> None:
    """Note a start from the checkpoint of `step`; NoProgress after `limit` restarts by machines from the same one."""
    path, count = run_folder / RESTARTS, 0
    if started_again() and path.is_file():
        last = json.loads(path.read_text())
        count = last["restarts"] + 1 if last["step"] == step else 0
    replace_text(path, json.dumps({"step": step, "restarts": count}) + "\n")
    if count > limit:
        raise NoProgress(
            f"{limit} restarts in a row began at step {step} and ended before the next checkpoint "
            f"(signals.restarts_without_progress={limit}). The cause stands further up in the log of the first of "
            "them. Once it is mended, start the run by hand."
        )

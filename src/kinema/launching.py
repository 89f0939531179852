"""`kinema torchrun`: torchrun, whose exit status is that of the run, and which starts nothing again in vain."""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from kinema.exits import Exit

FOLDER = "KINEMA_STATUS_FOLDER"
"""Variable that names the folder where ranks leave their exit status."""
FINAL = (Exit.configuration, Exit.data, Exit.checkpoint, Exit.unsound, Exit.preempted, Exit.unsafe)
"""After these a launcher starts nothing again: it would end the same way, or was asked to stop."""
CAUSES = (Exit.hang, *FINAL, Exit.io, Exit.failed_check, Exit.unavailable)
"""Which status stands for the job when ranks ended differently: a rank that lost another one is a victim."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything goes to torchrun as it is."""
    parser.prefix_chars = "\0"
    parser.add_argument("arguments", nargs="*", help="as for torchrun: --nproc-per-node 2 train.py experiment=...")


def run(arguments: argparse.Namespace) -> int:
    """Start torchrun in this process, and end with the status of what it started."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Workers would otherwise find the addresses of dead ones in the launcher's own store after a restart.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    signal.signal(signal.SIGUSR1, _pass_on)
    with tempfile.TemporaryDirectory(prefix="kinema-status-") as folder:
        os.environ[FOLDER] = folder
        try:
            torchrun.main(arguments.arguments)
        except ChildFailedError as error:
            print(error, file=sys.stderr)
            statuses = list(last_statuses().values())
            return cause(statuses or [failure.exitcode for failure in error.failures.values()])
        except SignalException as stop:
            statuses = list(last_statuses().values())
            return Exit.preempted if statuses and set(statuses) == {Exit.preempted} else 128 + int(stop.sigval)
    return Exit.done


def _pass_on(number: int, frame: FrameType | None) -> None:
    """A warning of the scheduler is for the ranks, who know what to do; torchrun passes on only what ends them."""
    for pids in Path("/proc/self/task").glob("*/children"):
        for pid in map(int, pids.read_text().split()):
            os.kill(pid, number)


def cause(statuses: list[int]) -> int:
    """The status that stands for all: of a documented cause, or else of the signal that killed a rank, as shells do."""
    found = [status for status in CAUSES if status in statuses]
    return found[0] if found else next((128 - status for status in statuses if status < 0), 1)


def leave_status(status: int) -> None:
    """Tell `kinema torchrun`, if it started this rank, how it ends."""
    if folder := os.environ.get(FOLDER):
        Path(folder, f"{_attempt()}-{os.environ.get('RANK', '0')}").write_text(str(int(status)))


def last_statuses(before: int | None = None) -> dict[str, int]:
    """Exit status by rank, of the last attempt that left any (before the given one)."""
    found = [path for path in Path(os.environ[FOLDER]).iterdir() if before is None or _attempt_of(path) < before]
    last = max(map(_attempt_of, found), default=0)
    return {path.name: int(path.read_text()) for path in found if _attempt_of(path) == last}


def final_status() -> int | None:
    """How the attempt before this one ended, if there is nothing to be gained by another."""
    if FOLDER not in os.environ or not _attempt():
        return None
    found = cause(list(last_statuses(before=_attempt()).values()) or [1])
    return found if found in FINAL else None


def _attempt() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _attempt_of(path: Path) -> int:
    return int(path.name.split("-")[0])

"""Training that is killed without warning, again and again, with other ranks and workers at each start."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.end_to_end.commands import ROOT, environment, torchrun


class Layout(NamedTuple):
    """How a start of the run is laid out; nothing that the data may depend on."""

    ranks: int
    workers: int


def start(layout: Layout, command: list[str], log: Path) -> subprocess.Popen:
    launcher = torchrun(layout.ranks) if layout.ranks > 1 else []
    with log.open("a") as output:
        return subprocess.Popen(
            [sys.executable, *launcher, *command, f"data.num_workers={layout.workers}"],
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher, the ranks and all their children at once, as when the power fails."""
    for pid in [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def kill_one_rank(process: subprocess.Popen, layout: Layout, chance: random.Random) -> None:
    """SIGKILL to one rank; its launcher, if it has one, then ends the others."""
    under_launcher = [pid for pid in children(process.pid) if "train.py" in command_of(pid)]
    ranks = (under_launcher if layout.ranks > 1 else []) or [process.pid]
    os.kill(chance.choice(ranks), signal.SIGKILL)
    process.wait(timeout=120)


def descendants(pid: int) -> list[int]:
    found = children(pid)
    return [*found, *(below for child in found for below in descendants(child))]


def children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []  # it has ended


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def wait_until(condition, process: subprocess.Popen, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline, "the run does not move"
        time.sleep(0.01)


def killed(left):
    """Harm as the kernel does it where memory runs out: SIGKILL to as many processes as the shared number says."""

    def harm():
        with left.get_lock():
            left.value -= 1
        if left.value >= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return harm

"""Real ranks of the real scripts in a fraction of a second: a process that has imported everything forks them.

A start of `train.py` is mostly imports. Here they are done once; each rank is a fork of that process with the
arguments, environment, process group and files of its own that a shell or a launcher would give it. The process
itself only imports: nothing that a job does can reach the next. Unlike fresh interpreters, all forks order sets of
strings alike, and leave by `os._exit` once Python has done what it does at an end.
"""

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.end_to_end.commands import ROOT, environment
from tests.faults.suite.harm import Harm

STOP_SECONDS = 30.0
"""How long torchrun waits for ranks that it asked to stop before it kills them."""


@dataclass
class Job:
    """One start of a script on some ranks."""

    server: "Warm"
    pids: list[int]
    log: Path
    started: float
    statuses: dict[int, int] = field(default_factory=dict)
    """Exit status by rank, negative where a signal ended it."""
    ended: float = 0.0

    @property
    def output(self) -> str:
        """All that its ranks have said so far."""
        return self.log.read_text(errors="replace")

    def send(self, number: int, rank: int = 0) -> None:
        """A signal to one rank, not to its children."""
        os.kill(self.pids[rank], number)

    def power_cut(self) -> None:
        """SIGKILL to all ranks and their children at once."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def running(self) -> bool:
        """Whether a rank has not ended yet."""
        self.server.read_ends()
        return len(self.statuses) < len(self.pids)

    def wait(self, timeout: float = 120.0) -> list[int]:
        """What a launcher does: once a rank has failed, the others are asked to stop, and killed if they do not."""
        deadline, asked = time.monotonic() + timeout, 0.0
        while self.running():
            now = time.monotonic()
            if now > deadline:
                self.power_cut()
                raise AssertionError(f"a hang of {timeout:.0f} s:\n{self.output[-3000:]}")
            if any(self.statuses.values()):
                self._stop_others(asked, now)
                asked = asked or now
            time.sleep(0.01)
        self.ended = time.monotonic()
        return [self.statuses[rank] for rank in range(len(self.pids))]

    def wait_for(self, condition: Any, timeout: float = 60.0) -> None:
        """Until something is so, or all ranks have ended."""
        deadline = time.monotonic() + timeout
        while self.running() and not condition():
            assert time.monotonic() < deadline, f"the run does not move:\n{self.output[-3000:]}"
            time.sleep(0.005)

    def _stop_others(self, asked: float, now: float) -> None:
        for rank, pid in enumerate(self.pids):
            if rank in self.statuses:
                continue
            with contextlib.suppress(ProcessLookupError):  # it has ended, and is about to be told so
                if not asked:
                    os.kill(pid, signal.SIGTERM)
                elif now - asked > STOP_SECONDS:
                    os.kill(pid, signal.SIGKILL)


class Warm:
    """The client of one warm process, which ends with this one and takes all that it started with it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"], cwd=ROOT, env=_as_users_have_it(), bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._running: list[Job] = []
        self._answer()

    def start(self, command: list[str], log: Path, ranks: int = 1, errors: Path | None = None, **extra: str) -> Job:
        """Start a script (its path, or `-m` and a module, and arguments) on this many ranks, with more variables.

        Their stderr goes to the log too, unless it has a file of its own.
        """
        assert self._process.stdin is not None
        order = {"command": command, "ranks": ranks, "log": str(log), "errors": str(errors or log),
                 "environment": _as_users_have_it(), "extra": extra}  # fmt: skip
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        job = Job(self, [], log, time.monotonic())
        while not job.pids:
            job.pids = self._take(self._answer()) or []
        self._running.append(job)
        return job

    def read_ends(self) -> None:
        """Take note of ranks that have ended."""
        assert self._process.stdout is not None
        while select.select([self._process.stdout], [], [], 0)[0]:
            self._take(self._answer())

    def _take(self, answer: dict[str, Any]) -> list[int] | None:
        for job in self._running:
            if answer.get("pid") in job.pids:
                job.statuses[job.pids.index(answer["pid"])] = answer["status"]
        self._running = [job for job in self._running if len(job.statuses) < len(job.pids)]
        return answer.get("pids")

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()  # without a buffer, of whose lines `select` would know nothing
        assert line, "the warm process has died"
        return json.loads(line)


def _as_users_have_it() -> dict[str, str]:
    """Without the tracebacks that the other tests ask for."""
    return {name: value for name, value in environment().items() if name != "KINEMA_TRACEBACK"}


@cache
def warm_process() -> Warm:
    """The one of this process, made when it is first asked for."""
    return Warm()


def serve() -> None:
    """Import everything, then fork ranks as lines on stdin order it, and tell how they end."""
    imported = _import_everything()
    print("{}", flush=True)
    groups: set[int] = set()
    while True:
        if select.select([sys.stdin], [], [], 0.01)[0]:
            line = sys.stdin.readline()
            if not line:
                break
            pids = _fork_ranks(json.loads(line), imported)
            groups |= set(pids)
            print(json.dumps({"pids": pids}), flush=True)
        with contextlib.suppress(ChildProcessError):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                groups -= set() if _reaches(pid, 0) else {pid}  # it may leave processes behind
                print(json.dumps({"pid": pid, "status": os.waitstatus_to_exitcode(status)}), flush=True)
    for pid in groups:
        _reaches(pid, signal.SIGKILL)


def _reaches(group: int, number: int) -> bool:
    """Send a signal to a process group; whether it has anybody."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _import_everything() -> dict[str, str]:
    """The variables that imports have set."""
    before = dict(os.environ)
    import tests.imported  # noqa: F401
    from kinema.distributed.process import load_cpu_communication_op

    found = {name: value for name, value in os.environ.items() if before.get(name) != value}
    with contextlib.redirect_stdout(sys.stderr):
        load_cpu_communication_op()
    return {name: value for name, value in found.items() if name != "DS_ACCELERATOR"}


def _fork_ranks(order: dict[str, Any], imported: dict[str, str]) -> list[int]:
    from kinema.distributed.process import free_port

    ranks, port = order["ranks"], str(free_port())
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}
    Path(order["log"]).touch()
    pids = []
    for rank in range(ranks):
        if (pid := os.fork()) == 0:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            _be_rank(order, {**imported, **order["environment"], **shared, **own, **order["extra"]})
        pids.append(pid)
    return pids


def _be_rank(order: dict[str, Any], variables: dict[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    _draw_anew()
    _take_files(order["log"], order["errors"])
    try:
        if harm := variables.get("KINEMA_TEST_HARM"):
            Harm(**json.loads(harm)).apply(int(variables.get("RANK", 0)))
        _execute(order["command"])
        status = 0
    except SystemExit as request:
        status = request.code if isinstance(request.code, int) else int(request.code is not None)
        if isinstance(request.code, str):
            print(request.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # waits for threads, as the interpreter does at its end
    atexit._run_exitfuncs()  # or the loader's worker processes would outlive it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _draw_anew() -> None:
    """Generators that nobody seeds draw something else in every process; Python's own looks after itself."""
    import numpy
    import torch

    torch.seed()
    numpy.random.seed()


def _take_files(log: str, errors: str) -> None:
    for number, path in ((1, log), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)


def _execute(command: list[str]) -> None:
    """As `python train.py ...` or `python -m kinema.cli ...`, from the repository's root."""
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")


if __name__ == "__main__":
    serve()

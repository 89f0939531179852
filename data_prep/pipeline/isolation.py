"""Rows worked on in a process of their own: a decoder that crashes or hangs there harms nobody else."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection

from data_prep.pipeline.journal import Result
from data_prep.pipeline.rows import Dropped, Row, RowFailed, members, row_digest
from data_prep.pipeline.stage import Place, Stage

START_SECONDS = 600.0
"""A stage may have a model to load."""


def work_on(stage: Stage, row: Row, place: Place) -> Result:
    """Apply a stage to one row, here and now. What goes wrong with the row becomes its result."""
    try:
        outcomes = list(stage.apply(row, place))
    except Exception as error:
        return failure(row, str(error) if isinstance(error, RowFailed) else _told(error))
    kept = [outcome for outcome in outcomes if not isinstance(outcome, Dropped)]
    dropped = [{"reason": outcome.reason, **outcome.row} for outcome in outcomes if isinstance(outcome, Dropped)]
    return {"input": row_digest(row), "members": len(members(row)), "rows": kept, "dropped": dropped}


def failure(row: Row, reason: str) -> Result:
    """The result of a row that could not be worked on."""
    path = members(row)[0].get("path", "")
    return {"input": row_digest(row), "members": len(members(row)), "failed": reason, "key": row["key"], "path": path}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class StageNotStarted(ValueError):
    """A stage's `start` failed in its process; the message is the cause."""


class IsolatedStage:
    """A stage in a process of its own, replaced whenever a row kills it or takes too long.

    A row that kills the process is tried `attempts` times, since the machine may be at fault; one that takes too
    long is not. Either way its result says so.
    """

    def __init__(
        self, attempts: int, max_memory_gib: float | None, stage: Stage | None = None, place: Place | None = None
    ) -> None:
        self.attempts, self.max_memory_gib, self.stage, self.place = attempts, max_memory_gib, stage, place
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection | None = None
        self.stopped = False

    def prepare(self, stage: Stage, place: Place) -> None:
        """Take up another stage, in a new process; raises StageNotStarted."""
        self.kill()
        self.stage, self.place = stage, place
        self.start()

    def run(self, row: Row, timeout_seconds: float) -> Result:
        """The result of one row, in at most `timeout_seconds` and the time to start; raises StageNotStarted."""
        for _ in range(self.attempts):
            if self.connection is None:
                self.start()
            assert self.connection is not None
            try:
                self.connection.send(row)
                if not self.connection.poll(timeout_seconds):
                    self.kill()
                    return failure(row, f"took too long: over {timeout_seconds:.0f} s")
                return self.connection.recv()
            except (EOFError, OSError):
                ended = self.bury()
                if self.stopped:
                    break
        return failure(row, f"killed its process: {ended}, {self.attempts} times")

    def start(self) -> None:
        """Start the process and its stage."""
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "data_prep.pipeline.isolation", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self.connection = Connection(ours.detach())
        try:
            self.connection.send((self.stage, self.place, self.max_memory_gib))
            problem = self.connection.recv() if self.connection.poll(START_SECONDS) else "took too long to start"
        except (EOFError, OSError):
            problem = f"its process ended: {self.bury()}"
        if problem:
            self.kill()
            raise StageNotStarted(problem)

    def bury(self) -> str:
        """After the process has gone away by itself: how it ended."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=2)
        return self.kill()

    def kill(self) -> str:
        """End the process, if it still runs; returns how it ended."""
        process, connection, self.process, self.connection = self.process, self.connection, None, None
        if connection is not None:
            connection.close()
        if process is None:
            return "stopped"
        process.kill()
        code = process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def stop(self) -> None:
        """From another thread: have `run` come back at once, and work on nothing more."""
        self.stopped = True
        if (process := self.process) is not None:
            process.kill()


def serve(connection: Connection) -> None:
    """The other side: start the stage that arrives first, then work on row after row until nobody asks."""
    _end_with_parent()
    stage, place, max_memory_gib = connection.recv()
    if max_memory_gib is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (round(max_memory_gib * 2**30),) * 2)
    try:
        stage.start()
    except Exception as error:
        connection.send(str(error) if isinstance(error, ValueError) else _told(error))
        return
    connection.send("")
    while True:
        connection.send(work_on(stage, connection.recv(), place))


def _end_with_parent() -> None:
    """Have the system kill this process when its parent dies: a hanging decoder would outlive it."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    try:
        serve(Connection(int(sys.argv[1])))
    except (EOFError, OSError):
        pass  # nobody asks any more
    except KeyboardInterrupt:
        sys.exit(130)

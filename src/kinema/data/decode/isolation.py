"""A function in a process of its own: whatever it does, its caller goes on."""

import contextlib
import faulthandler
import math
import os
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

OWN_DEADLINE = 2.0
"""A process whose caller died ends itself after so many times the deadline, even inside a library's code."""
_forking = threading.Lock()


class CallDied(Exception):
    """A call killed its process, or was killed because it took too long; the message says which."""


class CallKilled(CallDied):
    """The process of a call got a SIGKILL that its caller did not send, as the kernel sends where memory runs out."""


class Isolated:
    """Calls a function in a forked process, which is killed from outside when a call takes too long.

    The process is forked at the first call and serves many; one that died or was killed is replaced by the next
    call. Arguments and results travel through a pipe, so they should be small or bytes. Its memory may grow by
    `max_memory_mib` beyond what its caller has at the fork; above it allocations fail. After `max_calls` it is
    replaced, which bounds what the libraries in it leak.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        timeout_seconds: float,
        max_memory_mib: float,
        max_calls: float = math.inf,
    ) -> None:
        self.function, self.timeout_seconds, self.max_memory_mib = function, timeout_seconds, max_memory_mib
        self.max_calls, self._calls = max_calls, 0
        self._pid = self._owner = 0
        self._pipe: Connection | None = None

    def __call__(self, *arguments: Any) -> Any:
        """The function's result; raises what it raised, or CallDied."""
        if self._calls >= self.max_calls:
            self.close()
        pipe = self._started()
        self._calls += 1
        try:
            pipe.send(arguments)
            if not pipe.poll(self.timeout_seconds):
                self.close()
                raise CallDied(f"takes over {self.timeout_seconds:g} s")
            succeeded, result = pipe.recv()
        except (EOFError, ConnectionError):
            code = self.close()
            kind = CallKilled if code == -signal.SIGKILL else CallDied
            raise kind(f"killed the process (exit code {code})") from None
        if not succeeded:
            raise result
        return result

    def close(self) -> int | None:
        """Kill the process, if there is one; returns the exit code that it had before, None if it had none."""
        pipe, self._pipe = self._pipe, None
        if pipe is None:
            return None
        pipe.close()
        if self._owner != os.getpid():  # a fork of the owner has no say
            return None
        return _end(self._pid)

    def __del__(self) -> None:
        if hasattr(self, "_pipe"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pipe": None, "_pid": 0}

    def _started(self) -> Connection:
        if self._pipe is not None and self._owner == os.getpid():
            return self._pipe
        with _forking:  # so that no other fork gets the child's end, whose closing tells of the child's death
            self._calls = 0
            self._pipe, theirs = Pipe()
            self._owner, self._pid = os.getpid(), os.fork()
            if self._pid == 0:
                self._serve(theirs)
            theirs.close()
        return self._pipe

    def _serve(self, pipe: Connection) -> None:
        """The life of the forked process; never returns."""
        try:
            if self._pipe is not None:
                self._pipe.close()
            self._prepare()
            while True:
                arguments = pipe.recv()
                signal.setitimer(signal.ITIMER_REAL, OWN_DEADLINE * self.timeout_seconds)
                pipe.send(self._answer(arguments))
                signal.setitimer(signal.ITIMER_REAL, 0)
        except (EOFError, ConnectionError):
            os._exit(0)  # the caller is gone
        finally:
            os._exit(1)

    def _prepare(self) -> None:
        faulthandler.disable()  # a crash here is an expected event, told in one line
        # A scheduler that stops a run signals all its processes; this one ends with its caller, and accuses no clip.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        for number in (signal.SIGALRM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit = _address_space() + int(self.max_memory_mib * 2**20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.set_num_threads(1)

    def _answer(self, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
        try:
            return True, self.function(*arguments)
        except Exception as error:
            error.add_note(traceback.format_exc())
            return False, _as_sendable(error)


def _as_sendable(error: Exception) -> Exception:
    try:
        ForkingPickler.dumps(error)
    except Exception:  # whatever an exception of some library may hold
        return RuntimeError("".join(error.__notes__))
    return error


def _end(pid: int) -> int | None:
    """Kill a child and wait for it; returns the exit code it had before, None if it had none."""
    for _ in range(20):  # let one that died tell its own exit code
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _address_space() -> int:
    """Bytes of address space of this process."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")

"""Harm done to a real rank from inside, at an exact moment, without a line in the product that knows of it."""

import ctypes
import errno
import functools
import importlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FOR_EVER = 10_000


@dataclass(frozen=True)
class Harm:
    """At the `nth` call of a function on one rank, something happens."""

    where: str
    """`module:Class.method` or `module:function`."""
    what: str
    """A name of `DEEDS`."""
    nth: int = 1
    """The first call that is harmed, counted from 1."""
    times: int = 1
    """How many calls in a row."""
    rank: int = 0
    """On which rank; -1 is every one."""
    after: int = 0
    """Calls are counted once this many micro-steps are done: two a step on one rank, one on each of two."""

    def apply(self, rank: int) -> None:
        """Replace the function in this process."""
        if self.rank not in (rank, -1):
            return
        if self.after:
            _replace("kinema.distributed.engine:Engine.step", _counted)
        _replace(self.where, self._harmed)

    def _harmed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        calls = 0

        @functools.wraps(function)
        def harmed(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += len(_micro_steps) >= self.after
            if self.nth <= calls < self.nth + self.times:
                arguments = DEEDS[self.what](arguments) or arguments
            return function(*arguments, **named)

        return harmed


_micro_steps: list[None] = []
"""One for each that is done."""


def _counted(step: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*arguments: Any) -> Any:
        step(*arguments)
        _micro_steps.append(None)

    return counted


def _replace(where: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module, _, name = where.partition(":")
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, last, wrap(getattr(owner, last)))


Deed = Callable[[tuple[Any, ...]], tuple[Any, ...] | None]
"""Gets a call's arguments; may give others."""


def _signal(number: int) -> Deed:
    def send(arguments: tuple[Any, ...]) -> None:
        os.kill(os.getpid(), number)

    return send


def _signals_twice(arguments: tuple[Any, ...]) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


def _os_error(number: int) -> Deed:
    def fail(arguments: tuple[Any, ...]) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def _bug(arguments: tuple[Any, ...]) -> None:
    raise RuntimeError("a bug on purpose")


def _out_of_memory(arguments: tuple[Any, ...]) -> None:
    raise MemoryError("cannot allocate 80 GiB")


def _times(factor: float) -> Deed:
    """The last argument, a loss, becomes this many times itself."""

    def scale(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*arguments[:-1], arguments[-1] * factor)

    return scale


def _sleep(seconds: float) -> Deed:
    def sleep(arguments: tuple[Any, ...]) -> None:
        time.sleep(seconds)

    return sleep


def _hold_the_interpreter(arguments: tuple[Any, ...]) -> None:
    library = ctypes.PyDLL(None)  # unlike CDLL it keeps Python's lock: no other thread of this rank runs
    mutex = ctypes.create_string_buffer(64)  # zeros are an open one; a second locking waits for ever, signals or not
    for _ in range(2):
        library.pthread_mutex_lock(mutex)


def _compile(arguments: tuple[Any, ...]) -> None:
    import torch

    def newcomer(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    torch.compile(newcomer, backend="eager")(torch.ones(2))


DEEDS: dict[str, Deed] = {
    "kill": _signal(signal.SIGKILL),
    "segfault": _signal(signal.SIGSEGV),
    "freeze": _signal(signal.SIGSTOP),
    "term": _signal(signal.SIGTERM),
    "term twice": _signals_twice,
    "interrupt": _signal(signal.SIGINT),
    "hang up": _signal(signal.SIGHUP),
    "usr1": _signal(signal.SIGUSR1),
    "bug": _bug,
    "out of memory": _out_of_memory,
    "sleep": _sleep(FOR_EVER),
    "slow": _sleep(0.4),
    "compile": _compile,
    "hold the interpreter": _hold_the_interpreter,
    "disk full": _os_error(errno.ENOSPC),
    "input output error": _os_error(errno.EIO),
    "stale handle": _os_error(errno.ESTALE),
    "not a number": _times(float("nan")),
    "infinite": _times(float("inf")),
    "huge": _times(1e4),
}

"""A lock among the processes of one machine."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def locked(path: Path) -> Iterator[TextIO]:
    """Hold the lock of a file, which is made if need be, and read or write it meanwhile.

    A process that dies lets go. The unlocking is explicit: a process that another thread forked meanwhile has the file
    open, too, and closing it here would leave the lock with that one.
    """
    with open(path, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield file
            file.flush()
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)

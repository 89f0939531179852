"""What a rank shows of itself to processes beside it: where it is, since when, and until when it should have moved on.

A small mapped file, written without a system call, so that it costs nothing and survives whatever the rank does.
Only the standard library is used here: the watcher, which reads it, must start in no time.
"""

import mmap
import os
import struct
from pathlib import Path
from typing import NamedTuple

LAYOUT = struct.Struct("=qddqq32s")
ORDER = struct.Struct("=q")
"""After the beat, and written by the watcher alone."""


class Beat(NamedTuple):
    """One reading."""

    pid: int
    since: float
    """When the phase began, by the monotonic clock that all processes of a machine share."""
    deadline: float
    """When the phase is to be over."""
    step: int
    entries: int
    """Phases that began in this step: the rank with the fewest is the one that the others wait for."""
    phase: str


class Heartbeat:
    """The mapped file of one rank."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(handle, LAYOUT.size + ORDER.size)
            self._memory = mmap.mmap(handle, LAYOUT.size + ORDER.size)
        finally:
            os.close(handle)
        self.path = path

    def write(self, beat: Beat) -> None:
        """Show this."""
        numbers = beat.pid, beat.since, beat.deadline, beat.step, beat.entries
        LAYOUT.pack_into(self._memory, 0, *numbers, beat.phase.encode()[:32])

    def read(self) -> Beat:
        """What is shown now."""
        pid, since, deadline, step, entries, phase = LAYOUT.unpack_from(self._memory, 0)
        return Beat(pid, since, deadline, step, entries, phase.rstrip(b"\0").decode())

    def order_end(self) -> None:
        """Ask the rank to end itself with the status of a hang."""
        ORDER.pack_into(self._memory, LAYOUT.size, 1)

    def is_ordered_to_end(self) -> bool:
        """Whether the rank was asked to."""
        return bool(ORDER.unpack_from(self._memory, LAYOUT.size)[0])

"""A run that does not move is ended, with the name of the rank that it waits for and where that rank is."""

import faulthandler
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from kinema.distributed.collectives import from_main
from kinema.exits import Exit
from kinema.launching import leave_status
from kinema.training.alive.heartbeat import Beat, Heartbeat
from kinema.training.alive.watcher import POLL_SECONDS, STACKS, leave

PHASES = ("data", "sums", "encode", "forward", "backward", "discriminator", "optimizer", "checkpoint", "validate",
          "sample", "between")  # fmt: skip
"""Where a rank can be; in `sums` it waits for all others, and `between` is everything that has no name of its own."""

HANGS = "hangs"
"""Folder of a run that several machines share; absent while there was no hang."""


@dataclass
class WatchdogConfig:
    """How long a rank may stay in one phase of a step."""

    enabled: bool = True
    """Watch every rank from a process beside it."""
    floor_seconds: float = 600.0
    """No phase is taken for a hang before this."""
    factor: float = 10.0
    """Nor before so many times, at least 1, the longest that it has ever taken."""
    first_seconds: float = 3600.0
    """Nor, the first time, before this: compilers and caches start then."""
    limit_seconds: dict[str, float] = field(default_factory=dict)
    """Limits of your own by phase, for example {data: 120}; they replace the three above."""
    straggler_ratio: float = 2.0
    """Name a rank whose data, encode or forward takes so many times the others' (8 of 10 steps); 0 names none."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.limit_seconds) - set(PHASES)):
            raise ValueError(f"watchdog.limit_seconds has {unknown[0]}; a phase is one of {', '.join(PHASES)}.")
        if self.straggler_ratio and self.straggler_ratio <= 1:
            raise ValueError(f"watchdog.straggler_ratio={self.straggler_ratio} must be above 1, or 0 to name no rank.")
        for name in ("floor_seconds", "factor", "first_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"watchdog.{name}={getattr(self, name)} must be positive.")
        if self.factor < 1:
            raise ValueError(f"watchdog.factor={self.factor} must be at least 1: a phase may take what it has taken.")

    def limit(self, phase: str, longest: float | None) -> float:
        """Seconds that a phase may take whose longest so far was this (None: it has never been)."""
        if phase in self.limit_seconds:
            return self.limit_seconds[phase]
        floor = self.floor_seconds if longest is not None else max(self.first_seconds, self.floor_seconds)
        return max(floor, self.factor * (longest or 0.0))


class Watchdog:
    """Shows where this rank is, and starts the process that looks at it. Does nothing before `start`."""

    def __init__(self, config: WatchdogConfig, rank: int, ranks: int, run_dir: Path) -> None:
        """`ranks` are those of all machines, which tell one another of a hang in `run_dir`."""
        self.config = config
        self.rank, self.ranks, self.run_dir = rank, ranks, run_dir
        self._longest: dict[str, float] = {}
        self._beat = Beat(os.getpid(), 0.0, 0.0, 0, 0, "between")
        self._shown: Heartbeat | None = None
        self._watcher: subprocess.Popen | None = None

    def start(self) -> None:
        """Begin to be watched; a collective."""
        token = from_main(secrets.token_hex(8))
        if not self.config.enabled:
            return
        folder = Path(tempfile.gettempdir()) / f"kinema-heartbeats-{token}"
        self._shown = Heartbeat(folder / f"rank-{self.rank}")
        self._show("between", time.monotonic())
        faulthandler.register(STACKS, file=2, all_threads=True)  # answers even while Python's lock is held
        told = [os.getpid(), self.rank, self.ranks, folder, self.run_dir.resolve() / HANGS / token]
        command = [sys.executable, "-m", "kinema.training.alive.watcher", *map(str, told)]
        self._watcher = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        threading.Thread(target=self._obey, daemon=True).start()

    def begin_step(self, step: int) -> None:
        """Another step begins."""
        self._beat = self._beat._replace(step=step, entries=0)

    def enter(self, phase: str) -> None:
        """A phase begins, and the one before it is over."""
        now = time.monotonic()
        before = self._beat
        if before.since:
            self._longest[before.phase] = max(self._longest.get(before.phase, 0.0), now - before.since)
        if self._shown:
            self._show(phase, now)

    def stop(self) -> None:
        """Be watched no longer."""
        shown, self._shown = self._shown, None
        if self._watcher and shown:
            self._watcher.kill()
            self._watcher.wait()
            leave(shown.path)

    def _show(self, phase: str, now: float) -> None:
        assert self._shown is not None
        deadline = now + self.config.limit(phase, self._longest.get(phase))
        entries = self._beat.entries + 1
        self._beat = self._beat._replace(since=now, deadline=deadline, entries=entries, phase=phase)
        self._shown.write(self._beat)

    def _obey(self) -> None:
        while (shown := self._shown) is not None:
            if shown.is_ordered_to_end():
                leave_status(Exit.hang)
                os._exit(Exit.hang)
            time.sleep(POLL_SECONDS)

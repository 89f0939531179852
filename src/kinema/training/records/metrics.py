"""What a run tells: a plain metrics file, always, and Weights & Biases beside it, which can never stop it."""

import enum
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinema.training.checkpoints.store import replace_text


class WandbMode(enum.Enum):
    """Where Weights & Biases records go."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class LoggingConfig:
    """Metrics file, console and Weights & Biases."""

    every_steps: int = 10
    """Steps between lines of `metrics.jsonl`; each holds the mean over those steps."""
    wandb: WandbMode = WandbMode.auto
    """auto: online when logged in, else offline (`wandb sync` uploads later); disabled: not at all."""
    keys: bool = False
    """Write the clips of every step and lane to `keys/` in the run folder: some 100 bytes a clip."""
    project: str = "kinema"
    """Weights & Biases project."""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"logging.every_steps={self.every_steps} must be at least 1.")


class LineFile:
    """One JSON object a line, each with its `step`, flushed at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def truncate_after(self, step: int) -> None:
        """Forget lines of steps that a resumed run will do again, and a half-written last line."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["step"] <= step:
                kept.append(line)
        replace_text(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        with self.path.open("a") as handle:
            handle.write(json.dumps(record) + "\n")


class MetricsFile(LineFile):
    """`metrics.jsonl` of a run folder; see docs/checkpoints.md."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir / "metrics.jsonl")


class WandbTracker:
    """Sends records to Weights & Biases through a process of its own; what it cannot take is dropped and counted."""

    def __init__(self, config: LoggingConfig, run_dir: Path, resolved: dict[str, Any]) -> None:
        self.dropped = 0
        self.problem: str | None = None
        self._records: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=1000)
        self._process: subprocess.Popen[str] | None = None
        if config.wandb is WandbMode.disabled:
            return
        order = {"project": config.project, "name": run_dir.name, "id": run_dir.name, "resume": "allow",
                 "dir": str(run_dir), "config": resolved, "mode": _mode(config.wandb)}  # fmt: skip
        # A session of its own: Weights & Biases starts further processes, and all of them end together.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kinema.training.records.wandb_process"], text=True, start_new_session=True,
            env={"WANDB_SILENT": "true", **os.environ},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._feed, args=(self._process, order), daemon=True)
        self._thread.start()

    def write(self, record: dict[str, Any]) -> None:
        """Queue one record; never waits."""
        if self._process:
            self._put(record)

    def close(self, timeout_seconds: float) -> None:
        """Give the process a last chance to send what is left, then end it."""
        if not self._process:
            return
        self._put(None)
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.problem = f"Weights & Biases has not taken everything in the last {timeout_seconds:g} s"
            self.dropped += self._records.qsize()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._thread.join(1)
        assert self._process.stdout is not None
        self.problem = self._process.stdout.readline().strip() or self.problem
        self._process = None

    def _put(self, record: dict[str, Any] | None) -> None:
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def _feed(self, process: subprocess.Popen[str], order: dict[str, Any]) -> None:
        """Lines to the process, by a thread, since a process that waits for a server reads none."""
        assert process.stdin is not None
        with suppress(OSError), process.stdin as lines:
            lines.write(json.dumps(order) + "\n")
            lines.flush()
            while (record := self._records.get()) is not None:
                lines.write(json.dumps({"step": record["step"], "values": _scalars(record)}) + "\n")
                lines.flush()
            lines.write("null\n")  # the end: data workers hold this pipe open, too


def _mode(wanted: WandbMode) -> str:
    if wanted is not WandbMode.auto:
        return wanted.value
    return os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")


def _logged_in() -> bool:
    netrc = Path.home() / ".netrc"
    return bool(os.environ.get("WANDB_API_KEY")) or (netrc.exists() and "wandb" in netrc.read_text())


def _scalars(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a record under slash-separated names, for example `train/seconds/data`."""
    prefix = prefix or f"{record['kind']}/"
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            flat[f"{prefix}{name}"] = value
    return flat


class Clock:
    """Seconds by phase since the last reading; what no phase covers is `other`."""

    def __init__(self, tell: Callable[[str], object] = lambda phase: None) -> None:
        """`tell` hears each phase as it begins, and `between` when it is over."""
        self._tell = tell
        self._phases: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's time to `name`."""
        self._tell(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._tell("between")
            self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - started

    def spent(self, *names: str) -> float:
        """Seconds of these phases together since the last reading."""
        return sum(self._phases.get(name, 0.0) for name in names)

    def read(self, steps: int) -> dict[str, float]:
        """Mean seconds a step by phase; starts over."""
        total = time.perf_counter() - self._started
        phases = {**self._phases, "other": max(0.0, total - sum(self._phases.values()))}
        self.__init__(self._tell)  # type: ignore[misc]
        return {name: seconds / steps for name, seconds in phases.items()}

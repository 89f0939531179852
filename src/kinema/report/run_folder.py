"""Reads a run folder as it is: whole, interrupted, or killed in the middle of a line."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

Record = dict[str, Any]
Series = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps and values, both (n,); the values are finite."""


@dataclass
class RunRecord:
    """Everything that a run folder says; what it lacks is None or an empty list."""

    folder: Path
    info: Record = field(default_factory=dict)
    """run.json."""
    config_text: str | None = None
    """config.yaml, the resolved configuration, word for word."""
    config: Record = field(default_factory=dict)
    train: list[Record] = field(default_factory=list)
    validation: list[Record] = field(default_factory=list)
    samples: list[Record] = field(default_factory=list)
    reconstructions: list[Record] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    ledger: Record | None = None
    quarantine: list[Record] | None = None
    timesteps: Record | None = None
    captions: Record | None = None
    """evaluation/captions.json, of the last `kinema evaluate`."""
    notes: list[str] = field(default_factory=list)
    """What was odd about the files, in words for the reader of the page."""

    @property
    def name(self) -> str:
        """The run's name; the folder's where run.json gives none."""
        return str(self.info.get("name") or self.folder.resolve().name)

    @property
    def task(self) -> str:
        """`dit` or `vae`; empty when run.json does not say."""
        return str(self.info.get("task") or "")

    @property
    def experiment(self) -> str:
        """The experiment that was asked for, by which the reference band is found; else the run's name."""
        found = re.search(r"(?:^|\s)\+?experiment=([\w./-]+)", str(self.info.get("command", "")))
        return found[1] if found else self.name

    @property
    def planned_steps(self) -> int | None:
        """The number of steps the configuration asked for."""
        steps = self.config.get("steps", self.info.get("steps"))
        return int(steps) if isinstance(steps, int | float) else None

    @property
    def last_step(self) -> int:
        """The last step that left a train record; 0 when none did."""
        return int(self.train[-1]["step"]) if self.train else 0


def read_run(folder: Path) -> RunRecord:
    """Reads all of a run folder that is there.

    Errors: ValueError when the folder does not exist or holds neither run.json nor metrics.jsonl.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"run={folder} is not a folder; give the run's folder, for example runs/demo.")
    if not (folder / "run.json").exists() and not (folder / "metrics.jsonl").exists():
        raise ValueError(
            f"run={folder} is no run folder: it has neither run.json nor metrics.jsonl. "
            "Give the folder that train.py printed as its run folder."
        )
    run = RunRecord(folder)
    run.info = _read_json(folder / "run.json", run.notes) or {}
    run.ledger = _read_json(folder / "ledger.json", run.notes)
    run.timesteps = _read_json(folder / "timesteps.json", run.notes)
    run.captions = _read_json(folder / "evaluation" / "captions.json", run.notes)
    if (folder / "config.yaml").exists():
        run.config_text = (folder / "config.yaml").read_text(encoding="utf-8")
        run.config = _parse_config(run.config_text, run.notes)
    if (folder / "quarantine.jsonl").exists():
        run.quarantine = read_lines(folder / "quarantine.jsonl", run.notes)
    elif run.ledger is not None:
        run.quarantine = []  # the file begins with the first clip that fails
    if (folder / "metrics.jsonl").exists():
        _sort_metrics(run, read_lines(folder / "metrics.jsonl", run.notes))
    return run


def read_lines(path: Path, notes: list[str]) -> list[Record]:
    """The JSON objects of a .jsonl file. Lines that do not parse are left out and told in `notes`.

    A killed run leaves half a line at the end; resuming it turns that into a spoilt line in the middle.
    """
    records, bad = [], []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            bad.append(number)
    if bad == [len(lines)]:
        notes.append(f"The last line of {path.name} (line {bad[0]}) is cut off: the run was killed while writing it.")
    elif bad:
        where = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        notes.append(f"{len(bad)} line(s) of {path.name} cannot be read and are left out (line {where}).")
    return records


def series(records: Iterable[Record], *keys: str) -> Series:
    """One number of each record against its step: `series(run.train, "seconds", "data")`.

    Records that lack the number, or hold null, NaN or infinity there, are left out.
    """
    steps, values = [], []
    for record in records:
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int | float) and np.isfinite(value):
            steps.append(record["step"])
            values.append(value)
    return np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)


def keys_of(records: Iterable[Record], key: str) -> list[str]:
    """The names inside the dictionaries `record[key]`, in order of first appearance."""
    names: dict[str, None] = {}
    for record in records:
        if isinstance(record.get(key), dict):
            names.update(dict.fromkeys(record[key]))
    return list(names)


def _sort_metrics(run: RunRecord, records: list[Record]) -> None:
    """Deals the lines of metrics.jsonl to their kinds; of a step that was run twice the last one counts."""
    kinds = {"train": run.train, "validation": run.validation, "sample": run.samples}
    kinds |= {"reconstruction": run.reconstructions, "event": run.events}
    unknown = 0
    for record in records:
        kind = kinds.get(str(record.get("kind")))
        if kind is None or not isinstance(record.get("step"), int):
            unknown += 1
        else:
            kind.append(record)
    if unknown:
        run.notes.append(f"{unknown} line(s) of metrics.jsonl have no known kind or no step and are left out.")

    repeated = len(run.train) - len({record["step"] for record in run.train})
    if repeated:
        run.notes.append(f"{repeated} step(s) were run twice, after a resume; the page shows the last time.")
    run.train = _last_of_each(run.train, "step")
    run.validation = _last_of_each(run.validation, "step", "weights")
    run.samples = _last_of_each(run.samples, "step", "weights")
    run.reconstructions = _last_of_each(run.reconstructions, "step", "weights")


def _last_of_each(records: list[Record], *keys: str) -> list[Record]:
    latest = {tuple(record.get(key) for key in keys): record for record in records}
    return sorted(latest.values(), key=lambda record: record["step"])


def _read_json(path: Path, notes: list[str]) -> Record | None:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        notes.append(f"{path.name} cannot be read: {error}.")
        return None
    if not isinstance(value, dict):
        notes.append(f"{path.name} holds no JSON object and is left out.")
        return None
    return value


def _parse_config(text: str, notes: list[str]) -> Record:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        notes.append(f"config.yaml cannot be parsed: {error}.")
        return {}
    return value if isinstance(value, dict) else {}

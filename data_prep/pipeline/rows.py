"""Rows: what is known about one video or clip, as plain values, from the first stage to the last."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinema.data.dataset.shards import write_aside

Row = dict[str, Any]
"""JSON-ready values by name; `key` is unique among the rows of a stage. docs/preparing.md lists the names."""


@dataclass(frozen=True)
class Dropped:
    """A row that a stage takes out, and why: a few words that are equal for equal causes, as they are counted."""

    row: Row
    reason: str


class RowFailed(Exception):
    """A row that cannot be worked on, such as a damaged file; the message begins with the cause and `: `."""


Outcome = Row | Dropped


def cause(reason: str) -> str:
    """What a failure is counted under: its reason up to the first colon or semicolon."""
    return reason.replace(";", ":").split(":", 1)[0].strip()


def members(row: Row) -> list[Row]:
    """The rows of a bundle, or the row itself."""
    return row.get("members", [row])


def bundled(rows: Iterable[Row], name: str | None) -> Iterator[Row]:
    """Neighbouring rows with an equal value of `name` as one row; every row by itself without a name."""
    if name is None:
        yield from rows
        return
    for value, group in itertools.groupby(rows, key=lambda row: row[name]):
        together = list(group)
        yield {"key": value, "members": together, "duration_seconds": together[0].get("duration_seconds", 0.0)}


def row_digest(row: Row) -> str:
    """Identity of a row: equal values, equal digest."""
    return hashlib.sha256(to_line(row).encode()).hexdigest()[:20]


def to_line(value: Any) -> str:
    """One line of json with sorted keys: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, one at a time."""
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write rows, and return how many; the file appears under its name only when whole."""
    unfinished, count = path.with_name(f".{path.name}.part"), 0
    with open(unfinished, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(to_line(row) + "\n")
            count += 1
    unfinished.replace(path)
    return count


def write_json(path: Path, value: Any) -> None:
    """A small json file for people and programs."""
    write_aside(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

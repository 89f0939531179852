"""Stage write: clips into shards with their index and manifest."""

import hashlib
import json
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from data_prep.pipeline.rows import Dropped, Outcome, Row, row_digest, write_json
from data_prep.pipeline.stage import Place, Stage
from kinema.data.dataset.sample import ClipRecord
from kinema.data.dataset.shards import DatasetIndex, ShardWriter
from kinema.data.storage.store import MANIFEST

NOT_IN_SHARDS = ("path", "clip", "clip_bytes", "bytes", "modified_ns", "number")
"""Of this machine and this working folder."""
HISTORY = "prepare.json"
"""Beside the shards: the settings of every stage, and what each of them kept."""

NO_CAPTION = "no caption"


@dataclass
class Write(Stage):
    """Rows become samples of a data set, in shards of about equal size."""

    version: ClassVar[int] = 2
    light: ClassVar[bool] = True

    out: str = ""
    """Folder of the data set."""
    overwrite: bool = False
    """Replace the data set that lies there."""
    shard_mib: float = 256.0
    """Size of a shard at most, unless a single clip is larger."""
    mixed: bool = True
    """Spread the clips of a video over all shards, so that even reading in order mixes them."""
    require_captions: bool = True
    """Drop clips without a caption."""

    def __post_init__(self) -> None:
        if not self.shard_mib > 0:
            raise ValueError(f"write.shard_mib={self.shard_mib} must be above 0, e.g. 256.")

    def apply(self, row: Row, place: Place) -> Iterable[Outcome]:
        """Every row; `finish` tells which may be written, and notes it beside the shards."""
        return [row]

    def finish(self, rows: Iterator[Row], place: Place) -> Iterable[Outcome]:
        """Write the data set; each row learns its shard."""
        ordered: list[Row] = []
        dropped: list[Row] = []
        for row in rows:
            (ordered if row["caption"].strip() or not self.require_captions else dropped).append(row)
        if self.mixed:
            ordered.sort(key=lambda row: hashlib.sha256(row["key"].encode()).digest())
        if ordered:  # else the pipeline says that nothing is left, and what dropped it
            self.write_dataset(ordered, len(dropped), place)
            shards = {e.record.key: e.shard for e in DatasetIndex.load(self.out).entries}
            yield from ({**row, "shard": shards[row["key"]]} for row in ordered)
        yield from (Dropped(row, NO_CAPTION) for row in dropped)

    def recorded(self) -> dict[str, Any]:
        """The settings that tell what lies in the data set."""
        return {name: value for name, value in self.settings().items() if name not in ("out", "overwrite")}

    def entry(self, kept: int, dropped: int) -> dict[str, Any]:
        """This stage as the history has it, like those before."""
        counts = {"given": kept + dropped, "kept": kept, "dropped": {NO_CAPTION: dropped} if dropped else {}}
        return {"stage": "write", "settings": self.recorded(), **counts, "failed": {}}

    def write_dataset(self, rows: list[Row], dropped: int, place: Place) -> None:
        """Publish shards, manifest and history in one rename, unless that was done before."""
        history = {"rows": _digest(rows), "stages": [*place.history(), self.entry(len(rows), dropped)]}
        if _read(Path(self.out) / HISTORY) == json.loads(json.dumps(history)):
            return
        check_target(Path(self.out), self.overwrite)
        writer = ShardWriter(self.out, max_samples=sys.maxsize, command=_command(), overwrite=self.overwrite)
        sizes = [row["clip_bytes"] for row in rows]
        ends = shard_ends(sizes, self.shard_mib * 2**20)
        with writer:
            for number, row in enumerate(rows, 1):
                writer.write(clip_record(row), place.find(row["clip"]).read_bytes())
                if number in ends:
                    writer.end_shard()
            write_json(writer.building / HISTORY, history)


def check_target(out: Path, overwrite: bool) -> None:
    """See that a data set may be written there; raises ValueError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST).exists():
        raise ValueError(f"out={out} is not empty and not a data set. Give another out=.")
    if not overwrite:
        raise ValueError(
            f"out={out} holds a data set that was made otherwise. Type overwrite=true to replace it, or another out=."
        )


def clip_record(row: Row) -> ClipRecord:
    """The record of a row: its fields where it has them, and everything else that is known under `extra`."""
    names = {f.name for f in fields(ClipRecord)}
    extra = {name: value for name, value in row.items() if name not in names and name not in NOT_IN_SHARDS}
    known = {name: value for name, value in row.items() if name in names}
    return ClipRecord.from_dict({**known, "extra": extra}, allow_missing_caption=True)


def shard_ends(sizes: list[int], most: float) -> set[int]:
    """After how many clips each shard ends: as few shards of at most `most` bytes as there can be, about equal."""
    total = sum(sizes)
    count = max(1, -(-total // int(most)))
    while True:
        ends, largest = _even_ends(sizes, count)
        if largest <= max(most, *sizes) or count >= len(sizes):
            return ends
        count += 1


def _even_ends(sizes: list[int], count: int) -> tuple[set[int], int]:
    """Ends where the running sum passes each `count`-th of the total, and the size of the largest shard."""
    total, done, begun, ends, largest = sum(sizes), 0, 0, set[int](), 0
    for number, size in enumerate(sizes, 1):
        done += size
        if done * count >= total * (len(ends) + 1) or number == len(sizes):
            ends.add(number)
            largest, begun = max(largest, done - begun), done
    return ends, largest


def _digest(rows: list[Row]) -> str:
    return row_digest({"rows": [row_digest(row) for row in rows]})


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _command() -> str:
    """What was typed, without what changes nothing about the data."""
    free = ("engine", "work=", "out=", "overwrite=", "stages=")
    given = [argument for argument in sys.argv[1:] if not argument.startswith(free)]
    return shlex.join(["python", "data_prep/prepare.py", *given])

"""`kinema data diff`: which clips two data sets do not share, by key, whatever shard they lie in."""

import argparse
import json
from dataclasses import dataclass, field
from typing import Any

from kinema.data.dataset.opened import opened
from kinema.data.dataset.shards import ClipEntry, DamagedSample, DatasetIndex, read_member

EXIT_SAME, EXIT_DIFFERENT, EXIT_TROUBLE = 0, 1, 2  # as those of diff


@dataclass
class Difference:
    """What became of the clips of one data set in another."""

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    records: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    """{key: {field: [before, after]}}."""
    members: dict[str, list[str]] = field(default_factory=dict)
    """{key: extensions of the members whose bytes differ}, other than the record."""
    same: int = 0

    @property
    def is_none(self) -> bool:
        """Whether both hold the same clips."""
        return not (self.added or self.removed or self.records or self.members)

    def lines(self, most: int) -> list[str]:
        """A line for each clip: + added, - removed, ~ another record, ! other bytes; at most so many of a kind."""
        changed = [
            f"~ {key}: {', '.join(f'{name} {old!r} -> {new!r}' for name, (old, new) in fields.items())}"
            for key, fields in self.records.items()
        ]
        bytes_ = [f"! {key}: other bytes of {', '.join(exts)}" for key, exts in self.members.items()]
        kinds = ([f"- {key}" for key in self.removed], [f"+ {key}" for key in self.added], changed, bytes_)
        return [line for kind in kinds for line in _first(kind, most)]

    def verdict(self) -> str:
        """SAME or DIFFERENT, with the counts."""
        if self.is_none:
            return f"SAME {self.same} clips"
        return (
            f"DIFFERENT: {len(self.added)} added, {len(self.removed)} removed, "
            f"{len(self.records)} with another record, {len(self.members)} with other bytes, {self.same} the same"
        )


def difference(a: DatasetIndex, b: DatasetIndex) -> Difference:
    """Compare two data sets by key, in the order of their clips; records are read from the tars where they differ."""
    after = {entry.record.key: entry for entry in b.entries}
    found = Difference()
    for entry in a.entries:
        key = entry.record.key
        if (other := after.pop(key, None)) is None:
            found.removed.append(key)
            continue
        record = _record_changes(a, entry, b, other)
        members = [ext for ext in sorted({*entry.members, *other.members} - {"json"}) if _differs(entry, other, ext)]
        if record:
            found.records[key] = record
        if members:
            found.members[key] = members
        found.same += not (record or members)
    found.added = list(after)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("a", help="folder or address of a data set, or of any WebDataset tars")
    parser.add_argument("b", help="another")
    parser.add_argument("--most", type=int, default=20, help="lines of each kind (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one json object, with every clip, instead")


def run(arguments: argparse.Namespace) -> int:
    """Print the differences and the verdict; returns 0 for the same clips, 1 for others, 2 if one cannot be read."""
    try:
        with opened(arguments.a) as a, opened(arguments.b) as b:
            found = difference(a, b)
    except (ValueError, DamagedSample) as error:
        print(f"NOT COMPARED: {error}")
        return EXIT_TROUBLE
    if arguments.json:
        print(json.dumps({**vars(found), "verdict": found.verdict()}, ensure_ascii=False))
    else:
        print("\n".join([*found.lines(arguments.most), found.verdict()]))
    return EXIT_SAME if found.is_none else EXIT_DIFFERENT


def _differs(one: ClipEntry, other: ClipEntry, ext: str) -> bool:
    """By size and checksum; where they lie does not count."""
    mine, theirs = one.members.get(ext), other.members.get(ext)
    if mine is None or theirs is None:
        return True
    return (mine.size, mine.crc32) != (theirs.size, theirs.crc32)


def _record_changes(a: DatasetIndex, entry: ClipEntry, b: DatasetIndex, other: ClipEntry) -> dict[str, list[Any]]:
    """Fields that differ in the index, and what the index leaves out, in the tars; sha256 goes with the bytes."""
    before, after = entry.record.to_dict(with_extra=False), other.record.to_dict(with_extra=False)
    if {"json"} <= entry.members.keys() & other.members.keys() and _differs(entry, other, "json"):
        before |= {"extra": json.loads(read_member(a.folder, entry, "json")).get("extra")}
        after |= {"extra": json.loads(read_member(b.folder, other, "json")).get("extra")}
    return {name: [value, after[name]] for name, value in before.items() if value != after[name] and name != "sha256"}


def _first(lines: list[str], most: int) -> list[str]:
    more = len(lines) - most
    return lines if more <= 0 else [*lines[:most], f"{lines[0][0]} ... and {more} more"]

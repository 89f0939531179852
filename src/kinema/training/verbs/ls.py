"""`kinema checkpoint ls`: the checkpoints of a run, what they hold, and whether they are whole."""

import argparse
import time
from dataclasses import dataclass
from typing import Any

from kinema.training.checkpoints.store import MANIFEST, SEAL, Checkpoint, CheckpointError, read_seal, verify
from kinema.training.verbs.found import add_path, found

COLUMNS = ("checkpoint", "age", "MiB", "files", "kind", "verified", "what")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    age: str
    mib: str
    files: str
    kind: str
    verified: str
    what: str

    @classmethod
    def of(cls, checkpoint: Checkpoint, check: bool) -> "Row":
        """What a checkpoint says of itself; `check` reads all of its bytes."""
        try:
            files = read_seal(checkpoint.folder)["files"]
        except CheckpointError as error:
            return cls(checkpoint.folder.name, "", "", "", "", "DAMAGED", str(error))
        size = sum(entry["bytes"] for entry in files.values()) / 2**20
        damage = verify(checkpoint.folder) if check else None
        verified = ("DAMAGED" if damage else "whole") if check else "not now"
        age = age_of(time.time() - (checkpoint.folder / SEAL).stat().st_mtime)
        named = damage or what_of(checkpoint)
        return cls(checkpoint.folder.name, age, f"{size:.1f}", str(len(files)), kind_of(set(files)), verified, named)


def kind_of(files: set[str]) -> str:
    """Whether a run can go on from these files, and how many ranks wrote them."""
    parts = sum(name.startswith("model") for name in files)
    state = "state" if "training.json" in files else "weights"
    return f"{state}, {parts} parts" if parts > 1 else state


def what_of(checkpoint: Checkpoint) -> str:
    """Task, number format and origin of the weights, of the manifest."""
    try:
        manifest: dict[str, Any] = checkpoint.document("manifest")
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read ({error})"
    average = manifest.get("average")
    words = [manifest.get("task", "?"), *([f"mean of {len(average['of'])}"] if average else [])]
    return " ".join([*words, f"ema {manifest.get('fingerprints', {}).get('ema', '?')}"])


def age_of(seconds: float) -> str:
    """12 s, 5 min, 3 h, 9 d."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def table(rows: list[Row]) -> str:
    """Aligned columns under their names."""
    cells = [COLUMNS, *(tuple(vars(row).values()) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_path(parser, afar=True)
    parser.add_argument("--verify", action="store_true", help="read every byte and compare it with the seal")


def run(arguments: argparse.Namespace) -> int:
    """Print the table; the last line counts."""
    only = None if arguments.verify else (SEAL, MANIFEST)
    rows = [Row.of(checkpoint, arguments.verify) for checkpoint in found(arguments.path, only)]
    print(table(rows))
    damaged = sum(row.verified == "DAMAGED" for row in rows)
    print(f"{len(rows)} checkpoint(s), {damaged} damaged" + ("" if arguments.verify else "; --verify reads them all"))
    return 0

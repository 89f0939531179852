"""One save under way: what each rank writes, and what the main rank makes of it when all have written."""

import itertools
import re
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinema.data.account.sightings import SeenKeys
from kinema.identity import fingerprint_of_checksums
from kinema.training.checkpoints.pieces import Piece, Written, whole_sums, write_pieces
from kinema.training.checkpoints.store import (
    Checkpoint,
    CheckpointStore,
    FileSum,
    Writer,
    fsync,
    json_writer,
    read_seal,
    text_writer,
    write_json,
    write_synced,
)
from kinema.training.records.seen import KEYS, Start, keys_writer

WEIGHTS = {"raw": "model", "ema": "ema"}
"""Whose fingerprints a manifest holds, and the files that they are of."""


@dataclass(frozen=True)
class Documents:
    """What a checkpoint holds beside its tensors."""

    training: dict[str, Any]
    manifest: dict[str, Any]
    seen: SeenKeys
    start: Start
    config_yaml: str

    def writers(self, fingerprints: dict[str, str]) -> dict[str, Writer]:
        """By file."""
        return {
            KEYS: keys_writer(self.seen, self.start.seen.keys),
            "training.json": json_writer(self.training),
            "manifest.json": json_writer({**self.manifest, "fingerprints": fingerprints}),
            "config.yaml": text_writer(self.config_yaml),
        }


@dataclass
class Save:
    """From the copy in host memory to the published checkpoint. `work` is what this rank's thread does for it now."""

    step: int
    aside: Path
    documents: Documents
    copied: Future[Any]
    """Done when weights and state may move again."""
    work: Future[Any]
    began: float
    """When the loop asked for it (`time.perf_counter`): all seconds count from there."""
    is_written: bool = False
    """Whether all ranks have written their files."""
    stall_seconds: float = 0.0
    """How long training waited, for the save before this one and for the copy."""
    waited_seconds: float = 0.0
    """How much of it was for the save before."""
    num_bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    """What a person should know of, though the checkpoint was published."""
    ended: float = 0.0

    def publish(self, store: CheckpointStore, written: list[dict[str, Written]], run_dir: Path) -> None:
        """Write the documents, seal what all ranks have written, and publish; on the main rank."""
        parts = {name: found for rank in written for name, found in rank.items()}
        files = {name: FileSum(found.num_bytes, found.crc32) for name, found in parts.items()}
        for name, write in self.documents.writers(fingerprints_of(parts)).items():
            files[name] = write_synced(self.aside / name, write)
        store.seal(self.aside, self.step, files)
        store.announce(self.step, self.warnings.append)
        write_json(run_dir / "ledger.json", self.documents.training["ledger"])
        self.num_bytes, self.ended = sum(found.num_bytes for found in files.values()), time.perf_counter()

    def record(self) -> dict[str, Any]:
        """A `checkpoint` record of the metrics: seconds waited, those for the save before, all of it; and the size."""
        return {
            "kind": "checkpoint",
            "step": self.step,
            "stall_seconds": self.stall_seconds,
            "waited_seconds": self.waited_seconds,
            "seconds": self.ended - self.began,
            "mib": self.num_bytes / 2**20,
        }

    def line(self) -> str:
        """The record for people."""
        of_it = f"of which training waited {self.stall_seconds:.2f} s"
        before = f" ({self.waited_seconds:.2f} s for the save before)" if self.waited_seconds >= 0.005 else ""
        return f"published, {self.num_bytes / 2**20:.1f} MiB in {self.ended - self.began:.2f} s, {of_it}{before}"


def write_part(aside: Path, files: dict[str, list[Piece]]) -> dict[str, Written]:
    """Write this rank's files of a save, and see them safely on the disk."""
    aside.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, pieces in files.items():
        written[name] = write_pieces(aside / name, pieces)
        fsync(aside / name)
    fsync(aside)
    return written


def part_name(name: str, rank: int, ranks: int) -> str:
    """The file that one rank writes of `model`, `ema` or `optimizer`."""
    return f"{name}-{rank + 1:05d}-of-{ranks:05d}.safetensors" if ranks > 1 else f"{name}.safetensors"


def sets_in(checkpoint: Checkpoint) -> list[str]:
    """What a checkpoint holds tensors of, each by itself or in parts: `model`, each of its averages, `optimizer`."""
    stems = (Path(file).stem for file in read_seal(checkpoint.folder)["files"] if is_part(file))
    return list(dict.fromkeys(re.sub(r"-\d{5}-of-\d{5}$", "", stem) for stem in stems))


def is_part(file: str) -> bool:
    """Whether `part_name` named this file of a checkpoint; the others are its documents."""
    return file.endswith(".safetensors") and file != KEYS


def fingerprints_of(parts: dict[str, Written]) -> dict[str, str]:
    """What a manifest says of the weights in these files; PieceError unless their pieces make whole tensors."""
    marks = {}
    for kind, name in WEIGHTS.items():
        files = [found for file, found in parts.items() if file.startswith((f"{name}.", f"{name}-"))]
        sums = whole_sums(itertools.chain.from_iterable(found.sums for found in files))
        if files:
            checksums = {key: (one.shape, one.dtype, one.crc32) for key, one in sums.items()}
            marks[kind] = fingerprint_of_checksums(checksums)
    return marks


def problem_of(work: Future[Any]) -> str | None:
    """Why a piece of work failed, once it has ended."""
    error = work.exception()
    return f"{type(error).__name__}: {error}" if error else None

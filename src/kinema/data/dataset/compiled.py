"""The columns of a large data set: made once from its indexes, then only mapped."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from kinema.data.dataset.entry import ClipEntry
from kinema.data.dataset.sample import SPLITS
from kinema.data.dataset.table import FORMAT_VERSION, ClipTable, TableWriter
from kinema.data.storage.locking import locked

IN_MEMORY_CLIPS = 100_000
"""Up to so many clips the indexes are read at every start, in some seconds; beyond, their columns lie in files."""
ELSEWHERE = "~/.cache/kinema/data"
"""Where they lie if the data set's folder cannot be written."""
ALL = "all"
"""Name of the table of all splits."""


def load_table(
    folder: Path, identity: str, clips: int, split: str | None, chunks: Callable[[], Iterable[list[ClipEntry]]]
) -> ClipTable:
    """The entries of a split (None: of all) in the order of `chunks`, which reads the indexes shard by shard.

    `identity` tells these indexes from all others: the files carry it, so those of an earlier state of the data set
    are never taken for it.
    """
    if clips <= IN_MEMORY_CLIPS:
        return ClipTable.of(entry for chunk in chunks() for entry in chunk if split in (None, entry.record.split))
    place = _place(folder, identity)
    place.mkdir(parents=True, exist_ok=True)
    name = ALL if split is None else split
    with locked(place / ".lock"):  # one process of the machine makes them, the others find them
        if not (place / name).is_dir():
            _write_tables(place, name, chunks())
            _remove_earlier(folder, place)
    return ClipTable.open(place / name)


def _write_tables(place: Path, name: str, chunks: Iterable[list[ClipEntry]]) -> None:
    """The table asked for, or those of all splits in one pass."""
    names = {ALL} if name == ALL else {name, *SPLITS}
    writers = {name: TableWriter(place / name) for name in names if not (place / name).is_dir()}
    for chunk in chunks:
        for split, writer in writers.items():
            writer.add([entry for entry in chunk if split in (ALL, entry.record.split)])
    for writer in writers.values():
        writer.close()


def _place(folder: Path, identity: str) -> Path:
    name = f"columns-{FORMAT_VERSION}-{identity[:16]}"
    return folder / f".{name}" if os.access(folder, os.W_OK) else Path(ELSEWHERE).expanduser() / name


def _remove_earlier(folder: Path, place: Path) -> None:
    """Columns of what the data set was before; who has them mapped keeps them."""
    for earlier in folder.glob(".columns-*"):
        if earlier != place:
            shutil.rmtree(earlier, ignore_errors=True)

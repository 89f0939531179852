"""Indexes and a manifest for tars that someone else made: beside them, or aside where they cannot be written."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from kinema.data.dataset.foreign import ForeignOptions, Refusals, stream_shard
from kinema.data.dataset.shards import DatasetIndex, ShardFacts, write_index, write_manifest
from kinema.data.storage.remote import RemoteStore

BLOCK_BYTES = 2**23
"""A remote tar is streamed by range requests of this size: one that fails is tried again, not the whole tar."""


def index_shards(folder: str | Path, *, name: str | None = None, options: ForeignOptions | None = None) -> DatasetIndex:
    """Write indexes and a manifest for a folder of WebDataset tars that someone else made.

    A sample needs a video (mp4, webm, mkv, mov, avi or m4v, `mp4` in the index); its caption is `caption` (or `text`,
    `txt`, `cap`) of its json, or else such a member. Facts that the json does not state are read from the video;
    licence and consent become `unknown` then. The tars are left as they are. What cannot serve is left out, counted
    in the manifest under `refused`. Raises ValueError for a folder without tars, a damaged tar, or too much left out.
    """
    folder = Path(folder)
    tars = sorted(path.name for path in folder.glob("*.tar"))
    if not tars:
        raise ValueError(f"folder={folder} has no .tar files: nothing to index.")
    name, command = name or folder.resolve().name, f"kinema data index {folder}"
    write_indexes(folder, tars, lambda tar: (folder / tar).open("rb"), name, command, options or ForeignOptions())
    return DatasetIndex.load(folder)


def write_indexes(
    target: Path,
    tars: Sequence[str],
    open_tar: Callable[[str], BinaryIO],
    name: str,
    command: str,
    options: ForeignOptions,
) -> None:
    """Stream each tar once, and write its index and at last the manifest into `target`."""
    refusals, seen, facts = Refusals(), set[str](), list[ShardFacts]()
    for tar in tqdm(tars, unit="tar", desc="indexing", disable=None):
        with open_tar(tar) as stream:
            found = stream_shard(tar, stream, options, refusals, seen)
        facts.append(write_index(target, tar, found.entries, found.bytes, found.sha256))
    refused, given = refusals.samples.total(), refusals.samples.total() + len(seen)
    if not seen or refused > options.max_refused_fraction * given:
        raise ValueError(
            f"{refused} of {given} samples of {name} cannot serve, more than "
            f"max_refused_fraction={options.max_refused_fraction:g} allows: {refusals.line() or 'there are none'}. "
            "Mend the tars, or type a larger data.foreign.max_refused_fraction (--max-refused)."
        )
    if line := refusals.line():
        tqdm.write(f"data {name}: {len(seen)} of {given} samples indexed; left out: {line}")
    write_manifest(target, facts, name, command, refused={**refusals.samples, **refusals.members})


def open_remote(store: RemoteStore, file: str, size: int) -> BinaryIO:
    """A remote file as a stream from its first byte to its last."""
    return io.BufferedReader(_RangeStream(store, file, size), BLOCK_BYTES)


class _RangeStream(io.RawIOBase):
    def __init__(self, store: RemoteStore, file: str, size: int) -> None:
        self.store, self.file, self.size, self.position = store, file, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self.position + len(buffer), self.size)
        part = self.store.read_range(self.file, self.position, end) if end > self.position else b""
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)

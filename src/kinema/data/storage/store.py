"""The door to bytes: where a shard's file is opened, and what a member of it must be."""

import os
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from zlib_ng import zlib_ng

MANIFEST = "dataset.json"
"""The file that every data set begins with."""
MAX_OPEN_FILES = 128


@dataclass(frozen=True)
class Member:
    """Where one file of a sample lies inside its tar: bytes [offset, offset + size)."""

    offset: int
    size: int
    crc32: int


class WrongBytes(Exception):
    """What was read is not what the index says: too short, or of another checksum."""


class StoreDown(RuntimeError):
    """Nothing of a remote data set can be read any more: the run stops, no clip is to blame."""


class Store(Protocol):
    """The shards of one data set, wherever they lie."""

    def read(self, shard: str, member: Member) -> bytes:
        """The member's bytes, checked. Raises OSError or WrongBytes for one that cannot be had, StoreDown for all."""
        ...

    def expect(self, wanted: list[tuple[str, Member]]) -> None:
        """Say which members, each of a shard, will be read next, and no others: they may be fetched meanwhile."""
        ...

    def take_counts(self) -> dict[str, float]:
        """What this process did since the last call, for the metrics."""
        ...


@dataclass(frozen=True)
class StoredFolder(os.PathLike[str]):
    """Local folder with the manifest and the indexes of a data set whose shards lie in a store elsewhere."""

    path: Path
    store: Store

    def __fspath__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:
        return str(self.store)


class LocalStore:
    """Shards in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, shard: str, member: Member) -> bytes:
        """One pread; raises OSError or WrongBytes. A file that was replaced under its name is found when it must be."""
        path = f"{self.folder}/{shard}"
        try:
            return _pread(path, member)
        except (OSError, WrongBytes):
            if not _open_files.close(path):
                raise
        return _pread(path, member)

    def expect(self, wanted: list[tuple[str, Member]]) -> None:
        """The system's own read-ahead is enough."""

    def take_counts(self) -> dict[str, float]:
        """None are kept."""
        return {}


def _pread(path: str, member: Member) -> bytes:
    return checked(os.pread(_open_files.get(path).fileno(), member.size, member.offset), member)


def store_of(folder: str | os.PathLike[str]) -> Store:
    """Where the shards of a data set lie: its own folder, unless it stands for an address."""
    return folder.store if isinstance(folder, StoredFolder) else LocalStore(Path(folder))


def add_counts(counts: Iterable[dict[str, float]]) -> dict[str, float]:
    """The counts of several stores together."""
    total: dict[str, float] = {}
    for each in counts:
        for name, count in each.items():
            total[name] = total.get(name, 0.0) + count
    return total


def checked(payload: bytes, member: Member) -> bytes:
    """The payload, if it is the member's; else WrongBytes."""
    if len(payload) != member.size:
        raise WrongBytes(f"ends after {len(payload)} of {member.size} bytes")
    if zlib_ng.crc32(payload) != member.crc32:
        raise WrongBytes("has another checksum than the index: its bytes changed")
    return payload


class _OpenFiles:
    """Files that stay open, the latest used ones. pread has no position, so threads and forks share them."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()

    def get(self, path: str) -> BinaryIO:
        """The open file; raises OSError."""
        file = self._files.pop(path, None)
        if file is None:
            file = open(path, "rb", buffering=0)  # noqa: SIM115 - it closes when the last reader lets go
        self._files[path] = file
        while len(self._files) > MAX_OPEN_FILES:
            self._files.popitem(last=False)
        return file

    def close(self, path: str) -> bool:
        """Open the file anew next time; whether it was open, under its name or no longer."""
        return self._files.pop(path, None) is not None


_open_files = _OpenFiles()

"""Shards on disk: WebDataset tars, an index beside each for random access, and one manifest for the data
set.
"""

import hashlib
import itertools
import json
import os
import shutil
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from kinema.data.dataset.columns import Columns
from kinema.data.dataset.compiled import load_table
from kinema.data.dataset.entry import ClipEntry
from kinema.data.dataset.foreign import split_name
from kinema.data.dataset.sample import ClipRecord
from kinema.data.dataset.table import ClipTable
from kinema.data.storage.address import redacted
from kinema.data.storage.store import MANIFEST, Member, StoredFolder, WrongBytes, store_of

FORMAT_VERSION = 1
BUILDING_SUFFIX = ".building"


class DamagedSample(Exception):
    """A member of a shard that cannot be trusted: the loader counts it, names it and goes on."""

    def __init__(self, key: str, shard: str, reason: str):
        super().__init__(f"clip {key} in {shard}: {reason}")
        self.key, self.shard, self.reason = key, shard, reason

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is rebuilt from its message, which would fail on the way out of a worker.
        return type(self), (self.key, self.shard, self.reason)


@dataclass(frozen=True)
class DatasetIndex:
    """Every clip of a data set, or of one split of it, in the stable order shard by shard."""

    folder: Path | StoredFolder
    manifest: dict[str, Any]
    entries: Sequence[ClipEntry]
    """Made as they are asked for: of a large data set, use `columns` to look at all of them."""

    @property
    def columns(self) -> Columns:
        """What planning needs to know of each entry of a single data set, in their order."""
        return self.table.columns

    def clip_keys(self) -> Iterator[str]:
        """Of each entry of a single data set, in their order, without making it."""
        return self.table.texts("key")

    @property
    def table(self) -> ClipTable:
        """The entries of a single data set; of a joint one, ask each of `members`."""
        assert isinstance(self.entries, ClipTable), f"{self.folder} was joined from several data sets"
        return self.entries

    @property
    def members(self) -> Mapping[str, "DatasetIndex"]:
        """The data sets that were joined into this one, by name; a single one is its only member, without a name."""
        return {"": self}

    @property
    def parts(self) -> Sequence[str]:
        """Names of the data sets that were joined into this one; none if it is a single one."""
        return [name for name in self.members if name]

    def place(self, number: int) -> tuple[str, int]:
        """The member that an entry comes from, by name, and the entry's number there."""
        return "", number

    def members_by_first(self) -> dict[int, "DatasetIndex"]:
        """The members by the number of their first entry."""
        sizes = [len(part.entries) for part in self.members.values()]
        firsts = itertools.accumulate(sizes, initial=0)
        return {first: part for first, part in zip(firsts, self.members.values(), strict=False) if len(part.entries)}

    def locate(self, number: int) -> tuple[str | os.PathLike[str], ClipEntry]:
        """The folder that an entry's bytes lie in, and the entry as that folder's index has it."""
        return self.folder, self.entries[number]

    def text(self, name: str, number: int) -> str:
        """A text field of an entry, as its own data set has it, without the rest of its record."""
        return self.table.text(name, number)

    def key(self, number: int) -> str:
        """The key of an entry, which tells it from all others here."""
        return self.text("key", number)

    @property
    def folders(self) -> Sequence[Path | StoredFolder]:
        """Where the bytes of the entries lie."""
        return [part.folder for part in self.members.values()]

    @property
    def hash(self) -> str:
        """Identity of the data: sha256 over the sha256 of each shard. The same for every split."""
        return self.manifest["hash"]

    @classmethod
    def load(cls, folder: str | os.PathLike[str], split: str | None = None) -> "DatasetIndex":
        """Read manifest and indexes, and check that every shard lies there with the size the manifest says.

        Raises ValueError when the manifest, an index or a shard is missing, or a shard is cut short. The
        bytes themselves are checked as they are read (`read_member`). Clips without a caption stay in, for
        the caller to count.
        """
        folder = folder if isinstance(folder, StoredFolder) else Path(folder)
        manifest = load_manifest(folder)
        local = Path(folder)
        for shard in manifest["shards"]:
            if isinstance(folder, Path):  # elsewhere, `resolve_folder` looked
                _check_shard_file(folder, shard)
            _check_index_file(local, shard)
        identity = hashlib.sha256("".join(shard["index_sha256"] for shard in manifest["shards"]).encode()).hexdigest()
        entries = load_table(
            local, identity, manifest["clips"], split, lambda: (_load_index(local, s) for s in manifest["shards"])
        )
        return cls(folder, manifest, entries)


def read_member(folder: str | os.PathLike[str], entry: ClipEntry, ext: str) -> bytes:
    """The bytes of one member (`mp4`, `json`, ...); raises DamagedSample if they are not as indexed.

    StoreDown is raised for a remote data set of which nothing can be read any more.
    """
    key, member = entry.record.key, entry.members.get(ext)
    if member is None:
        raise DamagedSample(key, entry.shard, f"has no member .{ext}, only {sorted(entry.members)}")
    try:
        return store_of(folder).read(entry.shard, member)
    except OSError as error:
        raise DamagedSample(key, entry.shard, f"cannot be read: {error}") from error
    except WrongBytes as error:
        raise DamagedSample(key, entry.shard, f".{ext} {error}") from error


class ShardWriter:
    """Writes clips into tar shards with WebDataset's writer; a context manager.

    Everything is written into FOLDER.building, which takes the name FOLDER in one rename when the last byte
    is down: an interrupted build never looks whole, and the next one starts afresh. Equal clips give equal
    bytes.
    """

    def __init__(
        self,
        folder: str | Path,
        prefix: str = "clips",
        max_samples: int = 64,
        *,
        name: str | None = None,
        command: str | None = None,
        overwrite: bool = False,
    ):
        """`name` (the folder's) and `command` (this process's) go into the manifest.

        Raises ValueError if the folder has something in it, unless that is a data set and `overwrite` is set.
        """
        if max_samples < 1:
            raise ValueError(f"max_samples={max_samples} must be at least 1.")
        self.folder = Path(folder)
        self.prefix, self.max_samples = prefix, max_samples
        self.name = name or self.folder.resolve().name
        self.command = command if command is not None else redacted(" ".join(sys.argv))
        self.building = self.folder.with_name(self.folder.name + BUILDING_SUFFIX)
        self._check_target(overwrite)
        self._records: list[ClipRecord] = []
        self._keys: set[str] = set()
        self._shards: list[ShardFacts] = []
        self._tar: Any = None

    def _check_target(self, overwrite: bool) -> None:
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return
        is_dataset = (self.folder / MANIFEST).exists()
        if not (overwrite and is_dataset):
            what = "holds a data set already" if is_dataset else "is not empty and not a data set"
            remedy = (
                "Pass --overwrite (overwrite=True) to replace it, or choose another."
                if is_dataset
                else "Choose another."
            )
            raise ValueError(f"folder={self.folder} {what}. {remedy}")

    def __enter__(self) -> "ShardWriter":
        if self.building.exists():
            shutil.rmtree(self.building)
        self.building.mkdir(parents=True)
        return self

    def write(self, record: ClipRecord, mp4: bytes, ext: str = "mp4") -> None:
        """Append one clip, or with another `ext` (jpg, png, webp) an image as a clip of one frame.

        Raises ValueError for an invalid record, a key used before, or another sha256.
        """
        ClipRecord.from_dict(record.to_dict(), allow_missing_caption=True)
        if record.key in self._keys:
            raise ValueError(f"Clip key={record.key} was written before: keys must be unique in a data set.")
        digest = hashlib.sha256(mp4).hexdigest()
        if record.sha256 != digest:
            raise ValueError(f"Clip key={record.key}: sha256={record.sha256} is not that of its mp4, {digest}.")
        if self._tar is None:
            self._open_shard()
        self._tar.write({"__key__": record.key, ext: mp4, "json": record.to_json().encode()})
        self._keys.add(record.key)
        self._records.append(record)
        if len(self._records) == self.max_samples:
            self._close_shard()

    def end_shard(self) -> None:
        """Have the next clip begin a new shard, whatever `max_samples`."""
        if self._tar is not None:
            self._close_shard()

    def _open_shard(self) -> None:
        from webdataset.writer import TarWriter

        path = self.building / f"{self.prefix}-{len(self._shards):06d}.tar"
        self._tar_path, self._tar = path, TarWriter(str(path), encoder=False, mtime=0)

    def _close_shard(self) -> None:
        self._tar.close()
        members = _scan_members(self._tar_path)
        entries = [ClipEntry(record, self._tar_path.name, members[record.key]) for record in self._records]
        size, digest = self._tar_path.stat().st_size, _sha256_of_file(self._tar_path)
        self._shards.append(write_index(self.building, self._tar_path.name, entries, size, digest))
        self._tar, self._records = None, []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._tar is not None:
                self._tar.close()
            shutil.rmtree(self.building, ignore_errors=True)
            return
        if self._tar is not None:
            self._close_shard()
        if not self._shards:
            shutil.rmtree(self.building)
            raise ValueError(f"No clip was written for folder={self.folder}: a data set needs at least one.")
        write_manifest(self.building, self._shards, self.name, self.command)
        self._publish()

    def _publish(self) -> None:
        """Swap the finished folder in; the old one, if any, goes only when the new one stands."""
        retired = self.folder.with_name(self.folder.name + ".retired")
        if self.folder.exists():
            if retired.exists():
                shutil.rmtree(retired)
            os.replace(self.folder, retired)
        os.replace(self.building, self.folder)
        shutil.rmtree(retired, ignore_errors=True)


def load_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """`dataset.json` of a data set; raises ValueError that says what the folder seems to be instead."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"data.path={folder} has no {MANIFEST}: {_what_instead(folder)}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not json ({error}). Build the data set again.") from error
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version={manifest.get('format_version')}, but this program reads "
            f"{FORMAT_VERSION}. Build the data set again, or use the matching program."
        )
    return manifest


def _what_instead(folder: Path) -> str:
    if not folder.exists():
        if folder.with_name(folder.name + BUILDING_SUFFIX).exists():
            return "its build was interrupted. Run the same data_prep command again."
        return "the folder does not exist. Build it with a script of data_prep/, e.g. data_prep/toy.py."
    if any(folder.glob("*.tar")):
        return f"the tars in it were written by another program. Run: kinema data index {folder}"
    return "it is not a data set. Give the folder that a script of data_prep/ wrote."


def _check_shard_file(folder: Path, shard: dict[str, Any]) -> None:
    path = folder / shard["file"]
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; the manifest lists it with {shard['bytes']} bytes. Copy it, or build again."
        )
    size = path.stat().st_size
    if size != shard["bytes"]:
        raise ValueError(
            f"{path} has {size} bytes where the manifest says {shard['bytes']}: it was cut short or changed. "
            "Copy it again, or build the data set again."
        )


def _check_index_file(folder: Path, shard: dict[str, Any]) -> None:
    path = folder / index_name(shard["file"])
    if not path.is_file():
        raise ValueError(f"{path}, the index of {shard['file']}, is missing. Copy it, or build the data set again.")


def _load_index(folder: Path, shard: dict[str, Any]) -> list[ClipEntry]:
    path = folder / index_name(shard["file"])
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != shard["index_sha256"]:
        raise ValueError(f"{path} is not the index that the manifest knows (sha256). Copy both, or build again.")
    return [
        ClipEntry(
            ClipRecord.from_dict(sample["record"], allow_missing_caption=True),
            shard["file"],
            {ext: Member(**member) for ext, member in sample["members"].items()},
        )
        for sample in json.loads(content)["samples"]
    ]


def index_name(shard: str) -> str:
    """File name of the index beside a shard."""
    return f"{shard.removesuffix('.tar')}.index.json"


def _scan_members(tar: Path) -> dict[str, dict[str, Member]]:
    """{key: {extension: member}} of one tar; raises ValueError if it is damaged."""
    found: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(tar, "r:") as archive, open(tar, "rb") as payloads:
            for info in archive:
                if not info.isfile():
                    continue
                payloads.seek(info.offset_data)
                payload = payloads.read(info.size)
                if len(payload) != info.size:
                    raise ValueError(f"{tar} ends inside {info.name}: it was cut short. Copy it again.")
                key, ext = split_name(info.name)
                found.setdefault(key, {})[ext] = Member(info.offset_data, info.size, zlib.crc32(payload))
    except tarfile.TarError as error:
        raise ValueError(f"{tar} is not a whole tar file ({error}). Copy it again.") from error
    return found


@dataclass(frozen=True)
class ShardFacts:
    """A shard's line of the manifest, and the records in it, of which the manifest counts some things."""

    line: dict[str, Any]
    records: list[ClipRecord]


def write_index(folder: Path, shard: str, entries: list[ClipEntry], size: int, sha256: str) -> ShardFacts:
    """Write the index of a shard of so many bytes into `folder`."""
    samples = [
        {
            "key": entry.record.key,
            "members": {ext: vars(member) for ext, member in entry.members.items()},
            "record": entry.record.to_dict(with_extra=False),
        }
        for entry in entries
    ]
    content = json.dumps({"shard": shard, "samples": samples}, ensure_ascii=False, indent=0).encode()
    write_aside(folder / index_name(shard), content)
    digest = hashlib.sha256(content).hexdigest()
    line = {"file": shard, "bytes": size, "samples": len(entries), "sha256": sha256, "index_sha256": digest}
    return ShardFacts(line, [entry.record for entry in entries])


def write_manifest(
    folder: Path, shards: list[ShardFacts], name: str, command: str, *, refused: dict[str, int] | None = None
) -> None:
    """Write `dataset.json`, the last file of a data set; `refused` counts what of foreign tars was left out."""
    records = [record for shard in shards for record in shard.records]
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "command": command,
        "clips": len(records),
        "seconds": round(sum(record.duration_seconds for record in records), 3),
        "splits": dict(sorted(Counter(record.split for record in records).items())),
        "licenses": dict(sorted(Counter(record.license for record in records).items())),
        "sources": dict(sorted(Counter(record.source for record in records).items())),
        "attributions": sorted({record.attribution for record in records if record.attribution}),
        **({"refused": refused} if refused else {}),
        "hash": hashlib.sha256("".join(shard.line["sha256"] for shard in shards).encode()).hexdigest(),
        "shards": [shard.line for shard in shards],
    }
    write_aside(folder / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())


def write_aside(path: Path, content: bytes) -> None:
    """Write a small file under its name only when whole."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def _sha256_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

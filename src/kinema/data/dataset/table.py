"""The clips of an index in columns, in memory or mapped from files: entries are made as they are asked for."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from kinema.data.dataset.columns import Coded, Columns
from kinema.data.dataset.entry import ClipEntry
from kinema.data.dataset.sample import ClipRecord
from kinema.data.storage.store import Member

FORMAT_VERSION = 1
FACTS = "table.json"
ROWS_AT_A_TIME = 65_536
NUMBERS = {"fps": "f8", "duration_seconds": "f8", "num_frames": "i4", "width": "i4", "height": "i4"}
TEXTS = ("key", "caption", "sha256", "source_url")
"""Fields whose text differs from clip to clip; the other words are kept once, with a number for each clip."""
CODES = tuple(f.name for f in fields(ClipRecord) if f.name not in (*NUMBERS, *TEXTS, "extra"))
DTYPES = {
    **NUMBERS,
    "captioned": "?",
    "shard": "i4",
    **{f"{name}.end": "i8" for name in TEXTS},
    **{f"{name}.text": "u1" for name in TEXTS},
    **dict.fromkeys(CODES, "i4"),
    "members.end": "i8",
    "member.name": "i2",
    "member.offset": "i8",
    "member.size": "i8",
    "member.crc32": "u4",
}
"""What stands in each file. `x.end` says for each clip where its part of x ends; it begins where the last one ended."""


class ClipTable(Sequence[ClipEntry]):
    """Entries of an index in its order. Of ten million, none is in memory until it is asked for."""

    def __init__(
        self, arrays: dict[str, NDArray[Any]], words: dict[str, list[str]], folder: Path | None = None
    ) -> None:
        self.arrays, self.words, self.folder = arrays, words, folder

    @classmethod
    def open(cls, folder: Path) -> "ClipTable":
        """Map the files of a `TableWriter`; raises ValueError if one is not as long as it was."""
        facts = json.loads((folder / FACTS).read_bytes())
        arrays: dict[str, NDArray[Any]] = {}
        for name, dtype in DTYPES.items():
            path, length = folder / name, facts["lengths"][name]
            if path.stat().st_size != length * np.dtype(dtype).itemsize:
                raise ValueError(f"{path} was cut short or changed. Remove {folder}: it is made again from the index.")
            # A plain view: a forked worker shares the pages, and nothing of NumPy's memmap class remains in results.
            arrays[name] = np.asarray(np.memmap(path, dtype, "r")) if length else np.empty(0, dtype)
        return cls(arrays, facts["words"], folder)

    @classmethod
    def of(cls, samples: Iterable[ClipEntry]) -> "ClipTable":
        """A table in memory."""
        chunk = TableChunk()
        chunk.add(list(samples))
        return cls(chunk.arrays(), chunk.words)

    @cached_property
    def columns(self) -> Columns:
        """The facts that planning reads; the arrays are the table's own."""
        columns: dict[str, Any] = {name: self.arrays[name] for name in (*NUMBERS, "captioned")}
        for name in ("license", "consent", "generated", "source", "shard"):
            columns[name] = Coded(self.words[name], self.arrays[name])
        return Columns(**columns)

    @cached_property
    def _texts(self) -> dict[str, tuple[NDArray[np.int64], memoryview]]:
        """Of each text field where its texts end, and all of them."""
        return {name: (self.arrays[f"{name}.end"], self.arrays[f"{name}.text"].data) for name in TEXTS}

    def text(self, name: str, row: int) -> str:
        """A text field of one clip, without the rest of its record."""
        ends, text = self._texts[name]
        return str(text[ends.item(row - 1) if row else 0 : ends.item(row)], "utf-8")

    def texts(self, name: str) -> Iterator[str]:
        """A text field of every clip, without making their records."""
        begin = 0
        for first in range(0, len(self), ROWS_AT_A_TIME):
            ends = self.arrays[f"{name}.end"][first : first + ROWS_AT_A_TIME].tolist()
            block, start = self.arrays[f"{name}.text"][begin : ends[-1]].tobytes(), begin
            for end in ends:
                yield block[begin - start : end - start].decode()
                begin = end

    def __len__(self) -> int:
        return len(self.arrays["width"])

    @overload
    def __getitem__(self, row: int) -> ClipEntry: ...
    @overload
    def __getitem__(self, row: slice) -> list[ClipEntry]: ...
    def __getitem__(self, row: int | slice) -> ClipEntry | list[ClipEntry]:
        """Entries that are equal each time, though not the same objects."""
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        row = range(len(self))[row]  # IndexError beyond the end; negative rows count from it
        values: dict[str, Any] = {name: self.arrays[name][row].item() for name in NUMBERS}
        values |= {name: self.text(name, row) for name in TEXTS}
        values |= {name: self.words[name][self.arrays[name][row]] for name in CODES}
        return ClipEntry(ClipRecord(**values), self.words["shard"][self.arrays["shard"][row]], self._members(row))

    def __iter__(self) -> Iterator[ClipEntry]:
        return (self[row] for row in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        # A spawned worker maps the files itself; only a table in memory travels.
        return (ClipTable.open, (self.folder,)) if self.folder else (ClipTable, (self.arrays, self.words))

    def _members(self, row: int) -> dict[str, Member]:
        ends = self.arrays["members.end"]
        places = slice(int(ends[row - 1]) if row else 0, int(ends[row]))
        names = (self.words["member"][code] for code in self.arrays["member.name"][places])
        numbers = (self.arrays[f"member.{what}"][places].tolist() for what in ("offset", "size", "crc32"))
        return {name: Member(*where) for name, *where in zip(names, *numbers, strict=True)}


class TableChunk:
    """Entries turned into arrays; words get their numbers, and ends go on, over all chunks of one table."""

    def __init__(self) -> None:
        self._numbers: dict[str, dict[str, int]] = {name: {} for name in (*CODES, "shard", "member")}
        self._ends = dict.fromkeys([f"{name}.end" for name in (*TEXTS, "members")], 0)
        self._entries: list[ClipEntry] = []

    @property
    def words(self) -> dict[str, list[str]]:
        """The words so far, by number."""
        return {name: list(numbers) for name, numbers in self._numbers.items()}

    def add(self, entries: list[ClipEntry]) -> None:
        """Entries of the next chunk."""
        self._entries += entries

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays of what was added, which is forgotten."""
        entries, self._entries = self._entries, []
        records = [entry.record for entry in entries]
        found: dict[str, Any] = {name: [getattr(record, name) for record in records] for name in NUMBERS}
        found["captioned"] = [bool(record.caption.strip()) for record in records]
        for name in CODES:
            found[name] = self._codes(name, [getattr(record, name) for record in records])
        found["shard"] = self._codes("shard", [entry.shard for entry in entries])
        for name in TEXTS:
            texts = [getattr(record, name).encode() for record in records]
            found[f"{name}.end"] = self._ends_of(f"{name}.end", [len(text) for text in texts])
            found[f"{name}.text"] = np.frombuffer(b"".join(texts), np.uint8)
        members = [member for entry in entries for member in entry.members.values()]
        found["members.end"] = self._ends_of("members.end", [len(entry.members) for entry in entries])
        found["member.name"] = self._codes("member", [name for entry in entries for name in entry.members])
        for what in ("offset", "size", "crc32"):
            found[f"member.{what}"] = [getattr(member, what) for member in members]
        return {name: np.asarray(found[name], dtype) for name, dtype in DTYPES.items()}

    def _codes(self, name: str, words: list[str]) -> list[int]:
        numbers = self._numbers[name]
        return [numbers.setdefault(word, len(numbers)) for word in words]

    def _ends_of(self, name: str, lengths: list[int]) -> NDArray[np.int64]:
        ends = self._ends[name] + np.cumsum(lengths, dtype=np.int64)
        self._ends[name] = int(ends[-1]) if len(ends) else self._ends[name]
        return ends


class TableWriter:
    """Writes a table chunk by chunk into a folder that is renamed to its name when it is whole."""

    def __init__(self, folder: Path) -> None:
        """`folder` must not be there; what a killed writer left of it goes."""
        self.folder = folder
        self.building = folder.with_name(f"{folder.name}.building")
        shutil.rmtree(self.building, ignore_errors=True)
        self.building.mkdir(parents=True)
        self._chunk = TableChunk()
        self._lengths = dict.fromkeys(DTYPES, 0)
        self._files = {name: open(self.building / name, "wb") for name in DTYPES}  # noqa: SIM115 - `close` does

    def add(self, entries: list[ClipEntry]) -> None:
        """Append one chunk, for example a shard."""
        self._chunk.add(entries)
        for name, array in self._chunk.arrays().items():
            self._files[name].write(array.tobytes())
            self._lengths[name] += len(array)

    def close(self) -> None:
        """Put the folder in its place, every byte being on the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        facts = {"format_version": FORMAT_VERSION, "lengths": self._lengths, "words": self._chunk.words}
        with open(self.building / FACTS, "wb") as file:
            file.write(json.dumps(facts, ensure_ascii=False).encode())
            file.flush()
            os.fsync(file.fileno())
        os.rename(self.building, self.folder)

"""What is done of a stage, kept line by line, so that a killed run goes on where it was."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from data_prep.pipeline.rows import to_line

FLUSH_EVERY, FLUSH_SECONDS = 64, 0.5
"""A crash of the machine loses at most this many results, or those of this long."""
Result = dict[str, Any]
"""Of one input row: `input` (its digest), `members` (how many rows it is), and `rows` and `dropped`, or `key`,
`path` and `failed` with the reason.
"""


class Journal:
    """Results by the digest of their input row, in a file that only ever grows; a context manager.

    A line that was cut short by a crash is taken off when the file is opened again. Only places of lines are held
    in memory.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._flushed = path, time.monotonic()
        self._places: dict[str, int] = {}
        self._unwritten: list[Result] = []
        self._file: BinaryIO | None = None

    def __enter__(self) -> "Journal":
        self.path.touch()
        self._file, end = open(self.path, "rb+"), 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            self._places[json.loads(line)["input"]] = end
            end += len(line)
        self._file.truncate(end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()
        assert self._file is not None
        self._file.close()

    def __contains__(self, digest: str) -> bool:
        return digest in self._places

    def __iter__(self) -> Iterator[Result]:
        """Every result, in the order in which they came."""
        return (self[digest] for digest in list(self._places))

    def __getitem__(self, digest: str) -> Result:
        self.flush()
        assert self._file is not None
        self._file.seek(self._places[digest])
        return json.loads(self._file.readline())

    def add(self, result: Result) -> None:
        """Note one result; many quick ones go to the disk together."""
        self._unwritten.append(result)
        if len(self._unwritten) >= FLUSH_EVERY or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def forget_failures(self) -> None:
        """Leave rows that failed to be tried again."""
        self._places = {digest: place for digest, place in self._places.items() if "failed" not in self[digest]}

    def flush(self) -> None:
        """Bring all results to the disk."""
        if not self._unwritten:
            return
        assert self._file is not None
        end = self._file.seek(0, os.SEEK_END)
        for result in self._unwritten:
            self._places[result["input"]] = end
            end += self._file.write((to_line(result) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._unwritten, self._flushed = [], time.monotonic()

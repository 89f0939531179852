"""The facts of an index that planning reads, a NumPy column for each: ten million clips fit into memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kinema.data.dataset.sample import ClipRecord


@dataclass(frozen=True)
class Coded:
    """A column of few distinct words: row i holds `names[codes[i]]`."""

    names: list[str]
    codes: NDArray[np.int32]

    @classmethod
    def of(cls, words: Sequence[str]) -> "Coded":
        """Code words in the order of their first appearance."""
        numbers: dict[str, int] = {}
        codes = [numbers.setdefault(word, len(numbers)) for word in words]
        return cls(list(numbers), np.array(codes, np.int32))

    def count(self, rows: NDArray[np.bool_]) -> dict[str, int]:
        """How many of the chosen rows hold each word that occurs in them."""
        counts = np.bincount(self.codes[rows], minlength=len(self.names)).tolist()
        return {name: count for name, count in zip(self.names, counts, strict=True) if count}


@dataclass(frozen=True)
class Columns:
    """One row for each entry of an index, in its order."""

    width: NDArray[np.int32]
    height: NDArray[np.int32]
    num_frames: NDArray[np.int32]
    fps: NDArray[np.float64]
    duration_seconds: NDArray[np.float64]
    captioned: NDArray[np.bool_]
    """Whether the caption has any character but blanks."""
    license: Coded
    consent: Coded
    generated: Coded
    source: Coded
    shard: Coded

    def __len__(self) -> int:
        return len(self.width)


def columns_of_records(records: Sequence[ClipRecord], shards: Sequence[str]) -> Columns:
    """The columns of records, each with the shard that holds it."""
    return Columns(
        width=np.array([record.width for record in records], np.int32),
        height=np.array([record.height for record in records], np.int32),
        num_frames=np.array([record.num_frames for record in records], np.int32),
        fps=np.array([record.fps for record in records], np.float64),
        duration_seconds=np.array([record.duration_seconds for record in records], np.float64),
        captioned=np.array([bool(record.caption.strip()) for record in records], np.bool_),
        license=Coded.of([record.license for record in records]),
        consent=Coded.of([record.consent for record in records]),
        generated=Coded.of([record.generated for record in records]),
        source=Coded.of([record.source for record in records]),
        shard=Coded.of(shards),
    )

"""Several data sets in one run: what a config says of each, and their indexes as one."""

import hashlib
import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kinema.data.dataset.entry import ClipEntry
from kinema.data.dataset.shards import DatasetIndex


@dataclass
class SourceConfig:
    """One data set of a mixture."""

    path: str = ""
    """As `data.path`."""
    weight: float = 1.0
    """Share of the clips (or of the tokens) of every step; the weights need not add up to 1."""
    latents: str | None = None
    """As `data.latents`, of this data set; either all of a mixture have cached latents or none."""
    require_captions: bool | None = None
    """As in `data`, for this data set; null takes the value there."""
    max_clips: int | None = None


@dataclass
class StageConfig:
    """What is different before a step; what is null is as in `data`."""

    until_step: int = 0
    """The stage ends before this step."""
    shapes: list[list[int]] | None = None
    weights: dict[str, float] | None = None
    """Of the data sets of `data.mixture`, by name."""
    clips_per_step: int | None = None
    tokens_per_step: int | None = None
    max_pack_tokens: int | None = None


class JoinedEntries(Sequence[ClipEntry]):
    """The entries of several indexes one after the other; key and shard begin with the data set's name."""

    def __init__(self, parts: Mapping[str, DatasetIndex]) -> None:
        self.parts = parts
        self._names = list(parts)
        self.firsts: list[int] = np.cumsum([0, *(len(part.entries) for part in parts.values())]).tolist()

    def __len__(self) -> int:
        return self.firsts[-1]

    def locate(self, number: int) -> tuple[str, int]:
        """The data set that holds an entry, and the entry's number there."""
        if not 0 <= number < len(self):
            raise IndexError(f"entry {number} of {len(self)}")
        which = bisect_right(self.firsts, number) - 1
        return self._names[which], number - self.firsts[which]

    def __getitem__(self, number: int) -> ClipEntry:  # type: ignore[override]  # no slices
        name, place = self.locate(number)
        entry = self.parts[name].entries[place]
        record = replace(entry.record, key=f"{name}/{entry.record.key}")
        return ClipEntry(record, f"{name}/{entry.shard}", entry.members)


@dataclass(frozen=True)
class JoinedIndex(DatasetIndex):
    """Several data sets as one. Keys and shards are told apart by the data set's name."""

    @classmethod
    def of(cls, parts: Mapping[str, DatasetIndex]) -> "JoinedIndex":
        """The parts by name, in this order."""
        hashes = json.dumps({name: part.hash for name, part in parts.items()})
        counts: dict[str, Counter[str]] = {"licenses": Counter(), "sources": Counter()}
        for name, counter in counts.items():
            for part in parts.values():
                counter.update(part.manifest.get(name, {}))
        manifest = {
            "name": "+".join(parts),
            "hash": hashlib.sha256(hashes.encode()).hexdigest(),
            "clips": sum(part.manifest["clips"] for part in parts.values()),
            "attributions": sorted({line for part in parts.values() for line in part.manifest.get("attributions", [])}),
            **{name: dict(counter) for name, counter in counts.items()},
        }
        return cls(Path(" + ".join(str(part.folder) for part in parts.values())), manifest, JoinedEntries(parts))

    @property
    def members(self) -> Mapping[str, DatasetIndex]:
        """The data sets by name."""
        assert isinstance(self.entries, JoinedEntries)
        return self.entries.parts

    def place(self, number: int) -> tuple[str, int]:
        """The data set that holds an entry, and the entry's number there."""
        assert isinstance(self.entries, JoinedEntries)
        return self.entries.locate(number)

    def locate(self, number: int) -> tuple[str | os.PathLike[str], ClipEntry]:
        """The folder that an entry's bytes lie in, and the entry as that folder's index has it."""
        name, place = self.place(number)
        return self.members[name].locate(place)

    def text(self, name: str, number: int) -> str:
        """A text field of an entry, as its own data set has it."""
        part, place = self.place(number)
        return self.members[part].text(name, place)

    def key(self, number: int) -> str:
        """The key of an entry, after the name of its data set."""
        return f"{self.place(number)[0]}/{self.text('key', number)}"

"""How often each clip was shown, by the hash of its key: exact, and at most 12 bytes a clip in a checkpoint."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinema.data.dataset.shards import ClipEntry, DatasetIndex
from kinema.data.packs.pack import Pack
from kinema.data.steps.keyed import keyed_seed


def _none(kind: type) -> NDArray:
    return np.zeros(0, kind)


@dataclass(frozen=True)
class SeenKeys:
    """Clips and how often each was shown. It answers without the data set, which may have been deleted since."""

    hashes: NDArray[np.uint64] = field(default_factory=lambda: _none(np.uint64))
    """Of the keys, rising: 64 bits, so two of 10 million clips share one by a chance of 3 in a million."""
    times: NDArray[np.int32] = field(default_factory=lambda: _none(np.int32))

    def times_of(self, key: str) -> int:
        """How often the clip of this key was shown."""
        return int(self.look_up(np.array([hash_of(key)], np.uint64))[0])

    def look_up(self, hashes: NDArray[np.uint64]) -> NDArray[np.int32]:
        """How often each of these was shown; 0 for one that never was."""
        if not len(self.hashes):
            return np.zeros(len(hashes), np.int32)
        place = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return np.where(self.hashes[place] == hashes, self.times[place], 0).astype(np.int32)

    def plus(self, other: "SeenKeys") -> "SeenKeys":
        """Both together."""
        mine = self.look_up(other.hashes) > 0
        hashes = np.concatenate([self.hashes, other.hashes[~mine]])
        times = np.concatenate([self.times + other.look_up(self.hashes), other.times[~mine]])
        order = np.argsort(hashes, kind="stable")
        return SeenKeys(hashes[order], times[order])

    def to_tensors(self) -> dict[str, Tensor]:
        """As they go into a checkpoint."""
        return {"key_hashes": torch.from_numpy(self.hashes.view(np.int64)), "times": torch.from_numpy(self.times)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "SeenKeys":
        """The clips that gave these tensors."""
        return cls(tensors["key_hashes"].numpy().view(np.uint64), tensors["times"].numpy())


class Sightings:
    """Counts of one rank by number of the clip; on the main rank also whose clips they are, and what came before."""

    def __init__(self, clips: int, earlier: SeenKeys | None = None) -> None:
        """`earlier` is what the checkpoint holds that the run continues from; on the main rank only."""
        self.times = np.zeros(clips, np.int32)
        self.earlier = earlier or SeenKeys()
        self._hashes = np.zeros(clips, np.uint64)
        self._known = np.zeros(clips, bool)

    def add_shown(self, pack: Pack) -> None:
        """Enter the clips of a pack that the model has trained on."""
        for number, weight in zip(pack.entries, pack.weights.tolist(), strict=True):
            self.times[number] += weight > 0

    def new_clips(self, times: NDArray[np.int32], index: DatasetIndex) -> list[ClipEntry]:
        """Clips that no checkpoint has entered yet; `times` are those of all ranks together."""
        numbers = np.flatnonzero((times > 0) & ~self._known)
        entries = [index.entries[int(number)] for number in numbers]
        hashes = np.array([hash_of(entry.record.key) for entry in entries], np.uint64)
        self._known[numbers], self._hashes[numbers] = True, hashes
        before = self.earlier.look_up(hashes)
        return [entry for entry, times_before in zip(entries, before.tolist(), strict=True) if not times_before]

    def seen(self, times: NDArray[np.int32]) -> SeenKeys:
        """All clips shown so far, after `new_clips` of the same times; clips of one key, in a mixture, are one."""
        shown = np.flatnonzero(times)
        hashes, place = np.unique(self._hashes[shown], return_inverse=True)
        return self.earlier.plus(SeenKeys(hashes, np.bincount(place, times[shown], len(hashes)).astype(np.int32)))


def hash_of(key: str) -> int:
    """64 bits of a clip's key."""
    return keyed_seed("clip", key)

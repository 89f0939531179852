"""The endless sequence of a data set's clips: epoch after epoch, each in an order of its own, made where it is read."""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kinema.data.steps.keyed import keyed_seed

Ids = NDArray[np.int64]


class Recent:
    """The latest few results, made where they are missing; left behind when its owner is pickled."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.kept: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of this key."""
        if key not in self.kept:
            self.kept[key] = make()
            if len(self.kept) > self.size:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        return self.kept[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return Recent, (self.size,)


class Run(NamedTuple):
    """Neighbours of one epoch's order."""

    ids: Ids
    """Places of the clips in the data set."""
    epoch: int
    first: int
    """Where they begin, counted from 0 for ever."""


@dataclass(frozen=True)
class _Layout:
    """One epoch's shards, and the segments that they are cut into: a segment is the unit that is made and kept."""

    shards: Ids
    """Shards in the order of the epoch."""
    cuts: Ids
    """Segment i holds shards[cuts[i] : cuts[i + 1]]."""
    starts: Ids
    """Measure before each segment, and at the end."""
    clips: Ids
    """Clips before each segment, and at the end."""


class Order:
    """Every epoch has its own permutation: shards are shuffled, and clips inside blocks of `block_shards` shards.

    Each clip has a measure (1, or its tokens), and the sequence is addressed by the measure before it: so a step
    is a range of measures, known without the steps before it, and a run resumes anywhere at once. Only the segments
    that are read are made: memory does not grow with the data set, but for 4 to 12 bytes a clip.
    """

    def __init__(
        self,
        shards: NDArray[np.int32],
        measures: NDArray[np.int32] | None,
        *,
        seed: int,
        block_shards: int,
        taken: Callable[[int], int],
        step_measure: int,
    ) -> None:
        """`shards[i]` is the shard of clip i, any int; `measures[i]` its measure, 1 where None.

        `taken(step)` is the measure that the steps before `step` take, and `step_measure` the most that one takes.
        """
        self.seed, self.block_shards, self.taken, self.step_measure = seed, block_shards, taken, step_measure
        self.num_clips, self.measures = len(shards), measures
        self._by_shard = None if (np.diff(shards) >= 0).all() else np.argsort(shards, kind="stable")
        in_order = shards if self._by_shard is None else shards[self._by_shard]
        self._first = np.append(np.flatnonzero(np.diff(in_order, prepend=in_order[0] - 1)), len(shards))
        self._shard_clips = np.diff(self._first)
        self._shard_measures = self._shard_clips
        if measures is not None:
            in_order = measures if self._by_shard is None else measures[self._by_shard]
            self._shard_measures = np.add.reduceat(in_order, self._first[:-1], dtype=np.int64)
        self.total = int(self._shard_measures.sum())
        self._layouts, self._segments = Recent(3), Recent(12)

    def between(self, begin: int, end: int) -> list[Run]:
        """The clips whose measure begins in [begin, end), counted from 0 for ever."""
        runs = []
        while begin < end:
            epoch, local = divmod(begin, self.total)
            layout, segment = self._find(epoch, local)
            ids, starts = self._segment(epoch, segment)
            base = int(layout.starts[segment])
            low, high = np.searchsorted(starts, [local - base, end - epoch * self.total - base])
            first = epoch * self.num_clips + int(layout.clips[segment] + low)
            runs.append(Run(ids[low:high], epoch, first))
            begin = epoch * self.total + int(layout.starts[segment + 1])
        return [run for run in runs if len(run.ids)]

    def clips_before(self, measure: int) -> tuple[int, int]:
        """The epoch, and the number of its clips, that begin before a measure counted from 0 for ever."""
        epoch, local = divmod(measure, self.total)
        layout, segment = self._find(epoch, local)
        _, starts = self._segment(epoch, segment)
        cursor = int(layout.clips[segment] + np.searchsorted(starts, local - layout.starts[segment]))
        return (epoch + 1, 0) if cursor == self.num_clips else (epoch, cursor)

    def fewest_clips(self, first_step: int) -> int:
        """The fewest clips that a step takes, from `first_step` to the end of its epoch; all if no step ends there."""
        epoch = self.taken(first_step) // self.total
        last_step = bisect_left(range(1 << 62), (epoch + 1) * self.total, key=self.taken)
        ends = np.array([self.taken(step) for step in range(first_step, last_step)]) - epoch * self.total
        counts = np.zeros(len(ends) + 1, np.int64)
        layout, _ = self._find(epoch, 0)
        for segment in range(len(layout.cuts) - 1):
            starts = layout.starts[segment] + self._starts(self._shuffled(epoch, segment))
            counts += np.bincount(np.searchsorted(ends, starts, side="right"), minlength=len(counts))
        return int(counts[1:-1].min(initial=self.num_clips))

    def _find(self, epoch: int, local: int) -> tuple[_Layout, int]:
        layout = self._layouts.get(epoch, lambda: self._make_layout(epoch))
        return layout, int(np.searchsorted(layout.starts, local, side="right")) - 1

    def _make_layout(self, epoch: int) -> _Layout:
        shards = np.argsort(_random_keys(self.seed, "shards", epoch, 0, len(self._shard_clips)), kind="stable")
        cuts = np.append(np.arange(0, len(shards), self.block_shards), len(shards))
        starts = np.insert(np.cumsum(self._shard_measures[shards]), 0, 0)
        # The first blocks are one segment, wide enough to keep the clips of the epoch before out of its first step.
        head = int(np.searchsorted(starts[cuts], min(3 * self.step_measure, self.total)))
        cuts = np.append(0, cuts[head:])
        return _Layout(shards, cuts, starts[cuts], np.insert(np.cumsum(self._shard_clips[shards]), 0, 0)[cuts])

    def _segment(self, epoch: int, segment: int) -> tuple[Ids, Ids]:
        """The clips of a segment in order, and the measure before each of them, from the segment's start."""

        def make() -> tuple[Ids, Ids]:
            ids = self._shuffled(epoch, segment)
            if segment == 0 and epoch > 0:
                self._keep_apart(ids, epoch)
            return ids, self._starts(ids)

        return self._segments.get((epoch, segment), make)

    def _shuffled(self, epoch: int, segment: int) -> Ids:
        layout, _ = self._find(epoch, 0)
        shards = layout.shards[layout.cuts[segment] : layout.cuts[segment + 1]]
        blocks = [shards[first : first + self.block_shards] for first in range(0, len(shards), self.block_shards)]
        return np.concatenate([self._shuffled_block(np.sort(block), epoch) for block in blocks])

    def _shuffled_block(self, shards: Ids, epoch: int) -> Ids:
        ids = [self._clips_of(shard) for shard in shards]
        keys = [_random_keys(self.seed, "clips", epoch, int(of[0]), int(of[-1]) + 1)[of - of[0]] for of in ids]
        together = np.concatenate(ids)
        return together[np.lexsort((together, np.concatenate(keys)))]

    def _clips_of(self, shard: int) -> Ids:
        places = slice(int(self._first[shard]), int(self._first[shard + 1]))
        return np.arange(places.start, places.stop) if self._by_shard is None else self._by_shard[places]

    def _starts(self, ids: Ids) -> Ids:
        if self.measures is None:
            return np.arange(len(ids))
        measures = self.measures[ids].astype(np.int64)
        return np.cumsum(measures) - measures

    def _keep_apart(self, ids: Ids, epoch: int) -> None:
        """Free the step that begins in the epoch before of clips that it would hold twice, in place.

        They change places with the nearest others behind that step. A data set of less than three steps repeats.
        """
        border = epoch * self.total
        step = bisect_left(range(1 << 62), border, key=self.taken) - 1  # the last one to begin before the border
        begin, end = self.taken(step), self.taken(step + 1)
        if end <= border or self.total < 3 * self.step_measure:
            return
        unwanted = {int(clip) for clip in self._last_clips(epoch - 1, begin - (border - self.total))}
        starts = self._starts(ids)
        spare = int(np.searchsorted(starts, end - begin))
        last = int(np.searchsorted(starts, self.total - self.step_measure))
        place, measure = 0, 0
        while measure < end - border:
            if int(ids[place]) in unwanted:
                wanted = (other for other in range(max(spare, place + 1), last) if int(ids[other]) not in unwanted)
                spare = next(wanted, last)
                if spare == last:
                    return
                ids[[place, spare]] = ids[[spare, place]]
                spare += 1
            measure += 1 if self.measures is None else int(self.measures[ids[place]])
            place += 1

    def _last_clips(self, epoch: int, local: int) -> Ids:
        """The clips of an epoch that begin at `local` or later; `_keep_apart` moves none of these."""
        layout, first = self._find(epoch, local)
        rest = np.concatenate([self._shuffled(epoch, segment) for segment in range(first, len(layout.cuts) - 1)])
        return rest[self._starts(rest) >= local - layout.starts[first]]


def _random_keys(seed: int, name: str, epoch: int, first: int, end: int) -> NDArray[np.uint64]:
    """Numbers `first` to `end` of a stream of 64 bits to sort by.

    NumPy keeps a bit generator's stream for ever, but not that of Generator.permutation.
    """
    bits = np.random.PCG64(keyed_seed(seed, name, epoch))
    return (bits.advance(first) if first else bits).random_raw(end - first)

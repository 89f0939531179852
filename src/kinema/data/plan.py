"""Which clips make up each step and each lane: a pure function of (data set, seed, step)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kinema.data.candidates import Candidates, PlannedClip
from kinema.data.dealing import deal, pack_tokens_needed
from kinema.data.order import Order, Recent


@dataclass(frozen=True)
class Slot:
    """One place in a step: the clip, the epoch it belongs to, and its global position, counted from 0 for
    ever.

    All randomness of the clip (time offset, crop) is keyed by (seed, position).
    """

    clip: PlannedClip
    epoch: int
    position: int


class Step(Sequence[list[Slot]]):
    """The packs of one step, one for each lane; a lane's slots are made when they are asked for."""

    def __init__(
        self,
        clips: Candidates,
        lanes: int,
        lane_of: NDArray[np.int32],
        ids: NDArray[np.int64],
        epochs: NDArray[np.int64],
        positions: NDArray[np.int64],
    ) -> None:
        """The columns name the lane, the clip, the epoch and the position of each slot, in any order."""
        order = np.lexsort((positions, clips.shape_ranks[clips.shape_ids[ids]], lane_of))
        self.clips = clips
        self.ids, self.epochs, self.positions = ids[order], epochs[order], positions[order]
        self._bounds = np.searchsorted(lane_of[order], np.arange(lanes + 1))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, lane: int) -> list[Slot]:  # type: ignore[override]  # no slices
        if not -len(self) <= lane < len(self):
            raise IndexError(f"lane {lane} of {len(self)}")
        here = slice(*self._bounds[[lane % len(self), lane % len(self) + 1]])
        columns = (column[here].tolist() for column in (self.ids, self.epochs, self.positions))
        return [Slot(self.clips[clip], epoch, position) for clip, epoch, position in zip(*columns, strict=True)]

    def __iter__(self) -> Iterator[list[Slot]]:
        return (self[lane] for lane in range(len(self)))

    @property
    def costs(self) -> NDArray[np.float64]:
        """Cost of each lane."""
        return np.add.reduceat(self.clips.shape_costs[self.clips.shape_ids[self.ids]], self._bounds[:-1])


def lanes_of(rank: int, world: int, lanes: int) -> list[int]:
    """The lanes that a data rank serves: lanes / world neighbours, its gradient accumulation."""
    if lanes % world:
        usable = [size for size in range(1, lanes + 1) if lanes % size == 0]
        raise ValueError(
            f"data.lanes={lanes} must be a multiple of the number of data ranks {world}: every rank serves "
            f"as many lanes. Type data.lanes={world}, or start one of {usable} ranks."
        )
    assert 0 <= rank < world, f"rank {rank} of {world}"
    share = lanes // world
    return list(range(rank * share, (rank + 1) * share))


class Plan:
    """Order of the clips for all epochs, cut into steps and dealt to lanes.

    Positions run on through the epochs, and step s takes positions [s * clips_per_step, (s + 1) *
    clips_per_step) of the `Order`. Nothing depends on ranks or workers.
    """

    def __init__(
        self,
        clips: Candidates,
        *,
        seed: int,
        lanes: int,
        clips_per_step: int,
        max_pack_tokens: int,
        shuffle_block_shards: int,
    ) -> None:
        """ValueError names what cannot work, before any step."""
        if not len(clips):
            raise ValueError("A plan needs clips, and there is none.")
        if lanes < 1 or clips_per_step < lanes:
            raise ValueError(
                f"data.clips_per_step={clips_per_step} must be at least data.lanes={lanes}, and that at "
                f"least 1: each lane gets a clip. Type data.clips_per_step={max(lanes, 1)} or more, or fewer "
                "lanes."
            )
        if shuffle_block_shards < 1:
            raise ValueError(f"data.shuffle_block_shards={shuffle_block_shards} must be at least 1.")
        self.clips, self.seed, self.lanes, self.clips_per_step = clips, seed, lanes, clips_per_step
        self.max_pack_tokens = max_pack_tokens
        self._check_packs_fit()
        self._order = Order(
            clips.shards,
            None,
            seed=seed,
            block_shards=shuffle_block_shards,
            taken=self._taken,
            step_measure=clips_per_step,
        )
        self._steps = Recent(4)  # workers ask for one lane at a time

    def step(self, step: int) -> Step:
        """The packs of one step, a list of slots for each lane; in a pack equal shapes lie together."""
        return self._steps.get(step, lambda: self._make_step(step))

    def state(self, step: int) -> dict[str, int]:
        """Where the data stand when `step` begins: the epoch, and how many of its clips were taken."""
        epoch, cursor = self._order.clips_before(self._taken(step))
        return {"epoch": epoch, "cursor": cursor}

    def _taken(self, step: int) -> int:
        return step * self.clips_per_step

    def _check_packs_fit(self) -> None:
        largest = self.clips.largest_step(self.clips_per_step)
        needed = pack_tokens_needed(largest, self.lanes)
        if needed > self.max_pack_tokens:
            raise ValueError(
                f"data.max_pack_tokens={self.max_pack_tokens} is too low: with data.clips_per_step="
                f"{self.clips_per_step} on data.lanes={self.lanes} and clips of up to "
                f"{largest[0]} tokens, a pack can need {needed}. "
                f"Type data.max_pack_tokens={needed}, fewer clips per step, or more lanes."
            )

    def _make_step(self, step: int) -> Step:
        runs = self._order.between(self._taken(step), self._taken(step + 1))
        ids = np.concatenate([run.ids for run in runs])
        epochs = np.concatenate([np.full(len(run.ids), run.epoch) for run in runs])
        positions = np.concatenate([np.arange(run.first, run.first + len(run.ids)) for run in runs])
        kinds = self.clips.shape_ids[ids]
        lane_of = deal(self.clips.shape_costs[kinds], self.clips.shape_tokens[kinds], self.lanes, self.max_pack_tokens)
        return Step(self.clips, self.lanes, lane_of, ids, epochs, positions)

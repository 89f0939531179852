"""Which clips make up each step and each lane: a pure function of (data set, seed, step)."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kinema.data.steps.candidates import Candidates, PlannedClip
from kinema.data.steps.dealing import Packing, deal, deal_buckets
from kinema.data.steps.keyed import keyed_seed
from kinema.data.steps.order import Order, Recent
from kinema.data.steps.stages import Stage, Taken

STAGE_POSITIONS = 1 << 48
"""Positions that a stage has for itself where it does not read on in the order of the stage before."""


class Slot(NamedTuple):
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
        rows = zip(
            self.clips.take(self.ids[here]), self.epochs[here].tolist(), self.positions[here].tolist(), strict=True
        )
        return [Slot(*row) for row in rows]

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
            f"as many lanes. Type data.lanes={world}, or start ranks for one of {usable} data ranks."
        )
    assert 0 <= rank < world, f"rank {rank} of {world}"
    share = lanes // world
    return list(range(rank * share, (rank + 1) * share))


class Plan:
    """Order of the clips for all epochs, cut into steps and dealt to lanes.

    Every source has an `Order` of its own, of which each step takes the next range: how long, the `Stage` says by
    the number of the step. So a step is known without those before it, and nothing depends on ranks or workers.
    """

    def __init__(
        self, stages: Sequence[Stage], *, seed: int, lanes: int, shuffle_block_shards: int, balanced_lanes: int = 1
    ) -> None:
        """`stages` follow each other. ValueError names what cannot work, before any step."""
        if shuffle_block_shards < 1:
            raise ValueError(f"data.shuffle_block_shards={shuffle_block_shards} must be at least 1.")
        if balanced_lanes < 1 or lanes % balanced_lanes:
            raise ValueError(f"data.balanced_lanes={balanced_lanes} must be at least 1 and divide data.lanes={lanes}.")
        self.stages, self.seed, self.lanes, self.balanced_lanes = list(stages), seed, lanes, balanced_lanes
        self._block_shards = shuffle_block_shards
        self._first_steps = [0, *(int(stage.until_step or 0) for stage in self.stages[:-1])]
        self._readings: list[list[_Reading]] = []
        for number, stage in enumerate(self.stages):
            stage.check(lanes)
            self._readings.append([self._reading_of(number, source) for source in range(len(stage.clips.sources))])
            self._check_lanes_filled(number)
        self._steps = Recent(4)  # workers ask for one lane at a time

    @property
    def clips(self) -> Candidates:
        """The clips of the last stage, which lasts."""
        return self.stages[-1].clips

    def step(self, step: int) -> Step:
        """The packs of one step, a list of slots for each lane; in a pack equal shapes lie together."""
        return self._steps.get(step, lambda: self._make_step(step))

    def steps_of(self, clips: int) -> int:
        """How many steps, from the first, hold at least so many clips."""
        steps = 0
        while clips > 0:
            clips -= len(self.step(steps).ids)
            steps += 1
        return steps

    def state(self, step: int) -> dict[str, Any]:
        """Where the data stand when `step` begins: of each source the epoch, and how many of its clips were taken."""
        number = self._stage_at(step)
        states = []
        for reading in self._readings[number]:
            epoch, cursor = reading.order.clips_before(reading.taken(step))
            states.append({"epoch": epoch, "cursor": cursor})
        names = self.stages[number].clips.sources
        state = states[0] if len(states) == 1 else dict(zip(names, states, strict=True))
        return state if len(self.stages) == 1 else {"stage": number, **state}

    def _stage_at(self, step: int) -> int:
        return bisect_right(self._first_steps, step) - 1

    def _reading_of(self, number: int, source: int) -> "_Reading":
        """The order that a source is read in: that of the stage before, if its clips are the same, or another one.

        Another one begins with an epoch of its own, so that its permutations are new and its clips count as repeated.
        """
        stage, first_step = self.stages[number], self._first_steps[number]
        previous = self._readings[-1][source] if number else None
        if previous and self.stages[number - 1].same_clips(stage, source):
            previous.taken.follow(first_step, stage)
            previous.order.step_measure = max(previous.order.step_measure, stage.most_taken(source))
            return previous
        rows = stage.clips.source_rows(source)
        name, taken = stage.clips.sources[source], Taken(source)
        order = Order(
            stage.clips.shards[rows],
            None if stage.tokens_per_step is None else stage.clips.tokens[rows].astype(np.int32),
            seed=keyed_seed(self.seed, "source", name) if len(stage.clips.sources) > 1 else self.seed,
            block_shards=self._block_shards,
            taken=taken,
            step_measure=stage.most_taken(source),
        )
        epoch = 0
        if previous:
            epoch, cursor = previous.order.clips_before(previous.taken(first_step))
            epoch += cursor > 0
        taken.follow(first_step, stage, base=epoch * order.total)
        return _Reading(order, taken, number * STAGE_POSITIONS)

    def _check_lanes_filled(self, number: int) -> None:
        """A step of so many clips fills every lane; one of so many tokens may hold too few clips."""
        stage = self.stages[number]
        if stage.tokens_per_step is None:
            return
        largest = int(stage.largest_step.sizes[0])
        if stage.tokens_per_step >= self.lanes * largest + len(self._readings[number]):
            return
        first_step = self._first_steps[number]
        fewest = sum(reading.order.fewest_clips(first_step) for reading in self._readings[number])
        if fewest < self.lanes:
            raise ValueError(_too_few(stage, fewest, self.lanes, largest))

    def _make_step(self, step: int) -> Step:
        stage = self.stages[self._stage_at(step)]
        columns = []
        for source, (order, taken, first_position) in enumerate(self._readings[self._stage_at(step)]):
            first_row, sources = stage.clips.source_rows(source).start, len(stage.clips.sources)
            for run in order.between(taken(step), taken(step + 1)):
                positions = first_position + source + sources * np.arange(run.first, run.first + len(run.ids))
                columns.append((first_row + run.ids, np.full(len(run.ids), run.epoch), positions))
        ids, epochs, positions = (np.concatenate(column) for column in zip(*columns, strict=True))
        if len(ids) < self.lanes:
            raise ValueError(f"Step {step}: {_too_few(stage, len(ids), self.lanes, int(stage.clips.tokens.max()))}")
        return Step(stage.clips, self.lanes, self._deal(stage, stage.clips.shape_ids[ids]), ids, epochs, positions)

    def _deal(self, stage: Stage, kinds: NDArray[np.int32]) -> NDArray[np.int32]:
        costs, tokens, cap = stage.clips.shape_costs[kinds], stage.clips.shape_tokens[kinds], stage.max_pack_tokens
        if stage.packing is Packing.buckets:
            return deal_buckets(kinds, costs, tokens, self.lanes, cap)
        return deal(costs, tokens, self.lanes, cap, balanced_lanes=self.balanced_lanes)


class _Reading(NamedTuple):
    """An order, how far the steps have read it, and where the positions of its clips begin."""

    order: Order
    taken: Taken
    first_position: int


def _too_few(stage: Stage, clips: int, lanes: int, largest: int) -> str:
    return (
        f"data.tokens_per_step={stage.tokens_per_step} can be {clips} clips, too few for data.lanes={lanes}: "
        f"each lane gets a clip. Type data.tokens_per_step={lanes * largest + len(stage.clips.sources)}, which always "
        "suffices, or fewer lanes."
    )

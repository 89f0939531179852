"""Which clips make up each step and each lane: a pure function of (data set, seed, step)."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kinema.data.geometry import ClipShape


@dataclass(frozen=True)
class PlannedClip:
    """One clip as the plan sees it: where it stands in the index, its size and what it costs."""

    entry_index: int
    shape: ClipShape
    tokens: int
    cost: float
    """Work of a training step on this clip, in any unit, e.g. FLOPs; only ratios matter."""


@dataclass(frozen=True)
class Slot:
    """One place in a step: the clip, the epoch it belongs to, and its global position, counted from 0 for
    ever.

    All randomness of the clip (time offset, crop) is keyed by (seed, position).
    """

    clip: PlannedClip
    epoch: int
    position: int


def keyed_seed(*parts: int | str) -> int:
    """Mix named parts into 64 bits, the same on every machine and version: the one source of keyed
    randomness.

    `keyed_seed(seed, "noise", step, lane)` seeds a generator. Parts are told apart by type and length, so
    ("ab", "c") and ("a", "bc"), or 1 and "1", differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise TypeError(f"keyed_seed takes int and str, not {type(part).__name__} {part!r}.")
        text = str(part).encode()
        digest.update(f"{'i' if isinstance(part, int) else 's'}{len(text)}:".encode() + text)
    return int.from_bytes(digest.digest(), "little")


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

    Every epoch has its own permutation: shards are shuffled, and clips are shuffled inside blocks of
    `shuffle_block_shards` shards, so that reading stays local. Positions run on through the epochs, and step
    s takes positions [s * clips_per_step, (s + 1) * clips_per_step). Nothing depends on ranks or workers.
    """

    def __init__(
        self,
        clips: Sequence[PlannedClip],
        shard_of: Sequence[int],
        *,
        seed: int,
        lanes: int,
        clips_per_step: int,
        max_pack_tokens: int,
        shuffle_block_shards: int,
    ) -> None:
        """`shard_of[i]` is the shard of clips[i], any int; ValueError names what cannot work, before any
        step.
        """
        if not clips or len(clips) != len(shard_of):
            raise ValueError(f"A plan needs clips, each with its shard; got {len(clips)} and {len(shard_of)}.")
        if lanes < 1 or clips_per_step < lanes:
            raise ValueError(
                f"data.clips_per_step={clips_per_step} must be at least data.lanes={lanes}, and that at "
                f"least 1: each lane gets a clip. Type data.clips_per_step={max(lanes, 1)} or more, or fewer "
                "lanes."
            )
        if shuffle_block_shards < 1:
            raise ValueError(f"data.shuffle_block_shards={shuffle_block_shards} must be at least 1.")
        unpaid = [clip for clip in clips if not clip.cost > 0]
        if unpaid:
            raise ValueError(f"Every planned clip must have a cost above 0, but {unpaid[0]} has not.")
        self.clips, self.seed, self.lanes, self.clips_per_step = clips, seed, lanes, clips_per_step
        self.max_pack_tokens = max_pack_tokens
        self._check_packs_fit()
        self._blocks = _Blocks(shard_of, shuffle_block_shards)
        # The few latest epochs and steps: workers ask for one lane at a time.
        self._order = lru_cache(maxsize=3)(self._make_order)
        self._step = lru_cache(maxsize=4)(self._make_step)

    def step(self, step: int) -> list[list[Slot]]:
        """The packs of one step, a list of slots for each lane; in a pack equal shapes lie together."""
        return self._step(step)

    def state(self, step: int) -> dict[str, int]:
        """Where the data stand when `step` begins: the epoch, and how many of its clips were taken."""
        epoch, cursor = divmod(step * self.clips_per_step, len(self.clips))
        return {"epoch": epoch, "cursor": cursor}

    def __getstate__(self) -> dict[str, object]:
        # Spawned workers get the plan pickled; the caches stay behind.
        return {name: value for name, value in vars(self).items() if name not in ("_order", "_step")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._order = lru_cache(maxsize=3)(self._make_order)
        self._step = lru_cache(maxsize=4)(self._make_step)

    def _check_packs_fit(self) -> None:
        needed = pack_tokens_needed([clip.tokens for clip in self.clips], self.lanes, self.clips_per_step)
        if needed > self.max_pack_tokens:
            raise ValueError(
                f"data.max_pack_tokens={self.max_pack_tokens} is too low: with data.clips_per_step="
                f"{self.clips_per_step} on data.lanes={self.lanes} and clips of up to "
                f"{max(clip.tokens for clip in self.clips)} tokens, a pack can need {needed}. "
                f"Type data.max_pack_tokens={needed}, fewer clips per step, or more lanes."
            )

    def _make_order(self, epoch: int) -> NDArray[np.int64]:
        """The epoch's permutation of the clips, free of repeats inside the step that begins in the epoch
        before.
        """
        order = self._blocks.permutation(self.seed, epoch)
        taken = epoch * len(self.clips) % self.clips_per_step  # of the step that straddles the border
        if taken and len(self.clips) >= 3 * self.clips_per_step:
            before = self._blocks.permutation(self.seed, epoch - 1)[-taken:]
            _move_back(order, set(before.tolist()), self.clips_per_step - taken, self.clips_per_step)
        return order

    def _make_step(self, step: int) -> list[list[Slot]]:
        first = step * self.clips_per_step
        slots = []
        for position in range(first, first + self.clips_per_step):
            epoch, cursor = divmod(position, len(self.clips))
            slots.append(Slot(self.clips[int(self._order(epoch)[cursor])], epoch, position))
        packs = deal(slots, self.lanes, self.max_pack_tokens)
        return [sorted(pack, key=lambda slot: (slot.clip.shape, slot.position)) for pack in packs]


def deal(slots: Sequence[Slot], lanes: int, max_pack_tokens: int) -> list[list[Slot]]:
    """Deal a step's slots to lanes so that the packs cost the same: dearest first, each to the cheapest lane
    with room.

    Graham 1969, "Bounds on multiprocessing timing anomalies": without the token cap, the dearest lane costs
    at most 4/3 - 1/(3 lanes) times the least possible. Ties go to the lower position and the lower lane.
    """
    packs: list[list[Slot]] = [[] for _ in range(lanes)]
    costs, tokens = [0.0] * lanes, [0] * lanes
    for slot in sorted(slots, key=lambda slot: (-slot.clip.cost, slot.position)):
        open_lanes = [lane for lane in range(lanes) if tokens[lane] + slot.clip.tokens <= max_pack_tokens]
        assert open_lanes, "pack_tokens_needed promised room"
        lane = min(open_lanes, key=lambda lane: (costs[lane], lane))
        packs[lane].append(slot)
        costs[lane] += slot.clip.cost
        tokens[lane] += slot.clip.tokens
    return packs


def pack_tokens_needed(tokens: Sequence[int], lanes: int, clips_per_step: int) -> int:
    """Token cap under which `deal` finds room for every clip of every possible step.

    A clip of t tokens finds none only when every lane holds more than cap - t. That cannot be while some lane
    holds fewer than ceil(clips / lanes) clips under a cap of so many of the largest; nor when the other
    clips' tokens, all lanes together, are too few. The lower of the two caps is enough.
    """
    copies = 1 if len(tokens) >= 3 * clips_per_step else clips_per_step // len(tokens) + 2
    largest = sorted(list(tokens) * copies, reverse=True)[:clips_per_step]
    return min(math.ceil(clips_per_step / lanes) * largest[0], sum(largest[:-1]) // lanes + largest[0])


class _Blocks:
    """Permutations that shuffle shards, and clips inside blocks of neighbouring shards."""

    def __init__(self, shard_of: Sequence[int], block_shards: int) -> None:
        shards, self.shard_of = np.unique(np.asarray(shard_of), return_inverse=True)
        self.num_shards, self.block_shards = len(shards), block_shards

    def permutation(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The epoch's order of all clips."""
        rank_of_shard = np.argsort(_random_keys(self.num_shards, seed, "shards", epoch), kind="stable").argsort()
        block = rank_of_shard[self.shard_of] // self.block_shards
        keys = _random_keys(len(self.shard_of), seed, "clips", epoch)
        return np.lexsort((keys, block)).astype(np.int64)


def _random_keys(count: int, *parts: int | str) -> NDArray[np.uint64]:
    # Raw bits to sort by: NumPy keeps a bit generator's stream for ever, but not Generator.permutation's.
    return np.random.PCG64(keyed_seed(*parts)).random_raw(count)


def _move_back(order: NDArray[np.int64], unwanted: set[int], head: int, clips_per_step: int) -> None:
    """Swap unwanted clips out of the first `head` places, in place, for the nearest wanted ones of the
    middle.

    The last `clips_per_step` places stay as they are, because the next epoch looks at them.
    """
    spare = clips_per_step
    for place in range(head):
        if int(order[place]) not in unwanted:
            continue
        while int(order[spare]) in unwanted:
            spare += 1
        assert spare < len(order) - clips_per_step, "three steps' worth of clips leave room"
        order[place], order[spare] = order[spare], order[place]
        spare += 1

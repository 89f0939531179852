"""What a plan does from one step to another: which clips, how many of each data set, under which cap."""

from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np

from kinema.data.steps.candidates import Candidates
from kinema.data.steps.dealing import LargestStep, Packing
from kinema.data.steps.shares import Shares


@dataclass(frozen=True)
class Stage:
    """Steps that are filled in the same way."""

    clips: Candidates
    max_pack_tokens: int
    clips_per_step: int = 1
    tokens_per_step: int | None = None
    """Instead of so many clips, clips until a step has so many tokens, give or take one clip of each source."""
    shares: Shares = field(default_factory=lambda: Shares([1.0]))
    """Of the clips, or of the tokens, of every step."""
    packing: Packing = Packing.packs
    until_step: int | None = None
    """The first step of the next stage; None is for ever."""

    def check(self, lanes: int) -> None:
        """ValueError naming what cannot work, before any step."""
        if lanes < 1 or (self.tokens_per_step is None and self.clips_per_step < lanes):
            raise ValueError(
                f"data.clips_per_step={self.clips_per_step} must be at least data.lanes={lanes}, and that at "
                f"least 1: each lane gets a clip. Type data.clips_per_step={max(lanes, 1)} or more, or fewer "
                "lanes."
            )
        if self.packing is Packing.buckets:
            self._check_buckets(lanes)
        largest_first = self.clips.larger_is_dearer or self.packing is Packing.buckets
        needed = self.largest_step.pack_tokens_needed(lanes, largest_first=largest_first)
        if needed > self.max_pack_tokens and self.packing is Packing.packs:
            raise ValueError(
                f"data.max_pack_tokens={self.max_pack_tokens} is too low: with {self._amount} on data.lanes={lanes} "
                f"and clips of up to {self.largest_step.sizes[0]} tokens, a pack can need {needed}. "
                f"Type data.max_pack_tokens={needed}, a smaller step, or more lanes."
            )

    def _check_buckets(self, lanes: int) -> None:
        needed = self.largest_step.bucket_lanes_needed(self.max_pack_tokens)
        if needed > lanes:
            raise ValueError(
                f"data.packing=buckets with {self._amount} in {len(self.clips.shapes)} shapes can need {needed} lanes, "
                f"and there are data.lanes={lanes}. Type more lanes, a larger data.max_pack_tokens, fewer shapes, or "
                "data.packing=packs."
            )

    @property
    def largest_step(self) -> LargestStep:
        """Bounds on what any of its steps can hold."""
        if self.tokens_per_step is None:
            return self.clips.largest_step(self.clips_per_step)
        sizes = np.unique(self.clips.shape_tokens[self.clips.shape_counts > 0])[::-1]
        last_clips = int(sizes[0]) * len(self.clips.sources)  # the clip of each source that makes a step full
        return LargestStep.of_tokens(sizes, self.tokens_per_step + last_clips)

    @property
    def _amount(self) -> str:
        if self.tokens_per_step is not None:
            return f"data.tokens_per_step={self.tokens_per_step}"
        return f"data.clips_per_step={self.clips_per_step}"

    def taken(self, source: int, steps: int) -> int:
        """The measure (clips, or tokens) that so many steps take of a source."""
        if self.tokens_per_step is None:
            return self.shares.of_clips(source, steps * self.clips_per_step)
        return self.shares.of_tokens(source, steps * self.tokens_per_step)

    def most_taken(self, source: int) -> int:
        """The most that one step takes."""
        return self.taken(source, 1) + (len(self.shares.quotas) + 1 if len(self.shares.quotas) > 1 else 0)

    def same_clips(self, other: "Stage", source: int) -> bool:
        """Whether a source's clips, and what is counted of them, are the same in both, so that its order goes on."""
        mine, theirs = (stage.clips.source_rows(source) for stage in (self, other))
        mode = (self.tokens_per_step is None) == (other.tokens_per_step is None)
        columns = ("entry_index", "shape_ids", "shards")
        same = mode and self.clips.shapes == other.clips.shapes
        return same and all(
            np.array_equal(getattr(self.clips, name)[mine], getattr(other.clips, name)[theirs]) for name in columns
        )


class Taken:
    """How much of one order the steps before a step have taken, over all stages that read on in it."""

    def __init__(self, source: int) -> None:
        self.source = source
        self._first_steps: list[int] = []
        self._bases: list[int] = []
        self._stages: list[Stage] = []

    def follow(self, first_step: int, stage: Stage, base: int | None = None) -> None:
        """From `first_step` on, this stage; it begins at the measure `base`, or where the stage before has come to."""
        self._bases.append(self(first_step) if base is None else base)
        self._first_steps.append(first_step)
        self._stages.append(stage)

    def __call__(self, step: int) -> int:
        """The measure taken before `step`."""
        which = bisect_right(self._first_steps, step) - 1
        if which < 0:
            return self._bases[0]
        return self._bases[which] + self._stages[which].taken(self.source, step - self._first_steps[which])

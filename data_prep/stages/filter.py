"""Stage filter: clips outside the thresholds and copies of other clips go, and anyone can look at them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from data_prep.pipeline.rows import Dropped, Outcome, Row, write_json
from data_prep.pipeline.stage import Place, Stage
from data_prep.scores.duplicates import BITS, LARGEST_LIMIT, LIMIT, Duplicate, find_duplicates
from data_prep.scores.keep import FilterLine, KeepTable, Range, all_histograms, apply_filters
from data_prep.stages.shown import show_clips

DUPLICATES = "duplicates"
KEEP = "keep.json"


@dataclass
class RemoveDuplicates:
    """Of clips whose signatures nearly agree one stays: held out, larger, longer, first by key, in this order."""

    remove: bool = True
    limit: int = LIMIT
    """Bits, of 256, in which the signatures may differ."""

    def __post_init__(self) -> None:
        if not 0 <= self.limit <= LARGEST_LIMIT:
            raise ValueError(
                f"filter.duplicates.limit={self.limit} must be from 0 to {LARGEST_LIMIT}; {LIMIT} is usual."
            )

    def find(self, rows: list[Row]) -> list[Duplicate]:
        """Which of the rows are copies of which others."""
        if not rows:
            return []
        signatures = np.frombuffer(bytes.fromhex("".join(row["signature"] for row in rows)), np.uint64).reshape(-1, 4)
        return find_duplicates(signatures, self.limit, [preference(row) for row in rows])


def preference(row: Row) -> tuple[bool, int, float, str]:
    """Sorts first what should stay. Held-out clips do, or copies of them would leak into training."""
    return row["split"] != "heldout", -row["width"] * row["height"], -row["duration_seconds"], row["key"]


@dataclass
class Filter(Stage):
    """The thresholds in their order, then the duplicates of what they left; `keep.json` says what each one took."""

    light: ClassVar[bool] = True

    thresholds: dict[str, Range] = field(default_factory=dict)
    """By score: {min: ..., max: ...}; a score without either removes nothing."""
    duplicates: RemoveDuplicates = field(default_factory=RemoveDuplicates)
    shown: int = 12
    """Clips of each filter that were removed, and as many just inside, whose pictures are kept to be looked at."""

    def __post_init__(self) -> None:
        for name, allowed in self.thresholds.items():
            allowed.check(name)

    def apply(self, row: Row, place: Place) -> Iterable[Outcome]:
        """Every row: only all together decide."""
        return [row]

    def finish(self, rows: Iterator[Row], place: Place) -> Iterable[Outcome]:
        """Those that stay, and the others with their reasons."""
        clips = list(rows)
        scores = [row["scores"] for row in clips]
        table = apply_filters(scores, self.thresholds)
        copies = self.find_copies(clips, table)
        filters = show_clips(clips, table, copies, place, self.shown)
        write_json(place.folder / KEEP, table.to_dict() | {"filters": filters, "scores": all_histograms(scores)})
        print(table.text(), flush=True)
        for number, (row, reason) in enumerate(zip(clips, table.reasons, strict=True)):
            copy = copies.get(number)
            about = {"duplicate_of": clips[copy.of]["key"], "distance": copy.distance} if copy else {}
            yield Dropped(row | about, reason) if reason else row

    def find_copies(self, clips: list[Row], table: KeepTable) -> dict[int, Duplicate]:
        """Add the duplicates to the table; by the number of the clip, of all clips that were left."""
        if not self.duplicates.remove:
            return {}
        left = [i for i, name in enumerate(table.removed_by) if not name]
        found = self.duplicates.find([clips[i] for i in left])
        copies = {left[d.number]: Duplicate(left[d.number], left[d.of], d.distance) for d in found}
        alone = len(self.duplicates.find(clips))
        rule = f"at most {self.duplicates.limit} of {BITS} bits apart"
        reasons = ["duplicate of a kept clip" if i in copies else "" for i in range(len(clips))]
        table.add(FilterLine(DUPLICATES, rule, alone, unit="bits"), reasons)
        return copies

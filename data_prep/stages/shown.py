"""Pictures of what each filter removed and of what it just let pass, so that a threshold can be judged by eye."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np

from data_prep.clip_frames import spread_frames
from data_prep.pipeline.rows import Row
from data_prep.pipeline.stage import Place
from data_prep.scores.duplicates import Duplicate
from data_prep.scores.keep import FilterLine, KeepTable, nearest_inside, score_values, spread
from kinema.data.dataset.shards import write_aside
from kinema.data.verbs.contact_sheet import strip_jpeg

PICTURES = "shown"
"""Folder of the pictures, beside keep.json."""
STRIP_FRAMES = 5
READERS = 4


def show_clips(
    clips: list[Row], table: KeepTable, copies: dict[int, Duplicate], place: Place, count: int
) -> list[dict[str, Any]]:
    """The lines of the table as plain values, each with the clips to look at; their pictures are written."""
    chosen = Chosen(clips, table, copies, count)
    lines = [asdict(line) | {"removed": chosen.removed(line), "inside": chosen.inside(line)} for line in table.lines]
    write_strips((clips[i] for i in sorted(chosen.numbers)), place)
    return lines


class Chosen:
    """Which clips of each filter are shown."""

    def __init__(self, clips: list[Row], table: KeepTable, copies: dict[int, Duplicate], count: int) -> None:
        self.clips, self.table, self.copies, self.count = clips, table, copies, count
        self.numbers = set[int]()
        """Of all clips that are shown anywhere."""

    def removed(self, line: FilterLine) -> list[dict[str, Any]]:
        """Evenly spread over the values that it took."""
        taken = [i for i, name in enumerate(self.table.removed_by) if name == line.name]
        if self.copies.keys() >= set(taken):
            pairs = spread(sorted(taken, key=lambda i: self.copies[i].distance), self.count)
            return [self.entry(i, self.copies[i].distance) | {"of": self.entry(self.copies[i].of)} for i in pairs]
        values = self.values(line)
        ordered = sorted(taken, key=lambda i: (np.isnan(values[i]), values[i]))
        return [self.entry(i, values[i]) for i in spread(ordered, self.count)]

    def inside(self, line: FilterLine) -> list[dict[str, Any]]:
        """Nearest to the threshold of those that stay in the end."""
        if not line.bounds:
            return []
        values = self.values(line)
        passed = [not name for name in self.table.removed_by]
        return [self.entry(i, values[i]) for i in nearest_inside(values, passed, line.bounds, self.count)]

    def values(self, line: FilterLine) -> np.ndarray:
        """Of this filter's score, of all clips."""
        return score_values([row["scores"] for row in self.clips], line.name)

    def entry(self, number: int, value: float | None = None) -> dict[str, Any]:
        """One clip as the page shows it."""
        self.numbers.add(number)
        row = self.clips[number]
        shown = None if value is None or np.isnan(value) else float(value)
        return {"key": row["key"], "value": shown, "caption": row["caption"], "picture": picture_name(row)}


def picture_name(row: Row) -> str:
    """Of a clip, relative to keep.json."""
    return f"{PICTURES}/{row['key']}.jpg"


def write_strips(rows: Iterable[Row], place: Place) -> None:
    """A strip of a few frames for each row; decoding leaves Python's lock, so threads are enough."""
    (place.folder / PICTURES).mkdir(exist_ok=True)

    def write(row: Row) -> None:
        frames = spread_frames(place.find(row["clip"]), row["num_frames"], STRIP_FRAMES)
        write_aside(place.folder / picture_name(row), strip_jpeg(frames, STRIP_FRAMES))

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(write, rows))

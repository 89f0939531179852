"""Stage split: videos into shots, by their shot list or where a detector finds cuts."""

import importlib.util
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from data_prep.captions import GUARD, Shot
from data_prep.pipeline.rows import Dropped, Outcome, Row
from data_prep.pipeline.stage import Place, Stage
from data_prep.source_video import decode_frames, to_rgb
from kinema.data.decode.cuts import split_shots

SEARCH_SIZE = (160, 90)
"""Width and height at which cuts are searched; stretched or turned pictures have the same cuts."""
SLACK_SECONDS = 1e-3
"""Matroska rounds timestamps to milliseconds, and people round shot lists likewise."""
DETECTORS = {
    "adaptive": ("AdaptiveDetector", "adaptive_threshold"),
    "content": ("ContentDetector", "threshold"),
    "hash": ("HashDetector", "threshold"),
    "histogram": ("HistogramDetector", "threshold"),
}
"""PySceneDetect's class, and what it calls its threshold."""


@dataclass
class HeldOut:
    """Which clips are held out: the last of every `every` videos, or of every `every` blocks of each video."""

    by: str = "videos"
    """`videos` or `blocks`."""
    every: int = 10
    """0 holds nothing out."""
    block_seconds: float = 20.0
    guard_seconds: float = 2.0
    """Between a held-out block and the nearest training clip."""

    def __post_init__(self) -> None:
        if self.by not in ("videos", "blocks"):
            raise ValueError(f"split.heldout.by={self.by} must be videos or blocks.")
        if self.every < 0 or self.every == 1:
            raise ValueError(f"split.heldout.every={self.every} must be 0 (none), or 2 and more.")

    def split(self, video_number: int, shot: Shot) -> str:
        """`train`, `heldout` or `guard`."""
        if self.every == 0:
            return "train"
        if self.by == "videos":
            return "heldout" if video_number % self.every == self.every - 1 else "train"
        return self.split_by_time(shot)

    def split_by_time(self, shot: Shot) -> str:
        """Clips drawn at random would leak: shots return to the same place and people within seconds.

        A shot inside a held-out block is `heldout`; another one that comes within `guard_seconds` of such a
        block is `guard`, and left out.
        """
        period = self.block_seconds * self.every
        for number in range(int(shot.end_seconds // period) + 2):
            last = (number + 1) * period
            first = last - self.block_seconds
            if shot.start_seconds >= first - SLACK_SECONDS and shot.end_seconds <= last + SLACK_SECONDS:
                return "heldout"
            near = shot.start_seconds < last + self.guard_seconds - SLACK_SECONDS
            if near and shot.end_seconds > first - self.guard_seconds + SLACK_SECONDS:
                return GUARD
        return "train"


@dataclass
class Split(Stage):
    """One row for each shot. Long shots are divided evenly, short ones dropped."""

    detector: str = "adaptive"
    """For videos without a shot list: PySceneDetect's adaptive, content, hash or histogram; `built_in`, Kinema's own;
    or `none`, one shot for each video.
    """
    threshold: float | None = None
    """Of PySceneDetect's detector; null takes the library's."""
    flash_seconds: float = 0.25
    """Two cuts nearer than this are a flash and not a shot (PySceneDetect)."""
    min_seconds: float = 1.0
    max_seconds: float = 10.0
    heldout: HeldOut = field(default_factory=HeldOut)

    def __post_init__(self) -> None:
        if self.detector not in (*DETECTORS, "built_in", "none"):
            raise ValueError(
                f"split.detector={self.detector} is unknown. Use one of {', '.join((*DETECTORS, 'built_in', 'none'))}."
            )
        if self.threshold is not None and self.detector not in DETECTORS:
            raise ValueError(f"split.threshold={self.threshold}: detector={self.detector} has no threshold.")
        if not 0 <= self.min_seconds < self.max_seconds:
            raise ValueError(
                f"split.min_seconds={self.min_seconds} must be from 0 and below split.max_seconds={self.max_seconds}."
            )

    def start(self) -> None:
        """See that the detector is installed."""
        if self.detector in DETECTORS and importlib.util.find_spec("scenedetect") is None:
            raise ValueError(
                f"split.detector={self.detector} needs PySceneDetect: pip install 'kinema[prep]', or type "
                "split.detector=built_in."
            )

    def apply(self, row: Row, place: Place) -> Iterable[Outcome]:
        """A row for each part of each shot."""
        about = {name: value for name, value in row.items() if name != "shots"}
        shots = [Shot(**shot) for shot in row["shots"]] if "shots" in row else self.find(row)
        parts = [part for shot in shots for part in divide(shot, self.max_seconds)]
        for number, part in enumerate(parts):
            part = replace(part, split=part.split or self.heldout.split(row["number"], part))
            shot_row = {**about, **asdict(part), "key": f"{row['key']}-{number:04d}"}
            yield self.sorted_out(shot_row, part)

    def sorted_out(self, row: Row, part: Shot) -> Outcome:
        """The row, or why it is dropped."""
        if part.end_seconds - part.start_seconds < self.min_seconds - SLACK_SECONDS:
            return Dropped(row, "too short")
        if part.split == GUARD:
            return Dropped(row, "in a guard between the splits")
        return row

    def find(self, row: Row) -> list[Shot]:
        """Shots between the cuts of a video, all with its caption; raises UnreadableVideo if any frame is bad."""
        if self.detector == "none":
            return [Shot(0.0, row["duration_seconds"], row["caption"])]
        starts, end = list[float](), 0.0

        def small_pictures() -> Iterator[NDArray[np.uint8]]:
            nonlocal end
            reformatter = VideoReformatter()
            for seconds, shown, frame in decode_frames(Path(row["path"])):
                starts.append(seconds)
                end = seconds + shown
                yield to_rgb(reformatter, frame, SEARCH_SIZE)

        if self.detector == "built_in":
            shots = split_shots(small_pictures())
        else:
            shots = self.detect(small_pictures(), row["fps"])
        edges = [*starts, end]
        return [Shot(edges[first], edges[stop], row["caption"]) for first, stop in shots]

    def detect(self, pictures: Iterable[NDArray[np.uint8]], fps: float) -> list[tuple[int, int]]:
        """[start, stop) of each shot, in frames, by a detector of PySceneDetect."""
        import scenedetect

        class_name, threshold = DETECTORS[self.detector]
        given = {} if self.threshold is None else {threshold: self.threshold}
        flash = max(2, round(self.flash_seconds * fps))
        detector = getattr(scenedetect, class_name)(min_scene_len=flash, **given)
        cuts, count = list[int](), 0
        for count, picture in enumerate(pictures, 1):
            time = scenedetect.FrameTimecode(count - 1, fps)
            cuts += [cut.frame_num for cut in detector.process_frame(time, np.ascontiguousarray(picture[..., ::-1]))]
        cuts += [cut.frame_num for cut in detector.post_process(scenedetect.FrameTimecode(count, fps))]
        return list(pairwise([0, *sorted(set(cuts) - {0}), count]))


def divide(shot: Shot, max_seconds: float) -> list[Shot]:
    """The shot in equal parts of at most `max_seconds`."""
    seconds = shot.end_seconds - shot.start_seconds
    count = max(1, math.ceil(seconds / max_seconds - SLACK_SECONDS))
    edges = [shot.start_seconds + seconds * part / count for part in range(count)]
    pairs = pairwise([*edges, shot.end_seconds])
    return [replace(shot, start_seconds=start, end_seconds=end) for start, end in pairs]

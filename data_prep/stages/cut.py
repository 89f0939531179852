"""Stage cut: each shot becomes a file of the one form that every reader decodes."""

import hashlib
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from data_prep.pipeline.rows import Dropped, Outcome, Row
from data_prep.pipeline.stage import Place, Stage
from data_prep.source_video import Shaper, at_constant_rate, decode_frames
from data_prep.stages.split import SLACK_SECONDS
from kinema.data.encoding import write_video

Frames = NDArray[np.uint8]
"""(T, H, W, 3)"""


@dataclass
class Cut(Stage):
    """Clips as H.264, 8 bits, upright, square pixels, even sides, constant rate by time: all shots of a video in one
    pass.
    """

    bundle: ClassVar[str] = "path"

    fps: float | None = None
    """None keeps each video's own rate, rounded to the usual rate next to it."""
    size: str | None = None
    """WIDTHxHEIGHT: scaled to cover it, the rest cut off evenly. None keeps size and aspect ratio."""
    short_side: int | None = None
    """Shrinks larger videos until their shorter side is this long, and keeps the aspect ratio."""
    crf: float = 18.0
    """x264's quality: 18 looks lossless, lower is larger."""

    def __post_init__(self) -> None:
        if self.size is not None and self.short_side is not None:
            raise ValueError(f"cut.size={self.size} and cut.short_side={self.short_side} exclude each other: give one.")
        if self.short_side is not None and self.short_side < 2:
            raise ValueError(f"cut.short_side={self.short_side} must be at least 2, e.g. 256.")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"cut.fps={self.fps} must be above 0, e.g. 24.")
        self.width_and_height()

    def width_and_height(self) -> tuple[int, int] | None:
        """`size` as two numbers."""
        if self.size is None:
            return None
        match = re.fullmatch(r"(\d+)x(\d+)", self.size)
        if not match or int(match[1]) % 2 or int(match[2]) % 2 or not int(match[1]) * int(match[2]):
            raise ValueError(f"cut.size={self.size} must be WIDTHxHEIGHT with even sides, e.g. 128x64.")
        return int(match[1]), int(match[2])

    def apply(self, row: Row, place: Place) -> Iterable[Outcome]:
        """A clip file for each of a video's shots."""
        left = {shot["key"] for shot in row["members"]}
        for shot, frames, fps in self.clips(row["members"]):
            left.remove(shot["key"])
            yield self.clip_row(shot, frames, fps, place)
        yield from (Dropped(shot, "holds no frame") for shot in row["members"] if shot["key"] in left)

    def clips(self, shots: list[Row]) -> Iterator[tuple[Row, Frames, float]]:
        """The frames of each shot and their rate, in one pass over the video.

        A shot gets the frames whose own time lies in it, so none of its neighbour's slips in at another rate.
        """
        fps = self.fps or shots[0]["fps"]
        shaper = Shaper(shots[0]["stretch"], self.width_and_height(), self.short_side)
        waiting, pictures = deque(shots), list[Frames]()
        converted: tuple[float, Frames] | None = None
        for seconds, _, frame in at_constant_rate(decode_frames(Path(shots[0]["path"])), fps):
            while waiting and seconds >= waiting[0]["end_seconds"] - SLACK_SECONDS:
                shot = waiting.popleft()
                if pictures:
                    yield shot, np.stack(pictures), fps
                pictures = []
            if not waiting:
                return
            if seconds >= waiting[0]["start_seconds"] - SLACK_SECONDS:
                if converted is None or converted[0] != seconds:  # a repeated frame is converted once
                    converted = (seconds, shaper.picture(frame))
                pictures.append(converted[1])
        if pictures:
            yield waiting.popleft(), np.stack(pictures), fps

    def clip_row(self, shot: Row, frames: Frames, fps: float, place: Place) -> Row:
        """Write the clip, and state the facts about it instead of those about its video."""
        path = place.path_for(f"{shot['key']}.mp4")
        write_video(path, frames, fps, crf=self.crf)
        gone = ("frames", "variable_rate", "rotation", "stretch", "colour_space", "colour_transfer")
        return {name: value for name, value in shot.items() if name not in gone} | {
            "clip": place.relative(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "clip_bytes": path.stat().st_size,
            "fps": fps,
            "num_frames": len(frames),
            "width": frames.shape[2],
            "height": frames.shape[1],
            "duration_seconds": len(frames) / fps,
        }

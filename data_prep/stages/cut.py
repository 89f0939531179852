"""Stage cut: each shot becomes a file of the one form that every reader decodes."""

import hashlib
import itertools
import re
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
from kinema.data.decode.encoding import write_pictures

OF_THE_VIDEO = ("frames", "variable_rate", "rotation", "stretch", "colour_space", "colour_transfer")
"""What the stage `probe` found, and no longer holds."""
SAME_RATE = 1e-3
"""Rates that differ by less than this share are one."""
Picture = NDArray[np.uint8]
"""(H, W, 3)"""


@dataclass
class Cut(Stage):
    """Clips as H.264, 8 bits, upright, square pixels, even sides, constant rate by time: all shots of a video in one
    pass.
    """

    version: ClassVar[int] = 2
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
        shots, done = row["members"], set[int]()
        fps = self.fps or shots[0]["fps"]
        for number, group in itertools.groupby(self.pictures(shots, fps), key=lambda found: found[0]):
            done.add(number)
            clip = self.write_clip(shots[number], (picture for _, picture in group), fps, place)
            yield clip | ({"resampled": how} if (how := resampling(shots[number], fps)) else {})
        yield from (Dropped(shot, "holds no frame") for number, shot in enumerate(shots) if number not in done)

    def remark(self, row: Row) -> str:
        """How the clip's frames are others than the video's."""
        return str(row.get("resampled", ""))

    def pictures(self, shots: list[Row], fps: float) -> Iterator[tuple[int, Picture]]:
        """Each picture at this rate that lies in a shot, with the shot's number, in one pass over the video.

        A shot gets the frames whose own time lies in it, so none of its neighbour's slips in at another rate.
        """
        shaper = Shaper(shots[0]["stretch"], self.width_and_height(), self.short_side)
        number, converted = 0, None
        for seconds, _, frame in at_constant_rate(decode_frames(Path(shots[0]["path"])), fps):
            while number < len(shots) and seconds >= shots[number]["end_seconds"] - SLACK_SECONDS:
                number += 1
            if number == len(shots):
                return
            if seconds >= shots[number]["start_seconds"] - SLACK_SECONDS:
                if converted is None or converted[0] != seconds:  # a repeated frame is converted once
                    converted = (seconds, shaper.picture(frame))
                yield number, converted[1]

    def write_clip(self, shot: Row, pictures: Iterator[Picture], fps: float, place: Place) -> Row:
        """Write the clip, and state the facts about it instead of those about its video."""
        path = place.path_for(f"{shot['key']}.mp4")
        first = next(pictures)
        num_frames = write_pictures(path, itertools.chain([first], pictures), fps, crf=self.crf)
        return {name: value for name, value in shot.items() if name not in OF_THE_VIDEO} | {
            "clip": place.relative(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "clip_bytes": path.stat().st_size,
            "fps": fps,
            "num_frames": num_frames,
            "width": first.shape[1],
            "height": first.shape[0],
            "duration_seconds": num_frames / fps,
        }


def resampling(shot: Row, fps: float) -> str:
    """What a constant rate of `fps` makes of a video's frames, or nothing if it leaves them as they are."""
    if shot["variable_rate"]:
        return "variable frame rate made constant"
    if abs(fps - shot["fps"]) <= SAME_RATE * fps:
        return ""
    return "frames left out for a lower rate" if fps < shot["fps"] else "frames repeated for a higher rate"

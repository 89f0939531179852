"""Stage sound: the sound of each clip's stretch of its video, put into the clip's mp4."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from data_prep.pipeline.rows import Outcome, Row
from data_prep.pipeline.stage import Place, Stage
from data_prep.source_sound import read_sound

BLOCK = 1024
"""Samples of a frame of AAC."""


@dataclass
class Sound(Stage):
    """Adds mono AAC beside the pictures, which stay as they are, packet for packet; clips without sound stay whole."""

    rate: int = 48_000
    """Samples a second."""

    def __post_init__(self) -> None:
        if not 8_000 <= self.rate <= 96_000:
            raise ValueError(f"sound.rate={self.rate} must be from 8000 to 96000, e.g. 48000.")

    def apply(self, row: Row, place: Place) -> Iterable[Outcome]:
        """The row, with `sound` if its video has any."""
        if not row.get("audio"):
            return [row]
        sound = read_sound(Path(row["path"]), row["start_seconds"], row["duration_seconds"], self.rate)
        path = place.path_for(f"{row['key']}.mp4")
        add_sound(place.find(row["clip"]), sound, self.rate, path)
        content = path.read_bytes()
        about = {"rate": self.rate, "channels": 1, "loudest": round(float(np.abs(sound).max(initial=0)), 4)}
        digest = hashlib.sha256(content).hexdigest()
        return [row | {"clip": place.relative(path), "clip_bytes": len(content), "sha256": digest, "sound": about}]


def add_sound(clip: Path, sound: NDArray[np.float32], rate: int, out: Path) -> None:
    """Write `out`: the pictures of an mp4 as they are, and mono sound (N,). It appears under its name when whole."""
    unfinished = out.with_name(f".{out.name}.part")
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(str(clip)) as source, av.open(str(unfinished), "w", format="mp4", options=options) as target:
        pictures = target.add_stream_from_template(source.streams.video[0])
        stream = target.add_stream("aac", rate=rate, layout="mono")
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = pictures
                target.mux(packet)
        for first in range(0, len(sound), BLOCK):
            block = av.AudioFrame.from_ndarray(sound[None, first : first + BLOCK], format="fltp", layout="mono")
            block.sample_rate, block.time_base, block.pts = rate, Fraction(1, rate), first
            target.mux(stream.encode(block))
        target.mux(stream.encode())
    os.replace(unfinished, out)

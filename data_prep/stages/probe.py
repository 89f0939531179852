"""Stage probe: what each file holds, and whether it is whole."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import av

from data_prep.pipeline.rows import Dropped, Outcome, Row
from data_prep.pipeline.stage import Place, Stage
from data_prep.source_video import (
    UnreadableVideo,
    decode_frames,
    least_seconds,
    nominal_fps,
    video_stream,
)
from kinema.data.decode.probe import square_pixels

EVEN_STEPS = 1.5
"""A frame shown this many times longer than the usual one makes the frame rate variable."""


@dataclass
class Probe(Stage):
    """Reads header and packets, and decodes the first picture; what is no whole video fails by name."""

    min_side: int = 16
    """Pixels; smaller videos are dropped."""
    max_side: int = 8192
    max_seconds: float = 6 * 3600.0
    max_fps: float = 240.0

    def apply(self, row: Row, place: Place) -> Iterable[Outcome]:
        """The row with size, duration, rate, rotation, colour and sound, unless the video is out of bounds."""
        found = {**row, **probe_video(Path(row["path"]))}
        reason = self.out_of_bounds(found)
        yield Dropped(found, reason) if reason else found

    def out_of_bounds(self, row: Row) -> str:
        """Why a video is not taken, or nothing."""
        if min(row["width"], row["height"]) < self.min_side:
            return "smaller than probe.min_side"
        if max(row["width"], row["height"]) > self.max_side:
            return "larger than probe.max_side"
        if row["duration_seconds"] > self.max_seconds:
            return "longer than probe.max_seconds"
        return "" if row["fps"] <= self.max_fps else "more frames a second than probe.max_fps"


def probe_video(path: Path) -> dict[str, Any]:
    """Facts about a video; raises UnreadableVideo. Sizes are as displayed: upright and with square pixels."""
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            stream = video_stream(container)
            _check_index(stream, path)
            times = _packet_times(container, stream)
            facts = {**_rate(times, stream), **_sound(container)}
            if times[-1] - times[0] < least_seconds(container, stream):
                raise UnreadableVideo(f"cut short: it ends at {times[-1] - times[0]:.2f} s, before its header's end")
            facts |= {"codec": stream.codec_context.name, "pixel_format": stream.codec_context.pix_fmt}
            stretch = float(stream.sample_aspect_ratio or 1)
    except av.FFmpegError as error:
        raise UnreadableVideo(f"cannot be opened: {error}") from error
    return facts | _picture(path, stretch)


def _check_index(stream: av.VideoStream, path: Path) -> None:
    """An mp4's index in front says where each packet lies: all of them must lie in the file."""
    end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if end > (size := path.stat().st_size):
        raise UnreadableVideo(f"cut short: its index leads to byte {end:,} of {size:,}")


def _packet_times(container: Any, stream: av.VideoStream) -> list[float]:
    """Start of each frame in order of time, and the end of the last one."""
    base, shown = float(stream.time_base or 1), 0.0
    times = list[float]()
    for packet in container.demux(stream):
        if packet.pts is not None and packet.size:
            times.append(packet.pts * base)
            shown = (packet.duration or 0) * base
    if not times:
        raise UnreadableVideo("has no frames")
    times.sort()
    return [*times, times[-1] + (shown or (times[-1] - times[0]) / max(1, len(times) - 1))]


def _rate(times: list[float], stream: av.VideoStream) -> dict[str, Any]:
    """Measured on the packets: some programs write the clock's rate into the header."""
    steps = sorted(after - before for before, after in pairwise(times[:-1]))
    seconds, frames = times[-1] - times[0], len(times) - 1
    if not steps or not seconds > 0:
        fps = float(stream.average_rate or 25)
        return {"fps": nominal_fps(fps), "frames": frames, "duration_seconds": 1 / fps, "variable_rate": False}
    usual = steps[len(steps) // 2]
    return {
        "fps": nominal_fps((frames - 1) / sum(steps)),
        "frames": frames,
        "duration_seconds": round(seconds, 6),
        "variable_rate": steps[-1] > EVEN_STEPS * usual,
    }


def _sound(container: Any) -> dict[str, Any]:
    stream = container.streams.audio[0] if container.streams.audio else None
    if stream is None or stream.codec_context is None:
        return {"audio": None}
    return {"audio": {"codec": stream.codec_context.name, "rate": stream.rate, "channels": stream.channels}}


def _picture(path: Path, stretch: float) -> dict[str, Any]:
    """What only a decoded picture tells."""
    frame = next(iter(decode_frames(path))).frame
    width, height = square_pixels(frame.width, frame.height, stretch)
    sideways = frame.rotation // 90 % 2
    return {
        "width": height if sideways else width,
        "height": width if sideways else height,
        "rotation": frame.rotation,
        "stretch": stretch,
        "colour_space": int(frame.colorspace),
        "colour_transfer": int(frame.color_trc),
    }

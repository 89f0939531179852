"""A video's header and packets, read by PyAV without decoding anything: what all decoders are measured against."""

import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinema.data.decode.decoders.video import DecodeError


@dataclass(frozen=True)
class Packets:
    """The packets of the video stream that are shown; a frame's number is its packet's, in order of presentation."""

    width: int
    """Pixels as they are stored, before any turning."""
    height: int
    pixel_aspect: float
    """Width of a stored pixel over its height; 1 where the file does not say."""
    pts: list[int]
    durations: list[int]
    is_key: list[bool]
    seconds_per_tick: float

    @cached_property
    def starts(self) -> NDArray[np.float64]:
        """Seconds at which each frame appears, from 0."""
        return (np.array(self.pts) - self.pts[0]) * self.seconds_per_tick

    @property
    def end(self) -> float:
        """Seconds at which the last frame ends."""
        return (self.pts[-1] - self.pts[0] + self.durations[-1]) * self.seconds_per_tick


def read_packets(mp4: bytes) -> Packets:
    """Header and packets of the first video stream; raises DecodeError where there is none, or a packet is cut."""
    import av

    with av.open(io.BytesIO(mp4), "r") as container:
        stream = only_video_stream(container)
        size, aspect, base = (stream.width, stream.height), stream.sample_aspect_ratio, float(stream.time_base)
        packets = [packet for packet in container.demux(stream) if packet.pts is not None]
    # Decoders that read ahead fail on such a packet or not, by chance: it is an error for all of them.
    if any(packet.is_corrupt for packet in packets):
        raise DecodeError("a packet of the video is not whole: the file was cut short")
    found = [(p.pts, p.duration or 0, p.is_keyframe) for p in packets if not p.is_discard]
    if not found:
        raise DecodeError("the video stream has no frames")
    pts, durations, is_key = (list(column) for column in zip(*sorted(found), strict=True))
    return Packets(*size, float(aspect or 1), pts, durations, is_key, base)


def only_video_stream(container: Any) -> Any:
    """The first video stream of an opened container; raises DecodeError without one that can be decoded."""
    if not container.streams.video:
        raise DecodeError("no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise DecodeError("the video stream is of no known codec")
    return stream

"""Facts of a video as decoders and people see it: upright, with square pixels, at the rate of its timestamps."""

import io
from typing import Any

from kinema.data.decode.decoders.packets import only_video_stream, read_packets
from kinema.data.decode.decoders.video import DecodeError

PROBE_VERSION = 1
"""Raise it when other facts come of the same video: indexes of foreign tars that are kept aside are made anew."""


def probe_video(content: bytes) -> dict[str, Any]:
    """Facts of a record, from the packets and one decoded frame, which alone tells the rotation; raises DecodeError."""
    packets = read_packets(content)
    frames, span = len(packets.pts), float(packets.starts[-1])
    seconds_each = span / (frames - 1) if frames > 1 else packets.end
    if not seconds_each > 0:
        raise DecodeError("the video's timestamps do not rise")
    size = square_pixels(packets.width, packets.height, packets.pixel_aspect)
    width, height = size[::-1] if _lies_on_its_side(content) else size
    # The last frame may be shown shorter than the others, and no frame can be asked for after its end.
    seconds = min(packets.end, frames * seconds_each)
    facts = {"num_frames": frames, "width": width, "height": height}
    return {**facts, "fps": round(1 / seconds_each, 6), "duration_seconds": round(seconds, 6)}


def square_pixels(width: int, height: int, stretch: float) -> tuple[int, int]:
    """Size at which a picture with stretched pixels looks right; the side that is too short grows."""
    return (round(width * stretch), height) if stretch >= 1 else (width, round(height / stretch))


def _lies_on_its_side(content: bytes) -> bool:
    import av

    with av.open(io.BytesIO(content), "r") as container:
        stream = only_video_stream(container)
        stream.codec_context.thread_count = 1
        frame = next(container.decode(stream), None)
        if frame is None:
            raise DecodeError("the video's first frame does not decode")
        return round(frame.rotation / 90) % 2 == 1

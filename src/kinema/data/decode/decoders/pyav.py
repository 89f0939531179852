"""Video through PyAV: it reads every format that FFmpeg reads."""

import io
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinema.data.decode.decoders.packets import Packets, only_video_stream
from kinema.data.decode.decoders.video import BATCH, DecodeError


def read_frames(mp4: bytes, packets: Packets, wanted: list[int]) -> Iterator[NDArray[np.uint8]]:
    """Batches of the wanted frames, decoded from the key frame before the first of them up to the last.

    Frames are told apart by their timestamps, so no count of the container can mislead.
    """
    from av.video.reformatter import VideoReformatter

    waiting = deque(packets.pts[number] for number in wanted)
    missing, early = set(waiting), dict[int, NDArray[np.uint8]]()
    held, reformatter = list[NDArray[np.uint8]](), VideoReformatter()
    for frame in _frames_from(mp4, packets, wanted[0]):
        if frame.pts in missing:  # a file that misstates its B-frames lets them out in another order
            missing.remove(frame.pts)
            early[frame.pts] = _upright(frame, packets, reformatter)
        while waiting and waiting[0] in early:
            held.append(early.pop(waiting.popleft()))
        if held and (len(held) >= BATCH or not waiting):
            yield np.stack(held)
            held = []
        if not waiting:
            return
    raise DecodeError(f"{len(missing)} of the {len(wanted)} frames asked for do not decode")


def _frames_from(mp4: bytes, packets: Packets, first: int) -> Iterator[Any]:
    """Decoded frames from a key frame at or before frame `first`, or from the beginning where seeking overshoots."""
    import av

    key = max((number for number in range(first + 1) if packets.is_key[number]), default=0)
    for seeking in (True, False):
        with av.open(io.BytesIO(mp4), "r") as container:
            stream = only_video_stream(container)
            stream.codec_context.thread_count = 1
            if seeking and key > 0:
                container.seek(packets.pts[key], stream=stream, backward=True)
            frames = container.decode(stream)
            opening = next(frames, None)
            if opening is not None and opening.pts is not None and opening.pts <= packets.pts[first]:
                yield opening
                yield from frames
                return


def _upright(frame: Any, packets: Packets, reformatter: Any) -> NDArray[np.uint8]:
    if (frame.width, frame.height) != (packets.width, packets.height):
        raise DecodeError("the pictures change their size within the video")
    if frame.rotation % 90:
        raise DecodeError(f"the pictures are turned by {frame.rotation} degrees, which is no multiple of 90")
    rgb: NDArray[np.uint8] = reformatter.reformat(frame, format="rgb24").to_ndarray()
    return np.rot90(rgb, frame.rotation // 90)

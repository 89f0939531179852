"""Video through PyAV: it reads every format that FFmpeg reads."""

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinema.data.decoders.packets import only_video_stream, read_packets
from kinema.data.decoders.video import BATCH, DecodeError, Header, OpenVideo


def open_video(mp4: bytes) -> OpenVideo:
    """Frames are told apart by their timestamps, so no count of the container can mislead."""
    packets = read_packets(mp4)
    return OpenVideo(
        packets.header,
        packets.starts,
        packets.end,
        read=lambda indices: _read(mp4, packets.header, [packets.pts[index] for index in indices]),
    )


def _read(mp4: bytes, header: Header, wanted: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
    """Decode from the key frame before the first wanted timestamp up to the last."""
    import av
    from av.video.reformatter import VideoReformatter

    waiting, held, reformatter = list(reversed(wanted)), list[NDArray[np.uint8]](), VideoReformatter()
    with av.open(io.BytesIO(mp4), "r") as container:
        stream = only_video_stream(container)
        stream.codec_context.thread_count = 1
        container.seek(wanted[0], stream=stream, backward=True)
        for frame in container.decode(stream):
            if waiting and frame.pts == waiting[-1]:
                waiting.pop()
                held.append(_upright(frame, header, reformatter))
            if held and (len(held) == BATCH or not waiting):
                yield np.stack(held)
                held = []
            if not waiting:
                return
    raise DecodeError(f"{len(waiting)} of the {len(wanted)} frames asked for do not decode")


def _upright(frame: Any, header: Header, reformatter: Any) -> NDArray[np.uint8]:
    if (frame.width, frame.height) != (header.width, header.height):
        raise DecodeError("the pictures change their size within the video")
    if frame.rotation % 90:
        raise DecodeError(f"the pictures are turned by {frame.rotation} degrees, which is no multiple of 90")
    rgb: NDArray[np.uint8] = reformatter.reformat(frame, format="rgb24").to_ndarray()
    return np.rot90(rgb, frame.rotation // 90)

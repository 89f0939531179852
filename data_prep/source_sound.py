"""Sound of any video that FFmpeg reads, of one stretch of it and at one rate."""

from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

LEAD_SECONDS = 1.0
"""Decoding begins so much before the stretch: codecs need a few packets until they sound right."""


def read_sound(path: Path, start_seconds: float, seconds: float, rate: int) -> NDArray[np.float32]:
    """Mono samples (N,) in [-1, 1] of a stretch, counted from the video's first frame; silence where there are none."""
    sound = np.zeros(round(seconds * rate), np.float32)
    with av.open(str(path)) as container:
        video, stream = container.streams.video[0], container.streams.audio[0]
        first = float((video.start_time or 0) * (video.time_base or 0))
        begin = first + start_seconds
        container.seek(max(0, int((begin - LEAD_SECONDS) * av.time_base)), backward=True)
        resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
        for frame in container.decode(stream):
            if seconds_of(frame) > begin + seconds + LEAD_SECONDS:
                break
            for block in resampler.resample(frame):
                place_block(sound, block.to_ndarray()[0], round((seconds_of(block) - begin) * rate))
    return np.clip(sound, -1, 1)


def seconds_of(frame: av.AudioFrame) -> float:
    """When it begins, by the file's clock; raises ValueError if the file does not say."""
    if frame.time is None:
        raise ValueError("its sound has no timestamps: write it again with ffmpeg")
    return frame.time


def place_block(sound: NDArray[np.float32], block: NDArray[np.float32], at: int) -> None:
    """Write the part of a block that lies inside."""
    first, stop = max(0, at), min(len(sound), at + len(block))
    if first < stop:
        sound[first:stop] = block[first - at : stop - at]

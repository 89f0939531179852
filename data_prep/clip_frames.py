"""Frames of a clip that `cut` wrote: constant rate, upright, every frame where its number says."""

from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from data_prep.scores.sample import PAIRS, Sample, frames_to_sample

Frames = NDArray[np.uint8]
"""(T, H, W, 3)"""


def read_frames(path: Path, numbers: list[int] | None = None) -> Frames:
    """The frames with these rising numbers, or all; raises ValueError if the clip ends before."""
    wanted, pictures = None if numbers is None else set(numbers), list[Frames]()
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for number, frame in enumerate(container.decode(video=0)):
            if wanted is None or number in wanted:
                pictures.append(frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False))
            if numbers is not None and number >= numbers[-1]:
                break
    if not pictures or (numbers is not None and len(pictures) < len(numbers)):
        raise ValueError(f"{path.name} holds only {len(pictures)} of the frames {numbers}: its file changed.")
    return np.stack(pictures)


def read_sample(path: Path, num_frames: int, fps: float, pairs: int = PAIRS) -> Sample:
    """Pairs of near frames, spread over the clip."""
    numbers = frames_to_sample(num_frames, fps, pairs)
    return Sample(read_frames(path, numbers), np.array(numbers) / fps)


def spread_frames(path: Path, num_frames: int, count: int) -> Frames:
    """At most `count` frames, evenly spread, the first and the last among them."""
    numbers = np.unique(np.rint(np.linspace(0, num_frames - 1, count)).astype(int)).tolist()
    return read_frames(path, numbers)

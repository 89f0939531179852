"""What every decoder gives: an opened video whose frames are numbered in presentation order."""

import re
from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BATCH = 32
"""Frames that are held at their full size at a time."""


class Decoder(Enum):
    """Library that decodes the video."""

    decord = "decord"
    torchcodec = "torchcodec"
    pyav = "pyav"


class DecodeError(Exception):
    """A video could not be decoded, or does not hold the frames that were asked of it."""


class DecoderDied(DecodeError):
    """Decoding a video killed its process, or took so long that the process was killed."""


class Header(NamedTuple):
    """What a video says of itself before any frame is decoded."""

    width: int
    """Pixels as they are stored, before any turning."""
    height: int
    pixel_aspect: float
    """Width of a stored pixel over its height; 1 where the file does not say."""


class OpenVideo(NamedTuple):
    """A video opened by one of the libraries."""

    header: Header
    starts: NDArray[np.float64]
    """Seconds at which each frame appears, from 0."""
    end: float
    """Seconds at which the last frame ends."""
    read: Callable[[list[int]], Iterator[NDArray[np.uint8]]]
    """Rising frame numbers -> the frames as RGB (n, H, W, 3), upright, up to BATCH at a time."""


def first_line(error: BaseException) -> str:
    """An error of one of the libraries in one line; equal causes read equal and can be counted."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    # decord begins with a clock time and source line; memory addresses differ from run to run.
    line = re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", line)
    return re.sub(r"0x[0-9a-f]{6,}", "0x", line)[:200]

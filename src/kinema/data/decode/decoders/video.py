"""What all decoders have in common."""

import re
from enum import Enum

BATCH = 32
"""Frames that are held at their full size at a time."""
TIME_TOLERANCE = 1e-3
"""Seconds that a decoder's time of a frame may differ from the file's: containers round to milliseconds."""


class Decoder(Enum):
    """Library that decodes the video."""

    decord = "decord"
    torchcodec = "torchcodec"
    pyav = "pyav"


class DecodeError(Exception):
    """A video could not be decoded, or does not hold the frames that were asked of it."""


class DecoderDied(DecodeError):
    """Decoding a video killed its process, or took so long that the process was killed."""


def first_line(error: BaseException) -> str:
    """An error of one of the libraries in one line; equal causes read equal and can be counted."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    # decord begins with a clock time and source line; memory addresses differ from run to run.
    line = re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", line)
    return re.sub(r"0x[0-9a-f]{6,}", "0x", line)[:200]

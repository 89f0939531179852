"""Video through decord (the `decord2` build), the fastest of the three on short clips."""

import importlib.metadata
import io
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinema.data.decode.decoders.packets import Packets
from kinema.data.decode.decoders.video import BATCH, TIME_TOLERANCE, DecodeError


def read_frames(mp4: bytes, packets: Packets, wanted: list[int]) -> Iterator[NDArray[np.uint8]]:
    """Batches of the wanted frames; decoded is everything from the first frame on, a few at a time to spare memory.

    decord seeks when frames are left out, and then now and then returns a neighbour of the frame asked for
    (seen with decord2 3.4 where key frames follow each other). Without gaps it cannot, and short clips even
    decode faster.
    """
    # fault_tol counts frames that decord made up by repeating others; a fraction this small allows none.
    reader = import_decord().VideoReader(io.BytesIO(mp4), num_threads=1, fault_tol=1e-9)
    starts = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
    if len(starts) != len(packets.pts) or np.abs(starts - starts[0] - packets.starts).max() > TIME_TOLERANCE:
        raise DecodeError("decord's list of frames and times is not that of the file. Type data.decoder=pyav.")
    for first in range(0, wanted[-1] + 1, BATCH):
        numbers = range(first, min(first + BATCH, wanted[-1] + 1))
        frames = take(reader, numbers)
        kept = [number - first for number in wanted if number in numbers]
        if kept:
            yield frames[kept]


def take(reader: Any, numbers: range) -> NDArray[np.uint8]:
    """Neighbouring frames, RGB (n, H, W, 3)."""
    try:
        return reader.get_batch(numbers).asnumpy()
    except Exception as error:
        # decord2 3.4 counts channels as bytes of a padded row by width. Where the padding makes that a whole number
        # above 3 it refuses its own frames: widths such as 16, 24, 48, 72 or 96, and which depends on the processor.
        if "from_size == to_size" in str(error):
            raise DecodeError(
                "decord cannot hand over frames of this width (small, and no multiple of 64). "
                "Type data.decoder=pyav (or --decoder pyav)."
            ) from error
        raise


@cache
def import_decord() -> Any:
    """Import decord where it is first used: after torch, and inside the process that decodes."""
    installed = {str(d.name).lower() for d in importlib.metadata.distributions() if d.name}
    if {"decord", "decord2"} <= installed:
        raise ImportError(
            "Both decord and decord2 are installed and overwrite each other's files. "
            "Type: pip uninstall -y decord decord2 && pip install decord2"
        )
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    return decord

"""Video through torchcodec, which decodes with the machine's own FFmpeg."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinema.data.decode.decoders.packets import Packets
from kinema.data.decode.decoders.video import BATCH, TIME_TOLERANCE, DecodeError


def read_frames(mp4: bytes, packets: Packets, wanted: list[int]) -> Iterator[NDArray[np.uint8]]:
    """Batches of the wanted frames, by number; that they are the right ones is seen by their times."""
    reader = import_torchcodec().VideoDecoder(mp4, dimension_order="NHWC", num_ffmpeg_threads=1)
    if len(reader) != len(packets.pts):
        raise DecodeError(f"torchcodec counts {len(reader)} frames where the file has {len(packets.pts)}")
    for first in range(0, len(wanted), BATCH):
        numbers = wanted[first : first + BATCH]
        batch = reader.get_frames_at(numbers)
        given = batch.pts_seconds.numpy() - reader.metadata.begin_stream_seconds
        if np.abs(given - packets.starts[numbers]).max() > TIME_TOLERANCE:
            raise DecodeError("torchcodec returned frames of other times than those asked for")
        yield batch.data.numpy()


@cache
def import_torchcodec() -> Any:
    """torchcodec's decoders; raises ImportError that says what to install."""
    try:
        import torchcodec.decoders
    except (ImportError, RuntimeError, OSError) as error:  # it raises RuntimeError where FFmpeg's libraries lack
        raise ImportError(
            "data.decoder=torchcodec needs torchcodec and FFmpeg's libraries. Type: pip install 'kinema[torchcodec]' "
            f"and install ffmpeg, or type data.decoder=pyav. ({error})".replace("\n", " ")[:600]
        ) from error
    return torchcodec.decoders

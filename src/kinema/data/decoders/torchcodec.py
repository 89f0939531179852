"""Video through torchcodec, which decodes with the machine's own FFmpeg."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinema.data.decoders.packets import Packets, read_packets
from kinema.data.decoders.video import BATCH, DecodeError, OpenVideo


def open_video(mp4: bytes) -> OpenVideo:
    """torchcodec finds frames by number in its own scan of the file; PyAV's list of times says which to ask for."""
    packets = read_packets(mp4)
    reader = import_torchcodec().VideoDecoder(mp4, dimension_order="NHWC", num_ffmpeg_threads=1)
    if len(reader) != len(packets.pts):
        raise DecodeError(f"torchcodec counts {len(reader)} frames where the file has {len(packets.pts)}")
    return OpenVideo(packets.header, packets.starts, packets.end, read=lambda indices: _read(reader, packets, indices))


def _read(reader: Any, packets: Packets, wanted: list[int]) -> Iterator[NDArray[np.uint8]]:
    starts = packets.starts
    for first in range(0, len(wanted), BATCH):
        numbers = wanted[first : first + BATCH]
        batch = reader.get_frames_at(numbers)
        given = batch.pts_seconds.numpy() - reader.metadata.begin_stream_seconds
        if np.abs(given - starts[numbers]).max() > 1e-4:
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

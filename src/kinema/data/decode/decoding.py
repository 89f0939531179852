"""From mp4 bytes to the frames at given times, through any of the decoders behind one function."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kinema.data.decode.decoders import decord, pyav, torchcodec
from kinema.data.decode.decoders.packets import Packets, read_packets
from kinema.data.decode.decoders.video import DecodeError, Decoder, first_line
from kinema.data.geometry import ClipShape


def decode_clip(
    mp4: bytes,
    shape: ClipShape,
    fps: float,
    start_seconds: float,
    decoder: Decoder,
    *,
    crop: tuple[float, float] = (0.5, 0.5),
    max_mib: float = math.inf,
) -> Tensor:
    """Frames shown nearest to start_seconds + i / fps, cropped to the shape's aspect ratio and resized.

    `crop` places the crop along height and width, from 0 (top, left) to 1; the default is the centre. Frames
    are chosen by timestamp, so a variable frame rate is no special case. Pictures come upright and with square
    pixels, whatever the file stores. A clip whose frames would take more than `max_mib` at their full size is not
    decoded. Returns uint8 (T, H, W, 3); raises DecodeError.
    """
    times = start_seconds + np.arange(shape.frames) / fps
    check_installed(decoder)  # a broken installation is not a damaged clip
    try:
        packets = read_packets(mp4)
        _check_times(times, packets)
        unique, where = np.unique(nearest_frames(packets.starts, times), return_inverse=True)
        check_size(len(unique), packets, max_mib)
        batches = _READ[decoder](mp4, packets, unique.tolist())
        parts = [resize_and_crop(frames, shape, crop, _stretch(packets, frames)) for frames in batches]
    except DecodeError:
        raise
    except Exception as error:  # the libraries' errors share no narrower base
        raise DecodeError(f"{decoder.name}: {first_line(error)}") from error
    return torch.cat(parts)[torch.from_numpy(where)]


def check_installed(decoder: Decoder) -> None:
    """Raise ImportError, with what to type, if the library is missing or its installation broken."""
    if decoder in _IMPORT:
        _IMPORT[decoder]()


def nearest_frames(starts: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.int64]:
    """Number of the frame whose start is nearest to each time; ties go to the earlier frame."""
    middles = (starts[1:] + starts[:-1]) / 2
    # Libraries round timestamps differently; a microsecond is no difference.
    return np.searchsorted(middles + 1e-6, times, side="left")


def resize_and_crop(
    frames: NDArray[np.uint8], shape: ClipShape, crop: tuple[float, float] = (0.5, 0.5), pixel_aspect: float = 1.0
) -> Tensor:
    """uint8 (n, H, W, 3) of any size -> (n, height, width, 3): cut to the aspect ratio, then antialiased
    bilinear.

    `pixel_aspect` is the width of the frames' pixels over their height; the result's are square.
    """
    height, width = frames.shape[1:3]
    scale = min(height / shape.height, width * pixel_aspect / shape.width)
    box = (min(height, round(shape.height * scale)), min(width, round(shape.width * scale / pixel_aspect)))
    top, left = (round((side - part) * place) for side, part, place in zip((height, width), box, crop, strict=True))
    region = torch.from_numpy(frames)[:, top : top + box[0], left : left + box[1]]
    if box == (shape.height, shape.width):
        return region.contiguous()
    resized = F.interpolate(region.permute(0, 3, 1, 2), (shape.height, shape.width), mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1).contiguous()


def _stretch(packets: Packets, frames: NDArray[np.uint8]) -> float:
    """Width of a pixel over its height in upright frames: a quarter turn swaps the two."""
    turned = frames.shape[1:3] == (packets.width, packets.height) and packets.width != packets.height
    return 1 / packets.pixel_aspect if turned else packets.pixel_aspect


def _check_times(times: NDArray[np.float64], packets: Packets) -> None:
    if times[0] < 0 or times[-1] > packets.end + 1e-3:
        raise DecodeError(
            f"frames from {times[0]:.3f} s to {times[-1]:.3f} s were asked of a video that lasts {packets.end:.3f} s"
        )


def check_size(frames: int, packets: Packets, max_mib: float) -> None:
    """Raise DecodeError when so many frames, as RGB, would take more than `max_mib`."""
    width, height = packets.width, packets.height
    mib = frames * width * height * 3 / 2**20
    if mib > max_mib:
        raise DecodeError(
            f"{frames} frames of {width} x {height} take {mib:.0f} MiB, more than data.max_decoded_mib={max_mib:g}"
        )


_READ: dict[Decoder, Callable[[bytes, Packets, list[int]], Iterator[NDArray[np.uint8]]]] = {
    Decoder.decord: decord.read_frames,
    Decoder.torchcodec: torchcodec.read_frames,
    Decoder.pyav: pyav.read_frames,
}
"""(mp4, its packets, rising frame numbers) -> the frames as RGB (n, H, W, 3), upright, up to BATCH at a time."""
_IMPORT: dict[Decoder, Callable[[], Any]] = {
    Decoder.decord: decord.import_decord,
    Decoder.torchcodec: torchcodec.import_torchcodec,
}

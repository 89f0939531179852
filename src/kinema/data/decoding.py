"""From mp4 bytes to the frames at given times, through decord or PyAV behind one function."""

import importlib.metadata
import io
import re
from collections.abc import Callable, Sequence
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kinema.data.geometry import ClipShape

DECORD_BATCH = 32
"""Frames that are decoded in one call."""


class Decoder(Enum):
    """Library that decodes the video."""

    decord = "decord"
    pyav = "pyav"


class DecodeError(Exception):
    """A video could not be decoded, or does not hold the frames that were asked of it."""


class OpenVideo(NamedTuple):
    """A video opened by either library; frames are numbered in presentation order."""

    starts: NDArray[np.float64]
    """Seconds at which each frame appears, from 0."""
    end: float
    """Seconds at which the last frame ends."""
    read: Callable[[list[int]], NDArray[np.uint8]]
    """Rising frame numbers -> RGB (n, H, W, 3)."""


def decode_clip(
    mp4: bytes,
    shape: ClipShape,
    fps: float,
    start_seconds: float,
    decoder: Decoder,
    *,
    crop: tuple[float, float] = (0.5, 0.5),
) -> Tensor:
    """Frames shown nearest to start_seconds + i / fps, cropped to the shape's aspect ratio and resized.

    `crop` places the crop along height and width, from 0 (top, left) to 1; the default is the centre. Frames
    are chosen by timestamp, so a variable frame rate is no special case. Returns uint8 (T, H, W, 3); raises
    DecodeError.
    """
    times = start_seconds + np.arange(shape.frames) / fps
    if decoder is Decoder.decord:
        _import_decord()  # a broken installation is not a damaged clip
    try:
        video = _OPEN[decoder](mp4)
        _check_times(times, video)
        indices = nearest_frames(video.starts, times)
        unique, where = np.unique(indices, return_inverse=True)
        frames = video.read(unique.tolist())
    except DecodeError:
        raise
    except Exception as error:  # the libraries' errors share no narrower base
        raise DecodeError(f"{decoder.name}: {_first_line(error)}") from error
    return resize_and_crop(frames, shape, crop)[torch.from_numpy(where)]


def nearest_frames(starts: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.int64]:
    """Number of the frame whose start is nearest to each time; ties go to the earlier frame."""
    middles = (starts[1:] + starts[:-1]) / 2
    # Libraries round timestamps differently; a microsecond is no difference.
    return np.searchsorted(middles + 1e-6, times, side="left")


def resize_and_crop(frames: NDArray[np.uint8], shape: ClipShape, crop: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """uint8 (n, H, W, 3) of any size -> (n, height, width, 3): cut to the aspect ratio, then antialiased
    bilinear.
    """
    height, width = frames.shape[1:3]
    scale = min(height / shape.height, width / shape.width)
    box = (min(height, round(shape.height * scale)), min(width, round(shape.width * scale)))
    top, left = (round((side - part) * place) for side, part, place in zip((height, width), box, crop, strict=True))
    region = torch.from_numpy(frames)[:, top : top + box[0], left : left + box[1]]
    if box == (shape.height, shape.width):
        return region.contiguous()
    resized = F.interpolate(region.permute(0, 3, 1, 2), (shape.height, shape.width), mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1).contiguous()


def _check_times(times: NDArray[np.float64], video: OpenVideo) -> None:
    if times[0] < 0 or times[-1] > video.end + 1e-3:
        raise DecodeError(
            f"frames from {times[0]:.3f} s to {times[-1]:.3f} s were asked of a video that lasts {video.end:.3f} s"
        )


def _open_decord(mp4: bytes) -> OpenVideo:
    decord = _import_decord()
    # fault_tol counts frames that decord made up by repeating others; a fraction this small allows none.
    reader = decord.VideoReader(io.BytesIO(mp4), num_threads=1, fault_tol=1e-9)
    spans = reader.get_frame_timestamp(range(len(reader))).astype(np.float64)
    return OpenVideo(
        starts=spans[:, 0] - spans[0, 0],
        end=float(spans[-1, 1] - spans[0, 0]),
        read=lambda indices: _read_decord(reader, indices),
    )


def _read_decord(reader: Any, wanted: Sequence[int]) -> NDArray[np.uint8]:
    """Decode from the first frame of the video to the last wanted one, a few at a time to spare memory.

    decord seeks when frames are left out, and then now and then returns a neighbour of the frame asked for
    (seen with decord2 3.4 where key frames follow each other). Without gaps it cannot, and short clips even
    decode faster.
    """
    kept = []
    for first in range(0, wanted[-1] + 1, DECORD_BATCH):
        numbers = range(first, min(first + DECORD_BATCH, wanted[-1] + 1))
        frames = _batch(reader, numbers)
        kept.append(frames[[number - first for number in wanted if number in numbers]])
    return np.concatenate(kept)


def _batch(reader: Any, numbers: range) -> NDArray[np.uint8]:
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


def _open_pyav(mp4: bytes) -> OpenVideo:
    import av

    with av.open(io.BytesIO(mp4), "r") as container:
        stream = _only_video_stream(container)
        base = float(stream.time_base)
        packets = [(p.pts, p.duration or 0) for p in container.demux(stream) if p.pts is not None and not p.is_discard]
    if not packets:
        raise DecodeError("the video stream has no frames")
    packets.sort()
    pts = [pts for pts, _ in packets]
    starts = (np.array(pts) - pts[0]) * base
    return OpenVideo(
        starts=starts,
        end=float(starts[-1] + packets[-1][1] * base),
        read=lambda indices: _read_pyav(mp4, [pts[index] for index in indices]),
    )


def _read_pyav(mp4: bytes, wanted: Sequence[int]) -> NDArray[np.uint8]:
    """Decode from the key frame before the first wanted timestamp up to the last."""
    import av
    from av.video.reformatter import VideoReformatter

    missing, found, reformatter = set(wanted), {}, VideoReformatter()
    with av.open(io.BytesIO(mp4), "r") as container:
        stream = _only_video_stream(container)
        stream.codec_context.thread_count = 1
        container.seek(wanted[0], stream=stream, backward=True)
        for frame in container.decode(stream):
            if frame.pts in missing:
                rgb = reformatter.reformat(frame, format="rgb24").to_ndarray()
                found[frame.pts] = np.rot90(rgb, frame.rotation // 90) if frame.rotation else rgb
                missing.remove(frame.pts)
            if not missing:
                break
    if missing:
        raise DecodeError(f"{len(missing)} of the {len(wanted)} frames asked for do not decode")
    return np.stack([found[pts] for pts in wanted])


def _only_video_stream(container: Any) -> Any:
    if not container.streams.video:
        raise DecodeError("no video stream")
    return container.streams.video[0]


@cache
def _import_decord() -> Any:
    """Import decord where it is first used: after torch, and inside the worker process."""
    installed = {str(d.name).lower() for d in importlib.metadata.distributions() if d.name}
    if {"decord", "decord2"} <= installed:
        raise ImportError(
            "Both decord and decord2 are installed and overwrite each other's files. "
            "Type: pip uninstall -y decord decord2 && pip install decord2"
        )
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    return decord


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    # Without decord's clock times and source lines, equal causes read equal and can be counted.
    return re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", line)[:200]


_OPEN = {Decoder.decord: _open_decord, Decoder.pyav: _open_pyav}

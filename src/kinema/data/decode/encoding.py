"""Frames to H.264 mp4 files, the same bytes every time."""

import os
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor  # which a program that only writes videos need not load

FRAME_TICKS = 90_000
"""Time base of the video stream: every usual frame rate is a whole number of ticks, or within 11
microseconds.
"""


def write_video(
    path: str | Path,
    frames: "Tensor | NDArray[np.uint8]",
    fps: float,
    *,
    crf: float = 18,
    audio: NDArray[np.float32] | None = None,
    sample_rate: int = 16_000,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write uint8 RGB frames (T, H, W, 3) as H.264 yuv420p, and mono `audio` (N,) in [-1, 1] as AAC.

    `crf` is x264's quality: 18 looks lossless, lower is larger. `metadata` goes into the file under the
    given names (see `read_metadata`). Equal input gives equal bytes: one thread, no clock. Groups of
    pictures are closed and at most a second long, without B-frames, so that a reader never needs to look
    far. The file appears under its name only when whole.

    Raises ValueError for another dtype or layout, odd sides, or a frame rate that is not positive.
    """
    pictures = _checked(frames)
    write_pictures(path, pictures, fps, crf=crf, audio=audio, sample_rate=sample_rate, metadata=metadata)


def write_pictures(
    path: str | Path,
    pictures: Iterable[NDArray[np.uint8]],
    fps: float,
    *,
    crf: float = 18,
    audio: NDArray[np.float32] | None = None,
    sample_rate: int = 16_000,
    metadata: dict[str, str] | None = None,
) -> int:
    """`write_video` for a stream of uint8 pictures (H, W, 3) of one size; returns how many there were.

    Raises ValueError for no picture at all, odd sides, or a frame rate that is not positive.
    """
    stream, path = iter(pictures), Path(path)
    first = next(stream, None)
    if first is None:
        raise ValueError(f"{path.name}: a video needs at least one picture.")
    _check_form(first, fps)
    unfinished = path.with_name(f".{path.name}.part")
    try:
        with av.open(
            str(unfinished),
            "w",
            format="mp4",
            options={"movflags": "+faststart+use_metadata_tags", "fflags": "+bitexact"},
        ) as container:
            container.metadata.update(metadata or {})
            video = _add_video(container, first.shape[:2], fps, crf)
            sound = _add_sound(container, sample_rate) if audio is not None else None
            count = _encode_pictures(container, video, chain([first], stream))
            if sound is not None and audio is not None:
                _encode_sound(container, sound, audio)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return count


def encode_video(
    frames: "Tensor | NDArray[np.uint8]",
    fps: float,
    *,
    crf: float = 18,
    audio: NDArray[np.float32] | None = None,
    sample_rate: int = 16_000,
    metadata: dict[str, str] | None = None,
) -> bytes:
    """The bytes `write_video` would write."""
    # Through a file: moving the index to the front ("faststart") reopens the output, which memory cannot do.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, frames, fps, crf=crf, audio=audio, sample_rate=sample_rate, metadata=metadata)
        return path.read_bytes()


def read_metadata(path: str | Path) -> dict[str, str]:
    """The names and values that `write_video` was given as metadata, and the muxer's own few."""
    with av.open(str(path), metadata_errors="strict") as container:
        return dict(container.metadata)


def _checked(frames: "Tensor | NDArray[np.uint8]") -> NDArray[np.uint8]:
    pictures = frames if isinstance(frames, np.ndarray) else frames.cpu().numpy()
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3 or len(pictures) == 0:
        raise ValueError(
            f"frames of type {pictures.dtype} and shape {pictures.shape} must be uint8 (T >= 1, H, W, 3). "
            "Model output goes through kinema.data.pixels.to_uint8."
        )
    return pictures


def _check_form(picture: NDArray[np.uint8], fps: float) -> None:
    height, width = picture.shape[:2]
    if height % 2 or width % 2:
        raise ValueError(
            f"height={height} width={width} must both be even: yuv420p halves the colour planes. "
            f"Crop to {height - height % 2} x {width - width % 2}."
        )
    if not fps > 0:
        raise ValueError(f"fps={fps} must be above 0.")


def _add_video(
    container: av.container.OutputContainer, size: tuple[int, ...], fps: float, crf: float
) -> av.VideoStream:
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
    stream.height, stream.width = size
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    stream.time_base = context.time_base = Fraction(1, FRAME_TICKS)
    context.thread_count = 1  # slices, and so bytes, depend on the number of threads
    context.gop_size = max(1, int(fps))
    context.flags |= av.codec.context.Flags.bitexact | av.codec.context.Flags.closed_gop
    # Readers disagree about untagged files: these pictures are BT.601, limited range, 6 and 1 in ITU-T H.273.
    context.colorspace = context.color_primaries = context.color_trc = 6
    context.color_range = 1
    stream.options = {"crf": str(crf), "preset": "veryfast", "bf": "0"}
    return stream


def _add_sound(container: av.container.OutputContainer, sample_rate: int) -> av.AudioStream:
    stream = container.add_stream("aac", rate=sample_rate, layout="mono")
    stream.codec_context.flags |= av.codec.context.Flags.bitexact
    return stream


def _encode_pictures(
    container: av.container.OutputContainer, stream: av.VideoStream, pictures: Iterable[NDArray[np.uint8]]
) -> int:
    ticks = FRAME_TICKS / Fraction(stream.codec_context.framerate)
    reformatter = VideoReformatter()  # one for all frames: setting it up costs more than using it
    count = 0
    for index, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = reformatter.reformat(
            frame, format="yuv420p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG
        )
        frame.time_base = Fraction(1, FRAME_TICKS)
        frame.pts = round(index * ticks)
        frame.duration = round((index + 1) * ticks) - frame.pts
        container.mux(stream.encode(frame))
        count += 1
    container.mux(stream.encode())
    return count


def _encode_sound(container: av.container.OutputContainer, stream: av.AudioStream, audio: NDArray[np.float32]) -> None:
    samples = av.AudioFrame.from_ndarray(audio.astype(np.float32)[None], format="fltp", layout="mono")
    samples.sample_rate = stream.codec_context.sample_rate
    samples.time_base, samples.pts = Fraction(1, samples.sample_rate), 0
    blocks = av.AudioFifo()
    blocks.write(samples)
    for block in blocks.read_many(1024, partial=True):  # AAC's frame
        container.mux(stream.encode(block))
    container.mux(stream.encode())

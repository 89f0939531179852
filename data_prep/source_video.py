"""Frames of any video that FFmpeg reads: upright, square pixels, 8-bit RGB, at a constant rate by time."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import Colorspace, VideoReformatter
from numpy.typing import NDArray

from data_prep.pipeline.rows import RowFailed
from kinema.data.decode.probe import square_pixels

NOMINAL_FPS = tuple(
    [n * 1000 / 1001 for n in (24, 30, 60, 120)]
    + [5, 6, 8, 10, 12, 12.5, 15, 16, 20, 24, 25, 30, 48, 50, 60, 90, 100, 120]
)
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # ITU-T H.273
UNSPECIFIED_COLORSPACE = 2  # ITU-T H.273
TIE_SECONDS = 1e-6
"""Two frames this equally near are a tie, which goes to the earlier one."""


class UnreadableVideo(RowFailed):
    """A video that cannot become clips; the reason is the message."""


class TimedFrame(NamedTuple):
    """A decoded frame, seconds from the video's first one, and how long it is shown."""

    seconds: float
    shown: float
    frame: av.VideoFrame


def nominal_fps(average: float) -> float:
    """The usual frame rate within 1 % of an average rate, else the average in whole frames (at least 1)."""
    nearest = min(NOMINAL_FPS, key=lambda fps: abs(fps - average))
    return float(nearest) if abs(nearest - average) <= 0.01 * average else float(max(1, round(average)))


def decode_frames(path: Path) -> Iterator[TimedFrame]:
    """All frames of a video in order of time.

    Raises UnreadableVideo for a damaged frame, for timestamps that are missing or run backwards, for an end
    well before the one that the header promises, and for HDR or interlaced pictures.
    """
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            stream = video_stream(container)
            stream.thread_type = "AUTO"
            frames = map(_checked, container.decode(stream))
            yield from _timed(frames, least_seconds(container, stream), 1 / float(stream.average_rate or 25))
    except av.FFmpegError as error:
        raise UnreadableVideo(f"cannot be decoded: {error}") from error


def at_constant_rate(frames: Iterable[TimedFrame], fps: float) -> Iterator[TimedFrame]:
    """For times 0, 1 / fps, 2 / fps, ... the frame that is nearest in time.

    Frames are repeated or left out as needed, so speed is kept whatever the timestamps.
    """
    step, held = 0, None
    for timed in frames:
        if held is not None:
            while step / fps <= (held.seconds + timed.seconds) / 2 + TIE_SECONDS:
                yield held
                step += 1
        held = timed
    while held is not None and step + 0.5 < (held.seconds + held.shown) * fps:
        yield held
        step += 1


class Shaper:
    """Turns decoded frames of one video into upright RGB pictures with square pixels and even sides.

    With `size` (width, height) a picture is scaled to cover it and the rest cut off evenly; with `short_side`
    larger pictures are shrunk until their shorter side is that long and keep their shape.
    """

    def __init__(self, stretch: float, size: tuple[int, int] | None = None, short_side: int | None = None):
        self.stretch, self.size, self.short_side = stretch, size, short_side
        self.reformatter = VideoReformatter()  # one for all frames: setting it up costs more than using it

    def picture(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        """RGB uint8 (H, W, 3); raises UnreadableVideo for a rotation that is not a multiple of 90 degrees."""
        if frame.rotation % 90:
            raise UnreadableVideo(f"is turned by no multiple of 90 degrees: rotation={frame.rotation}")
        turns = frame.rotation // 90 % 4
        width, height = square_pixels(frame.width, frame.height, self.stretch)
        scaled, kept = self.fit((height, width) if turns % 2 else (width, height))
        rgb = to_rgb(self.reformatter, frame, scaled[::-1] if turns % 2 else scaled)
        left, top = (scaled[0] - kept[0]) // 2, (scaled[1] - kept[1]) // 2
        # PyAV leaves turning to its caller; both it and rot90 count counter-clockwise.
        return np.ascontiguousarray(np.rot90(rgb, turns)[top : top + kept[1], left : left + kept[0]])

    def fit(self, upright: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """(size to scale to, size to keep of it) for an upright (width, height); what is kept is even."""
        width, height = upright
        if self.size is not None:
            factor = max(self.size[0] / width, self.size[1] / height)
            return (
                max(self.size[0], round(width * factor)),
                max(self.size[1], round(height * factor)),
            ), self.size
        factor = min(1.0, self.short_side / min(upright)) if self.short_side else 1.0
        scaled = round(width * factor), round(height * factor)
        return scaled, (scaled[0] // 2 * 2, scaled[1] // 2 * 2)


def to_rgb(reformatter: VideoReformatter, frame: av.VideoFrame, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The frame as RGB uint8 (H, W, 3), scaled to `size` (width, height), not turned."""
    # Untagged video is BT.709 from 720 lines on, by custom; None leaves it to the frame's own tag.
    custom = Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601
    scaled = reformatter.reformat(
        frame,
        width=size[0],
        height=size[1],
        format="rgb24",
        src_colorspace=custom if frame.colorspace == UNSPECIFIED_COLORSPACE else None,
        interpolation="AREA" if size[0] * size[1] < frame.width * frame.height else "BICUBIC",
    )
    return scaled.to_ndarray().astype(np.uint8, copy=False)


def _checked(frame: av.VideoFrame) -> av.VideoFrame:
    if frame.is_corrupt or frame.time is None:
        raise UnreadableVideo(f"a frame {'is damaged' if frame.is_corrupt else 'has no timestamp'}")
    if frame.color_trc in HDR_TRANSFERS:
        raise UnreadableVideo(f"is HDR ({HDR_TRANSFERS[frame.color_trc]}); map it to SDR with ffmpeg first")
    if frame.interlaced_frame:
        raise UnreadableVideo("is interlaced; write it again with: ffmpeg -i IN -vf bwdif OUT")
    return frame


def _timed(frames: Iterable[av.VideoFrame], least_seconds: float, usual: float) -> Iterator[TimedFrame]:
    first, held, shown = None, None, usual
    for frame in frames:
        first = frame.time if first is None else first
        seconds = frame.time - first
        if held is not None:
            shown = seconds - held[0]
            if shown <= 0:
                raise UnreadableVideo(f"timestamps run backwards: at {seconds:.2f} s; write it again with ffmpeg")
            yield TimedFrame(held[0], shown, held[1])
        held = (seconds, frame)
    if held is None:
        raise UnreadableVideo("has no frames")
    seconds, frame = held
    stated = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else shown
    if seconds + stated < least_seconds:
        raise UnreadableVideo(f"cut short: it ends at {seconds + stated:.2f} s, before its header's end")
    yield TimedFrame(seconds, stated, frame)


def video_stream(container: Any) -> av.VideoStream:
    """The first video stream of an open file; raises UnreadableVideo without one."""
    if not container.streams.video:
        raise UnreadableVideo("has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise UnreadableVideo("has a codec that FFmpeg does not know")
    return stream


def least_seconds(container: Any, stream: av.VideoStream) -> float:
    """Seconds that a whole file has at least, by its header; 0 if it says nothing.

    Matroska states only the longest of all its streams, and headers are a little off: some slack is left.
    """
    if stream.duration and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
        return seconds - max(0.5, 0.02 * seconds)
    seconds = (container.duration or 0) / av.time_base
    return seconds - max(2.0, 0.10 * seconds)

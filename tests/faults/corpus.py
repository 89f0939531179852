"""Inputs that are wrong in every way that videos and shards have been seen to be wrong, the same for every seed."""

import io
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import av
import numpy as np

from kinema.data.decode.encoding import encode_video
from tests.unit.clips import numbered_video

TIMES = [i / 10 for i in range(20)]
EXTREMES = (0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
TABLES = (b"stts", b"stsz", b"stco", b"stsc", b"stsd", b"stss", b"mdhd", b"mvhd", b"tkhd", b"elst", b"hdlr", b"avcC")


@dataclass(frozen=True)
class Mutant:
    """One input, and what was done to it."""

    name: str
    kind: str
    content: bytes


@cache
def seeds() -> tuple[bytes, ...]:
    """Whole videos of 2 s, about 3 to 30 kB each, from which the mutants are made."""
    noise = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    tone = np.sin(np.arange(32_000) / 10).astype(np.float32)
    return (
        encode_video(noise, 10),
        encode_video(noise, 10, audio=tone),
        numbered_video(TIMES, b_frames=3),
        numbered_video(TIMES, codec="mpeg4", size=(64, 128)),
        numbered_video(TIMES, container_format="matroska"),
        numbered_video(TIMES, container_format="mpegts", size=(64, 128)),
    )


def mutants(count: int, seed: int = 0, without: tuple[str, ...] = ()) -> Iterator[Mutant]:
    """So many inputs, the kinds in turn."""
    draw = random.Random(seed)
    kinds = [(kind, mutate) for kind, mutate in MUTATIONS.items() if kind not in without]
    for number in range(count):
        kind, mutate = kinds[number % len(kinds)]
        yield Mutant(f"input-{number:05d}", kind, mutate(draw, draw.choice(seeds())))


def truncated(draw: random.Random, video: bytes) -> bytes:
    return video[: draw.randrange(len(video))]


def flipped(draw: random.Random, video: bytes, first: int = 0, last: int | None = None, most: int = 12) -> bytes:
    changed = bytearray(video)
    for _ in range(draw.randint(1, most)):
        changed[draw.randrange(first, last or len(video))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def flipped_header(draw: random.Random, video: bytes) -> bytes:
    at = video.find(b"moov")
    if at < 0:
        return flipped(draw, video, 0, 400)
    size = struct.unpack(">I", video[at - 4 : at])[0]
    return flipped(draw, video, at, min(at + size, len(video)))


def flipped_payload(draw: random.Random, video: bytes) -> bytes:
    at = max(video.find(b"mdat"), 400)
    return flipped(draw, video, at, most=40)


def extreme_table(draw: random.Random, video: bytes) -> bytes:
    """A number of one of the header's tables becomes an extreme one: sizes, counts, offsets, durations, rates."""
    places = [video.find(kind) for kind in TABLES if kind in video]
    if not places:
        return flipped_header(draw, video)
    at = draw.choice(places) + 4 * draw.randint(-1, 8)
    return video[:at] + struct.pack(">I", draw.choice(EXTREMES)) + video[at + 4 :]


def endless(draw: random.Random, video: bytes) -> bytes:
    """Duration, and the time that a frame is shown, as long as the format can say."""
    for kind, offset in ((b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24), (b"stts", 16)):
        at = video.find(kind)
        if at >= 0 and (kind == b"stts" or draw.random() < 0.7):
            video = video[: at + offset - 4] + struct.pack(">I", 0x7FFFFFFF) + video[at + offset :]
    return video


def absurd_fps(draw: random.Random, video: bytes) -> bytes:
    """A clock of four billion ticks a second, or of one tick in all."""
    at = video.find(b"mdhd")
    return video if at < 0 else video[: at + 16] + struct.pack(">I", draw.choice((1, 0xFFFFFFFF))) + video[at + 20 :]


def huge_header(draw: random.Random, video: bytes) -> bytes:
    """A photograph as a film of one frame whose own header says 65,000 x 65,000."""
    jpeg = bytearray(still("mjpeg", 64, 64, "yuvj420p"))
    side = draw.choice((8192, 30_000, 65_000))
    for at in range(len(jpeg) - 9):
        if jpeg[at : at + 2] == b"\xff\xc0":
            jpeg[at + 5 : at + 9] = struct.pack(">HH", side, side)
    return bytes(jpeg)


@cache
def still(codec: str, width: int, height: int, pix_fmt: str) -> bytes:
    """Two seconds of black."""
    target = io.BytesIO()
    with av.open(target, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.options = {"preset": "ultrafast"} if codec == "libx264" else {}
        for number in range(len(TIMES)):
            frame = av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return target.getvalue()


def bomb(draw: random.Random, video: bytes) -> bytes:
    """Black frames of 2048 x 2048: some kilobytes that become a quarter of a gigabyte."""
    return still("libx264", 2048, 2048, "yuv420p")


@cache
def sound_only() -> bytes:
    target = io.BytesIO()
    with av.open(io.BytesIO(seeds()[1])) as source, av.open(target, "w", format="mp4") as container:
        stream = container.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    return target.getvalue()


def zero_frames(draw: random.Random, video: bytes) -> bytes:
    """A header without samples: every count of the sample tables is 0."""
    for kind, offset in ((b"stts", 8), (b"stsz", 12), (b"stco", 8), (b"stsc", 8)):
        at = video.find(kind)
        if at >= 0:
            video = video[: at + offset] + bytes(4) + video[at + offset + 4 :]
    return video


def wrong_extension(draw: random.Random, video: bytes) -> bytes:
    return draw.choice(
        (b"<html>not found</html>", b"\x89PNG\r\n\x1a\n" + bytes(90), b'{"a": 1}', b"\x80\x04\x95", bytes(999))
    )


MUTATIONS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "sound": lambda draw, video: video,
    "truncated": truncated,
    "flipped bits": flipped,
    "flipped header": flipped_header,
    "flipped payload": flipped_payload,
    "extreme table": extreme_table,
    "empty": lambda draw, video: b"",
    "wrong extension": wrong_extension,
    "zero frames": zero_frames,
    "1x1": lambda draw, video: still("ffv1", 1, 1, "bgr0"),
    "huge header": huge_header,
    "endless duration": endless,
    "absurd frame rate": absurd_fps,
    "no video stream": lambda draw, video: sound_only(),
    "bomb": bomb,
    "flipped header again": flipped_header,
    "extreme table again": extreme_table,
}

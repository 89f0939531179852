"""Small data sets for the tests of the data room: every frame has its number painted in.

The videos are 64 pixels wide, a width that decord hands over on any processor.
"""

import hashlib
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from kinema.data.dataset.sample import ClipRecord
from kinema.data.dataset.shards import DatasetIndex, ShardWriter
from kinema.data.geometry import ClipShape, Geometry
from kinema.data.steps.candidates import plan_clips
from kinema.data.steps.plan import Plan
from kinema.data.steps.stages import Stage

GEOMETRY = Geometry(temporal_stride=4, spatial_stride=8, patch_size=(1, 1, 1))
SHAPES = [ClipShape(9, 32, 32), ClipShape(5, 32, 32)]
TICKS = 90_000


def numbered_video(
    times: list[float],
    *,
    size: tuple[int, int] = (64, 64),
    b_frames: int = 0,
    container_format="mp4",
    codec="libx264",
    pix_fmt="yuv420p",
    key_every: int = 12,
    pixel_aspect: Fraction | None = None,
) -> bytes:
    """Video whose frame i appears at times[i] seconds, with i painted as eight bars (read it with
    `numbers`); H.264 in mp4 unless told otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "clip")
        with av.open(path, "w", format=container_format) as container:
            stream = container.add_stream(codec, rate=30)
            stream.width, stream.height, stream.pix_fmt = size[1], size[0], pix_fmt
            context = stream.codec_context
            context.time_base = Fraction(1, TICKS if codec == "libx264" else 1000)
            context.gop_size = key_every
            if pixel_aspect is not None:
                context.sample_aspect_ratio = pixel_aspect
            # No choice is left to the encoder, or it would leave the B-frames out.
            x264 = f"crf=4:keyint={key_every}:bframes={b_frames}:b-adapt=0:scenecut=0:threads=1"
            stream.options = {"x264-params": x264} if codec == "libx264" else {"qscale": "2"}
            columns = np.arange(size[1]) * 8 // size[1]
            for index, seconds in enumerate(times):
                bars = np.array([index >> bit & 1 for bit in range(8)], np.uint8)[columns]
                picture = np.broadcast_to(255 * bars[None, :, None], (*size, 3)).copy()
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.time_base = context.time_base
                frame.pts = round(seconds / context.time_base)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return Path(path).read_bytes()


def quarter_turned(mp4: bytes) -> bytes:
    """Write a 90 degree rotation into the track header's matrix, as telephones do."""
    upright = b"".join(n.to_bytes(4, "big", signed=True) for n in (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000))
    turned = b"".join(n.to_bytes(4, "big", signed=True) for n in (0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000))
    at = mp4.index(upright, mp4.index(b"tkhd"))
    return mp4[:at] + turned + mp4[at + len(turned) :]


def numbers(frames) -> list[int]:
    """Frame numbers painted by `numbered_video`."""
    bits = frames.float().mean(dim=(1, 3)).unflatten(1, (8, -1)).mean(dim=2) > 127
    return (bits.int() * 2 ** torch.arange(8)).sum(dim=1).tolist()


def record(key: str, mp4: bytes, **facts) -> ClipRecord:
    """A whole record with ordinary facts."""
    values = {
        "caption": f"caption of {key}",
        "fps": 10.0,
        "num_frames": 20,
        "width": 64,
        "height": 64,
        "duration_seconds": 2.0,
        "source": "test",
        "license": "CC0-1.0",
        "consent": "synthetic",
        "split": "train",
        "sha256": hashlib.sha256(mp4).hexdigest(),
    }
    return ClipRecord(key=key, **{**values, **facts})


def build(folder, clips: int, *, per_shard: int = 4, damaged=(), **facts) -> DatasetIndex:
    """Clips of 2 s at 10 fps; the mp4s numbered in `damaged` are cut in half before they are written."""
    mp4 = numbered_video([i / 10 for i in range(20)])
    with ShardWriter(folder, max_samples=per_shard) as writer:
        for number in range(clips):
            content = mp4[: len(mp4) // 2] if number in damaged else mp4
            varied = {name: value(number) if callable(value) else value for name, value in facts.items()}
            writer.write(record(f"clip-{number:03d}", content, **varied), content)
    return DatasetIndex.load(folder)


def make_plan(index: DatasetIndex, *, seed=0, lanes=2, clips_per_step=4, max_pack_tokens=4096, block=2, shapes=SHAPES):
    """The plan of all clips of an index at 8 fps."""
    clips, _ = plan_clips(index, shapes, 8.0, GEOMETRY)
    return Plan(
        [Stage(clips, max_pack_tokens, clips_per_step)],
        seed=seed,
        lanes=lanes,
        shuffle_block_shards=block,
    )

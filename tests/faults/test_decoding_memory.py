"""Memory of the processes that decode, clip after clip."""

import os
from pathlib import Path

import pytest

from kinema.data.decode.clip_decoder import ClipDecoder, DecodingRules
from kinema.data.decode.decoders.video import DecodeError, Decoder
from kinema.data.geometry import ClipShape
from tests.unit.clips import numbered_video

POINTS = 10


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def children() -> set[int]:
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@pytest.mark.parametrize("decoder", list(Decoder), ids=lambda decoder: decoder.name)
@pytest.mark.parametrize("clips", [60, pytest.param(20_000, marks=pytest.mark.soak)])
def test_memory_stays_flat_clip_after_clip(decoder, clips):
    """Clips of several sizes, one of them broken; the first tenth is for warming up."""
    videos = [numbered_video([i / 10 for i in range(8)], size=size) for size in ((64, 64), (96, 128), (128, 192))]
    videos.append(videos[0][: len(videos[0]) // 2])
    before, reader, curve = children(), ClipDecoder(DecodingRules(decoder)), []
    for number in range(clips):
        try:
            reader.decode(videos[number % len(videos)], ClipShape(5, 32, 32), 10, 0.1)
        except DecodeError:
            assert number % len(videos) == 3
        if (number + 1) % (clips // POINTS) == 0:
            pid = max(children() - before)
            curve.append((resident_mib(pid), resident_mib(os.getpid())))
    reader.close()
    print(
        f"\n{decoder.name}, MiB of the decoding process every {clips // POINTS} clips:", *[f"{a:.0f}" for a, _ in curve]
    )
    print(f"{decoder.name}, MiB of its caller:", *[f"{b:.0f}" for _, b in curve])
    assert max(a for a, _ in curve) - curve[0][0] < 16
    assert max(b for _, b in curve) - curve[0][1] < 16

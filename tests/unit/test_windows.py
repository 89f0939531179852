import pickle

import pytest

from kinema.data.geometry import ClipShape
from kinema.data.packs.windows import CachedWindow, Windows
from kinema.data.storage.store import Member

SHAPE, OTHER = ClipShape(9, 32, 32), ClipShape(9, 32, 64)


def window(key, start=0.0, shard="latents-000000.tar", offset=512, shape=SHAPE):
    return CachedWindow((key, shape), start, shard, Member(offset, 100, 7))


@pytest.fixture
def windows():
    later = [window("b", 1.5, "latents-000001.tar", 512), window("a", 0.0, "latents-000001.tar", 1536, OTHER)]
    return Windows([[window("b", 2.0), window("a", 0.0, offset=1536), window("b", 0.5, offset=2560)], later])


def test_windows_of_a_clip_come_by_rising_start_from_all_shards(windows):
    first, second = "latents-000000.tar", "latents-000001.tar"
    assert windows["b", SHAPE] == [
        (first, Member(2560, 100, 7)),
        (second, Member(512, 100, 7)),
        (first, Member(512, 100, 7)),
    ]
    assert windows["a", OTHER] == [(second, Member(1536, 100, 7))]
    assert [member.offset for _, member in windows] == [512, 1536, 2560, 512, 1536]
    assert pickle.loads(pickle.dumps(windows))["b", SHAPE] == windows["b", SHAPE]  # as a spawned worker has it


def test_clips_that_are_not_cached_are_found(windows):
    assert windows.lacking([("a", SHAPE), ("c", SHAPE), ("b", OTHER), ("b", SHAPE)]) == (
        [("c", SHAPE), ("b", OTHER)],
        4,
    )
    with pytest.raises(KeyError):
        windows["b", OTHER]


def test_many_clips_are_each_told_from_all_others():
    many = Windows(
        [window(f"clip-{n}", offset=512 * n) for n in range(first, first + 100)] for first in range(0, 5000, 100)
    )
    assert all(many[f"clip-{n}", SHAPE][0][1].offset == 512 * n for n in range(5000))
    assert len(many.lacking((f"clip-{n}", SHAPE) for n in range(5500))[0]) == 500


def test_a_window_that_stands_twice_is_refused():
    with pytest.raises(
        ValueError, match=r"byte 512 of latents-000000\.tar stands a second time, in latents-000001\.tar"
    ):
        Windows([[window("a")], [window("a", shard="latents-000001.tar")]])

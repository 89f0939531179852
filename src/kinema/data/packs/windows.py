"""Where the cached windows of many clips lie, in columns: 48 bytes each, shared by all workers of a rank."""

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kinema.data.geometry import ClipShape
from kinema.data.storage.store import Member

Clip = tuple[str, ClipShape]
"""A clip is cached for each shape that it is shown in."""
CLIPS_AT_A_TIME = 65_536
_two_numbers = Struct("<QQ").unpack
DTYPES = {"clip": "u8", "check": "u8", "start": "f8", "shard": "i4", "offset": "i8", "size": "i8", "crc32": "u4"}


class CachedWindow(NamedTuple):
    """One cached window, as the index beside its shard describes it."""

    clip: Clip
    start_seconds: float
    shard: str
    member: Member


class Windows:
    """The windows of each clip by rising start. A clip is known by a digest of 128 bits, so that no text is kept.

    Ten million windows take 480 MB, where a dictionary of them took 8 GB in every process.
    """

    def __init__(self, batches: Iterable[Sequence[CachedWindow]]) -> None:
        """Batches, so that the windows need not be in memory together; ValueError where one stands twice."""
        numbers: dict[str, int] = {}
        parts = [_columns(windows, numbers) for windows in batches]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in DTYPES}
        order = np.lexsort((joined["start"], joined["clip"]))
        self._columns = {name: column[order] for name, column in joined.items()}
        self._clips, self._shards = self._columns["clip"], list(numbers)
        self._check_unique()

    def __getitem__(self, clip: Clip) -> list[tuple[str, Member]]:
        """Shard and place of each window; KeyError for a clip that is not cached."""
        number, check = _digest(clip)
        row = int(self._clips.searchsorted(np.uint64(number)))  # of another type, the whole column would be converted
        if not self._is(row, number) or self._columns["check"].item(row) != check:
            raise KeyError(clip)
        windows = [self._place(row)]
        while self._is(row := row + 1, number):
            windows.append(self._place(row))
        return windows

    def __iter__(self) -> Iterator[tuple[str, Member]]:
        """Shard and place of every window, as they lie in the shards."""
        return map(self._place, np.lexsort((self._columns["offset"], self._columns["shard"])).tolist())

    def lacking(self, clips: Iterable[Clip]) -> tuple[list[Clip], int]:
        """Those that are not cached, found many at a time; and how many were asked for."""
        clips, lacking, asked = iter(clips), list[Clip](), 0
        while some := list(islice(clips, CLIPS_AT_A_TIME)):
            asked += len(some)
            numbers, checks = np.array([_digest(clip) for clip in some], np.uint64).T
            rows = self._clips.searchsorted(numbers).clip(max=len(self._clips) - 1)
            known = (self._clips[rows] == numbers) & (self._columns["check"][rows] == checks)
            lacking += [some[place] for place in np.flatnonzero(~known).tolist()]
        return lacking, asked

    def _is(self, row: int, number: int) -> bool:
        return row < len(self._clips) and self._clips.item(row) == number

    def _place(self, row: int) -> tuple[str, Member]:
        shard, *where = (self._columns[name].item(row) for name in ("shard", "offset", "size", "crc32"))
        return self._shards[shard], Member(*where)

    def _check_unique(self) -> None:
        same = {name: np.diff(self._columns[name]) == 0 for name in ("clip", "check", "start")}
        wrong = same["clip"] & (
            same["start"] | ~same["check"]
        )  # or one half of two digests agrees: in one of 400,000 caches
        if wrong.any():
            (one, member), (other, _) = (self._place(int(wrong.argmax()) + next) for next in (0, 1))
            raise ValueError(f"the window at byte {member.offset} of {one} stands a second time, in {other}")


def _columns(windows: Sequence[CachedWindow], numbers: dict[str, int]) -> dict[str, NDArray[Any]]:
    """The columns of one batch; the shards' `numbers` go on over all batches."""
    digests = [_digest(window.clip) for window in windows]
    found: dict[str, Any] = {
        "clip": [clip for clip, _ in digests],
        "check": [check for _, check in digests],
        "start": [window.start_seconds for window in windows],
        "shard": [numbers.setdefault(window.shard, len(numbers)) for window in windows],
    }
    for name in ("offset", "size", "crc32"):
        found[name] = [getattr(window.member, name) for window in windows]
    return {name: np.array(found[name], dtype) for name, dtype in DTYPES.items()}


def _digest(clip: Clip) -> tuple[int, int]:
    key, (frames, height, width) = clip
    return _two_numbers(blake2b(f"{frames} {height} {width} {key}".encode(), digest_size=16).digest())

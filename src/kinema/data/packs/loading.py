"""Packs in the order of the plan, read by worker processes."""

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence

from kinema.data.account.rights import RightsPolicy
from kinema.data.config import Crop, Window
from kinema.data.dataset.shards import DatasetIndex
from kinema.data.decode.clip_decoder import DecodingRules
from kinema.data.packs.cached_clips import CachedClips
from kinema.data.packs.decoded_clips import DecodedClips
from kinema.data.packs.latents import LatentCache
from kinema.data.packs.pack import Pack
from kinema.data.packs.reader import ClipReader, Contents
from kinema.data.packs.workers import Readers, StepsAndLanes
from kinema.data.steps.plan import Plan

DECORD = DecodingRules()

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""As malloc.h has them."""
KEPT_BYTES, LARGE_BYTES = 2**31 - 1, 64 << 20
"""Free memory that a process keeps, as much as can be said, and the size from which a buffer is given back at once."""


def make_loader(
    index: DatasetIndex,
    plan: Plan,
    lanes: Sequence[int],
    start_step: int,
    num_steps: int,
    *,
    fps: float,
    decoding: DecodingRules = DECORD,
    window: Window = Window.start,
    crop: Crop = Crop.center,
    seed: int,
    num_workers: int = 0,
    prefetch: int = 2,
    timeout_seconds: float = 300.0,
    latents: LatentCache | Mapping[str, LatentCache] | None = None,
    rights: RightsPolicy | None = None,
    condemned: Mapping[str, str] | None = None,
) -> Iterator[list[Pack]]:
    """Yield the packs of these lanes, one list a step, for steps start_step to start_step + num_steps.

    A pack depends on (data, plan, seed, step, lane) only, so any number of workers yields the same. Closing
    the iterator, or dropping it, ends the workers. Each of them, and this process where there are none, decodes in
    a further process; `condemned` are the clips, by key, that are not tried, with the reason. `latents` of a mixture
    are a cache for each of its data sets, by name.
    """
    _keep_freed_memory()
    contents: Contents
    if latents is None:
        compare = rights is not None
        contents = DecodedClips(index, decoding, fps=fps, window=window, crop=crop, seed=seed, compare=compare)
    elif crop is not Crop.center:
        raise ValueError(f"data.crop={crop.name} cannot be used with data.latents, which cache the centre crop.")
    else:
        contents = CachedClips(index, {"": latents} if isinstance(latents, LatentCache) else latents, window, seed)
    dataset = ClipReader(index, plan, contents, fps=fps, rights=rights, condemned=condemned)
    wanted = StepsAndLanes(range(start_step, start_step + num_steps), list(lanes))
    return _read(dataset, wanted, num_workers, prefetch, timeout_seconds)


def _keep_freed_memory() -> None:
    """Let this process and its workers use the buffers of one step again for the next.

    glibc otherwise hands them back, and the kernel clears each page anew: half the time of reading small latents. Does
    nothing with another C library, or where the environment says what malloc is to do.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    libc.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def _read(
    dataset: ClipReader, wanted: StepsAndLanes, num_workers: int, prefetch: int, timeout_seconds: float
) -> Iterator[list[Pack]]:
    if num_workers == 0:
        try:
            for step in wanted.steps:
                yield [dataset[step, lane] for lane in wanted.lanes]
        finally:
            dataset.contents.close()
        return
    readers = Readers(dataset, num_workers, prefetch, timeout_seconds)
    try:
        readers.start(wanted, skip=0)
        for number in range(len(wanted.steps)):
            yield [readers.next(wanted, number * len(wanted.lanes) + lane) for lane in range(len(wanted.lanes))]
    finally:
        readers.stop()

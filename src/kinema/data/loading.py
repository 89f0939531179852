"""Packs in the order of the plan, read by worker processes."""

from collections.abc import Iterator, Mapping, Sequence

from kinema.data.clip_decoder import DecodingRules
from kinema.data.config import Crop, Window
from kinema.data.latents import LatentCache
from kinema.data.pack import Pack
from kinema.data.plan import Plan
from kinema.data.reader import ClipReader
from kinema.data.rights import RightsPolicy
from kinema.data.shards import DatasetIndex
from kinema.data.workers import Readers, StepsAndLanes

DECORD = DecodingRules()


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
    latents: LatentCache | None = None,
    rights: RightsPolicy | None = None,
    condemned: Mapping[str, str] | None = None,
) -> Iterator[list[Pack]]:
    """Yield the packs of these lanes, one list a step, for steps start_step to start_step + num_steps.

    A pack depends on (data, plan, seed, step, lane) only, so any number of workers yields the same. Closing
    the iterator, or dropping it, ends the workers. Each of them, and this process where there are none, decodes in
    a further process; `condemned` are the clips, by key, that are not tried, with the reason.
    """
    if latents is not None:
        if crop is not Crop.center:
            raise ValueError(f"data.crop={crop.name} cannot be used with data.latents, which cache the centre crop.")
        for stage in plan.stages:
            latents.check_covers([(index.entries[clip.entry_index].record.key, clip.shape) for clip in stage.clips])
    dataset = ClipReader(
        index,
        plan,
        fps=fps,
        decoding=decoding,
        window=window,
        crop=crop,
        seed=seed,
        latents=latents,
        rights=rights,
        condemned=condemned,
    )
    wanted = StepsAndLanes(range(start_step, start_step + num_steps), list(lanes))
    return _read(dataset, wanted, num_workers, prefetch, timeout_seconds)


def _read(
    dataset: ClipReader, wanted: StepsAndLanes, num_workers: int, prefetch: int, timeout_seconds: float
) -> Iterator[list[Pack]]:
    if num_workers == 0:
        try:
            for step in wanted.steps:
                yield [dataset[step, lane] for lane in wanted.lanes]
        finally:
            dataset.decoder.close()
        return
    readers = Readers(dataset, num_workers, prefetch, timeout_seconds)
    try:
        readers.start(wanted, skip=0)
        for number in range(len(wanted.steps)):
            yield [readers.next(wanted, number * len(wanted.lanes) + lane) for lane in range(len(wanted.lanes))]
    finally:
        readers.stop()

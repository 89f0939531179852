"""The planned data set of a run: indexes, plan, caches, rights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tqdm import tqdm

from kinema.build.run import Run
from kinema.config import Config
from kinema.data.account.quarantine import condemned_clips
from kinema.data.account.refusals import change_of_rights
from kinema.data.account.rights import RightsPolicy, idle_words
from kinema.data.config import DataConfig
from kinema.data.dataset.shards import DatasetIndex
from kinema.data.geometry import ClipShape, Geometry
from kinema.data.packs.cached_clips import CachedClips, open_caches
from kinema.data.packs.latents import LatentCache
from kinema.data.packs.loading import make_loader
from kinema.data.packs.pack import Pack
from kinema.data.steps.candidates import KeepReport
from kinema.data.steps.plan import Plan, lanes_of
from kinema.data.steps.planning import Planner, open_index
from kinema.data.storage.address import redacted
from kinema.distributed.collectives import from_main
from kinema.distributed.process import Process
from kinema.training.run_folder import rights_of_plan


@dataclass(frozen=True)
class Data:
    """The planned data set of a run, as one rank sees it."""

    config: DataConfig
    index: DatasetIndex
    heldout: DatasetIndex
    plan: Plan
    heldout_plan: Plan | None
    lanes: list[int]
    shapes: list[ClipShape]
    caches: dict[str, LatentCache]
    """Of each member of the index, its cached latents; empty where videos are read."""
    seed: int
    kept: KeepReport
    rights: RightsPolicy
    condemned: dict[str, str]
    """Clips that killed a decoding process in this run before it was resumed, and are not tried again."""

    @property
    def lanes_per_rank(self) -> int:
        """Packs of one step that this rank serves: its gradient accumulation."""
        return len(self.lanes)

    @property
    def step_shapes(self) -> list[ClipShape]:
        """Shapes of the clips of the first step, for estimates."""
        return [slot.clip.shape for lane in self.plan.step(0) for slot in lane]

    def load(
        self, first_step: int, num_steps: int, heldout: bool = False, workers: int | None = None
    ) -> Iterator[list[Pack]]:
        """This rank's packs of each step."""
        plan = self.heldout_plan if heldout else self.plan
        assert plan is not None
        return make_loader(
            self.heldout if heldout else self.index,
            plan,
            self.lanes,
            first_step,
            num_steps,
            fps=self.config.fps,
            decoding=self.config.decoding,
            window=self.config.window,
            crop=self.config.crop,
            seed=self.seed,
            num_workers=self.config.num_workers if workers is None else workers,
            prefetch=self.config.prefetch,
            timeout_seconds=self.config.timeout_seconds,
            latents=None if heldout else self.caches or None,
            rights=self.rights,
            condemned=self.condemned,
        )

    def some_packs(self, clips: int) -> list[list[Pack]]:
        """The packs of the first steps of the plan that hold at least `clips` clips together, freshly decoded."""
        return list(self.load(0, self.plan.steps_of(clips), workers=0))

    def heldout_packs(self, clips: int) -> list[list[Pack]]:
        """As `some_packs`, of the held-out clips."""
        if self.heldout_plan is None:
            return []
        return list(self.load(0, self.heldout_plan.steps_of(clips), heldout=True, workers=0))


def build_data(
    config: Config,
    geometry: Geometry,
    process: Process,
    run: Run,
    vae_hash: str | None,
    clip_flops: Callable[[ClipShape], float] | None = None,
) -> Data:
    """Index, shapes and plan of the training and held-out clips; every refusal is counted and shown.

    `clip_flops` is what a clip costs, where the configuration does not say.
    """
    data, shapes, rights = config.data, config.data.all_shapes, config.data.rights.policy()
    index, heldout = open_index(data, data.train_split), open_index(data, data.heldout_split)
    planned = from_main(rights_of_plan(run.folder, rights, bool(run.store.steps())) if process.is_main else None)
    planner = Planner(data, geometry, planned, config.seed, clip_flops)
    plan, kept = planner.training(index)
    if line := idle_words_of(rights, index, heldout):
        run.outputs.event(0, "rights", line)
    if line := change_of_rights(index, plan.clips.entry_index, planned, rights):
        run.outputs.event(0, "rights", line)
    heldout_plan = planner.heldout(heldout)
    caches = open_caches(data, index, vae_hash)
    if caches:
        CachedClips(index, caches, data.window, config.seed).check_covers(plan)
    if process.is_main:
        name = ", ".join(redacted(source.path) for source in data.mixture.values()) or redacted(data.path)
        tqdm.write(f"data {name}: {kept.line()}")
        if heldout_plan is None and config.validation.every_steps:
            tqdm.write(
                f"data {name}: no clip is in split {data.heldout_split!r}, so nothing is validated. "
                "Prepare the data with a held-out share, name another data.heldout_split, or type "
                "validation.every_steps=0."
            )
    return Data(
        data, index, heldout, plan, heldout_plan,
        lanes_of(process.mesh.data_rank, process.mesh.data_size, data.lanes), shapes, caches, config.seed, kept, rights,
        from_main(condemned_clips(run.folder) if process.is_main else {}),
    )  # fmt: skip


def idle_words_of(rights: RightsPolicy, *indexes: DatasetIndex) -> str | None:
    """What `data.rights` names and no clip of the data set has, as a line for people."""
    parts = [part for index in indexes for part in index.members.values()]
    licenses = [name for part in parts for name in part.columns.license.names]
    sources = [name for part in parts for name in part.columns.source.names]
    return idle_words(rights, licenses, sources, (key for part in parts for key in part.clip_keys()))

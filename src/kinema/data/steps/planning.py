"""From what a config says about the data to the plans of its training and held-out clips."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from kinema.data.account.rights import RightsPolicy
from kinema.data.config import DataConfig
from kinema.data.dataset.mixture import JoinedEntries, JoinedIndex, SourceConfig, StageConfig
from kinema.data.dataset.shards import DatasetIndex
from kinema.data.geometry import ClipShape, Geometry
from kinema.data.steps.candidates import Candidates, KeepReport, plan_clips
from kinema.data.steps.plan import Plan
from kinema.data.steps.shares import Shares
from kinema.data.steps.stages import Stage
from kinema.data.storage.place import resolve_folder


def open_index(config: DataConfig, split: str) -> DatasetIndex:
    """One split of the data set, or of those of the mixture; not all of them need held-out clips."""

    def load(path: str) -> DatasetIndex:
        folder = resolve_folder(path, config.cache_folder, config.storage, options=config.foreign)
        return DatasetIndex.load(folder, split=split)

    if not config.mixture:
        return load(config.path)
    parts = {name: load(source.path) for name, source in config.mixture.items()}
    if split != config.train_split:
        parts = {name: part for name, part in parts.items() if len(part.entries)} or parts
    return JoinedIndex.of(parts)


class Planner:
    """Chooses clips and plans steps as one config says, for any split."""

    def __init__(
        self,
        config: DataConfig,
        geometry: Geometry,
        rights: RightsPolicy,
        seed: int,
        clip_flops: Callable[[ClipShape], float] | None = None,
    ) -> None:
        """`clip_flops` is what a clip costs where the config does not say; without it the cost goes by tokens."""
        for shape in config.clip_shapes:
            geometry.check(shape)
        self.config, self.geometry, self.rights, self.seed = config, geometry, rights, seed
        self._cost = clip_flops
        if config.cost.linear is not None:
            self._cost = lambda shape: config.cost.of(geometry.num_tokens(shape))

    def training(self, index: DatasetIndex) -> tuple[Plan, KeepReport]:
        """The plan of the run, stage after stage, and why its last stage leaves clips out.

        ValueError when an epoch of any stage would give a lane nothing.
        """
        reports, stages = [], []
        for stage in [*self.config.stages, StageConfig()]:
            clips, report = self.choose(index, stage.shapes)
            if len(clips) < self.config.lanes and not self._overfits:
                raise ValueError(
                    f"data.lanes={self.config.lanes} with {len(clips)} clips: an epoch would give a lane nothing. "
                    f"Type data.lanes={len(clips)} or fewer, or take more data. {report.line()}."
                )
            stages.append(self._stage(clips, stage))
            reports.append(report)
        return self._plan(stages), reports[-1]

    def heldout(self, index: DatasetIndex) -> Plan | None:
        """The plan of the held-out clips, the same in all stages; None if there are none."""
        return self._plan([self._stage(self.choose(index)[0], StageConfig())]) if len(index.entries) else None

    @property
    def _overfits(self) -> bool:
        return self.config.max_clips is not None or any(s.max_clips is not None for s in self.config.mixture.values())

    def choose(
        self, index: DatasetIndex, shapes: Sequence[Sequence[int]] | None = None
    ) -> tuple[Candidates, KeepReport]:
        """The clips that a run uses, of `shapes` or the config's, and why it leaves others out."""
        if not isinstance(index.entries, JoinedEntries):
            return self._choose(index, shapes, SourceConfig())
        chosen: dict[str, Candidates] = {}
        whole, firsts = KeepReport(), dict(zip(index.entries.parts, index.entries.firsts, strict=False))
        for name, part in index.entries.parts.items():
            chosen[name], report = self._choose(part, shapes, self.config.mixture[name])
            whole.total, whole.kept = whole.total + report.total, whole.kept + report.kept
            whole.dropped.update({f"{name}: {reason}": count for reason, count in report.dropped.items()})
            whole.dropped_by_source.update(report.dropped_by_source)
        return Candidates.join(chosen, [firsts[name] for name in chosen]), whole

    def _choose(
        self, index: DatasetIndex, shapes: Sequence[Sequence[int]] | None, source: SourceConfig
    ) -> tuple[Candidates, KeepReport]:
        config = self.config
        captions = config.require_captions if source.require_captions is None else source.require_captions
        return plan_clips(
            index,
            [ClipShape(*shape) for shape in shapes or config.shapes],
            config.fps,
            self.geometry,
            rights=self.rights,
            require_captions=captions,
            max_clips=config.max_clips if source.max_clips is None else source.max_clips,
            cost=self._cost,
        )

    def _stage(self, clips: Candidates, stage: StageConfig) -> Stage:
        config = self.config
        return Stage(
            clips,
            max_pack_tokens=stage.max_pack_tokens or config.max_pack_tokens,
            clips_per_step=stage.clips_per_step or config.clips_per_step,
            tokens_per_step=_budget(config, stage),
            shares=self._shares(clips.sources, stage.weights),
            packing=config.packing,
            until_step=stage.until_step or None,
        )

    def _shares(self, names: Iterable[str], weights: Mapping[str, float] | None) -> Shares:
        if not self.config.mixture:
            return Shares([1.0])
        weights = weights or {name: source.weight for name, source in self.config.mixture.items()}
        return Shares([weights[name] for name in names], list(names))

    def _plan(self, stages: Sequence[Stage]) -> Plan:
        return Plan(
            stages,
            seed=self.seed,
            lanes=self.config.lanes,
            shuffle_block_shards=self.config.shuffle_block_shards,
            balanced_lanes=self.config.balanced_lanes,
        )


def _budget(config: DataConfig, stage: StageConfig) -> int | None:
    """A stage that gives a number of clips is not filled by tokens."""
    return None if stage.clips_per_step else stage.tokens_per_step or config.tokens_per_step

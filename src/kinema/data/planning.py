"""From what a config says about the data to the plans of its training and held-out clips."""

from collections.abc import Callable

from kinema.data.candidates import Candidates, KeepReport, plan_clips
from kinema.data.config import DataConfig
from kinema.data.geometry import ClipShape, Geometry
from kinema.data.plan import Plan
from kinema.data.rights import RightsPolicy
from kinema.data.shards import DatasetIndex
from kinema.data.stages import Stage


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

    def choose(self, index: DatasetIndex) -> tuple[Candidates, KeepReport]:
        """The clips that a run uses, and why it leaves others out."""
        config = self.config
        return plan_clips(
            index,
            config.clip_shapes,
            config.fps,
            self.geometry,
            rights=self.rights,
            require_captions=config.require_captions,
            max_clips=config.max_clips,
            cost=self._cost,
        )

    def plan(self, clips: Candidates) -> Plan:
        """The plan that deals chosen clips to steps and lanes."""
        config = self.config
        stage = Stage(
            clips,
            max_pack_tokens=config.max_pack_tokens,
            clips_per_step=config.clips_per_step,
            tokens_per_step=config.tokens_per_step,
            packing=config.packing,
        )
        return Plan(
            [stage],
            seed=self.seed,
            lanes=config.lanes,
            shuffle_block_shards=config.shuffle_block_shards,
            balanced_lanes=config.balanced_lanes,
        )

"""The trainer of `task=vae`."""

from collections.abc import Callable
from copy import deepcopy

from kinema.build.data import build_data
from kinema.build.header import describe_run
from kinema.build.parts import assemble, build_engine, common_manifest, context_parallel, start_weights
from kinema.build.run import Run
from kinema.config import Config
from kinema.data.geometry import Geometry
from kinema.distributed.process import Process
from kinema.identity import to_plain
from kinema.models.vae import CausalVAE
from kinema.models.vae.losses import VAELoss
from kinema.training.checkpoints.saving import initial_weights
from kinema.training.loop import Trainer
from kinema.training.records.pictures import StripMaker
from kinema.training.vae_task import VAETask


def build_vae(config: Config, run: Run, process: Process, unread_keys: Callable[[], str | None]) -> Trainer:
    """The trainer of `task=vae`."""
    model = CausalVAE(config.vae)
    geometry = Geometry(*model.geometry_strides, (1, 1, 1))
    data = build_data(config, geometry, process, run, vae_hash=None)
    line, _ = start_weights(config, model, run, process)
    twin = deepcopy(model)
    engine = build_engine(config, model, data.lanes_per_rank)
    packs = (
        [pack for packs in data.some_packs(config.task.statistics_clips) for pack in packs] if process.is_main else []
    )
    loss = VAELoss(config.task.loss)
    if loss.discriminator is not None:
        initial_weights(run.store, process, loss.discriminator, "discriminator")
    task = VAETask(
        config=config.task,
        engine=engine,
        loss=loss,
        twin=twin,
        context=context_parallel(config, twin, data, run, process, config.task.crop),
        statistics_packs=packs,
        optim=config.optim,
        parallel=config.parallel,
        accumulation=data.lanes_per_rank,
        seed=config.seed,
        device=process.device,
    )
    record = {"config": to_plain(config.vae), "looks_ahead": config.vae.looks_ahead()}
    manifest = {"task": "vae", "vae": record, **common_manifest(config, data)}
    strips = (
        StripMaker(task.twin, data.heldout_packs(config.task.strips), run.folder, config.task.strips)
        if process.is_main
        else None
    )
    seen = [tuple(config.task.crop) or shape for shape in data.step_shapes]
    flops = 3 * sum(sum(model.flops(*shape)) for shape in seen)
    ideal_seconds = describe_run(config, run, process, engine, line, twin, flops_per_step=flops)
    return assemble(
        config,
        run,
        process,
        task,
        data,
        engine,
        manifest,
        unread_keys,
        strips,
        config.task.strips_every_steps,
        ideal_seconds,
    )

"""What a DiT and a VAE are put together with alike: weights, engine, trainer, manifest."""

import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from torch import nn
from tqdm import tqdm

from kinema.build.data import Data
from kinema.build.run import Run
from kinema.config import Config
from kinema.data.account.ledger import Quarantine
from kinema.data.packs.pack import Pack
from kinema.distributed.activations import ActivationCheckpointing, keep_less
from kinema.distributed.collectives import barrier, from_main
from kinema.distributed.engine import Engine, Precision
from kinema.distributed.process import Process
from kinema.identity import to_plain
from kinema.models.dit import DiT, Experts
from kinema.models.vae import CausalVAE
from kinema.training.alive.guard import Guard
from kinema.training.alive.signals import Signals
from kinema.training.alive.skips import Skips
from kinema.training.alive.watchdog import Watchdog
from kinema.training.checkpoints.mirror import Mirror, Uploads
from kinema.training.checkpoints.saving import Saver, initial_weights
from kinema.training.checkpoints.store import Checkpoint
from kinema.training.context_parallel import ContextParallel
from kinema.training.ema import EMA
from kinema.training.finetune import LoRA
from kinema.training.loop import Trainer
from kinema.training.preflight import SAME_LOSS, SAME_LOSS_BFLOAT16, Preflight
from kinema.training.records.progress import Progress
from kinema.training.records.seen import Start
from kinema.training.run_folder import Weights, carry_base, checkpoint_of, load_weights, open_base, unadapted
from kinema.training.shared_packs import read_once


def context_parallel(
    config: Config, vae: CausalVAE, data: Data, run: Run, process: Process, crop: Sequence[int] = ()
) -> ContextParallel:
    """What spreads the VAE's work on a clip over this rank's sequence group; the header says how for each shape."""
    context = ContextParallel(process.mesh.sequence_group, vae.geometry_strides, config.parallel.vae_axis)
    for shape in [*data.shapes, *([crop] if crop else [])] if context.ranks > 1 else []:
        cut = context.cut(*shape)
        line = f"a clip of {'x'.join(map(str, shape))} is cut along {cut.line()}"
        if cut.working < context.ranks:
            run.outputs.event(0, "vae ranks idle", line)
        elif process.is_main:
            tqdm.write(f"vae: {line}")
    return context


def start_weights(config: Config, model: nn.Module, run: Run, process: Process) -> tuple[str, str | None]:
    """Give the model its weights, of the newest checkpoint, `init_from`, or fresh, and freeze what is not trained.

    Returns a line that says what is trained, and the fingerprint of the base of adapters: their checkpoints lack it.
    """
    model.to(process.device)
    base = None
    if isinstance(config.finetune, LoRA):
        base = load_weights(model, carried_base(config, run, process), Weights.ema)
    elif config.init_from is not None and not run.store.steps():
        load_weights(model, unadapted(config.init_from), Weights.ema)
    line = config.finetune.prepare(model)
    initial_weights(run.store, process, model)
    return line, base


def carried_base(config: Config, run: Run, process: Process) -> Checkpoint:
    """The base of adapters inside the run folder, put there by the main rank when the run begins."""
    assert config.init_from is not None, "to_config lets no adapters pass without it"
    if process.is_main:
        carry_base(run.folder, config.init_from)
    barrier()
    return open_base(run.folder)


def build_engine(config: Config, model: DiT | Experts | CausalVAE, accumulation: int) -> Engine:
    """The engine over a model that already holds its weights."""
    kind = config.parallel.activation_checkpointing
    every = config.parallel.checkpointed_every if kind is ActivationCheckpointing.every else 1
    keep_less(model.all_blocks(), kind, every)
    return Engine(
        model,
        config.optim.build(model),
        zero_stage=config.parallel.zero_stage,
        precision=config.parallel.precision,
        accumulation=accumulation,
        gradient_clipping=config.optim.gradient_clipping,
        offload=config.parallel.offload,
        traffic=config.parallel.traffic,
        blocks=model.all_blocks(),
    )


def assemble(
    config: Config,
    run: Run,
    process: Process,
    task: Any,
    data: Data,
    engine: Engine,
    manifest: dict[str, Any],
    unread_keys: Callable[[], str | None],
    make_samples: Any,
    sample_every_steps: int,
    ideal_seconds: float,
) -> Trainer:
    """The trainer from its parts; the same for every task."""
    barrier()
    progress = Progress(data.index)
    if process.is_main:
        progress.ledger.record_kept(data.kept)
        if config.init_from is not None and not run.store.steps():
            progress.start = Start.of(checkpoint_of(config.init_from, "init_from"))

    def heldout() -> list[list[Pack]]:
        return list(read_once(process, lambda: data.heldout_packs(config.validation.clips)))

    ema = EMA(config.ema, engine)
    remote = config.checkpoint.remote
    schedule, peak, steps = config.schedule, config.optim.learning_rate, config.steps
    return Trainer(
        process=process,
        task=task,
        plan=data.plan,
        index=data.index,
        load=lambda first, count: read_once(process, lambda: data.load(first, count)),
        load_validation=heldout if data.heldout_plan else None,
        learning_rate=lambda step: peak * schedule.factor(step, steps),
        steps=steps,
        ema=ema,
        saver=Saver(
            process=process,
            task=task,
            plan=data.plan,
            ema=ema,
            store=run.store,
            config=config.checkpoint,
            outputs=run.outputs,
            manifest=manifest,
            config_yaml=run.config_yaml,
            progress=progress,
            uploads=Uploads(Mirror.below(remote, run.folder)) if remote is not None and process.is_main else None,
        ),
        progress=progress,
        preflight=Preflight(
            config.preflight,
            process.mesh,
            task,
            ema,
            lambda verdict: run.outputs.event(progress.step + 1, "preflight", verdict),
            SAME_LOSS if config.parallel.precision is Precision.float32 else SAME_LOSS_BFLOAT16,
        ),
        checkpoint=config.checkpoint,
        validation=config.validation,
        logging=config.logging,
        outputs=run.outputs,
        quarantine=Quarantine(
            config.data.max_failed_fraction, config.data.min_failed_clips, config.data.max_fallback_fraction
        ),
        sample_every_steps=sample_every_steps,
        ideal_seconds=ideal_seconds,
        make_samples=make_samples,
        guard=Guard(config.guard, from_main(Skips.read(run.folder) if process.is_main else Skips())),
        signals=Signals(config.signals),
        watchdog=Watchdog(config.watchdog, process.rank, process.world_size, run.folder),
        unread_keys=unread_keys,
    )


def common_manifest(config: Config, data: Data) -> dict[str, Any]:
    """What every manifest holds."""
    return {
        "format_version": 1,
        "kinema": version("kinema"),
        "name": config.name,
        "seed": config.seed,
        "ema": to_plain(config.ema),
        "finetune": to_plain(config.finetune),
        "data": {
            "hash": data.index.hash,
            "kept": data.kept.line(),
            "rights": data.rights.to_dict(),
        },
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }

"""Putting a run together: each function reads like its list of parts. Nothing is computed here."""

import functools
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from kinema.conditioning.text import CachedTextEncoder, TextEncoder, build_text_encoder
from kinema.config import Config, changed_keys
from kinema.data.address import redacted
from kinema.data.cached_clips import CachedClips, open_caches
from kinema.data.candidates import KeepReport
from kinema.data.config import DataConfig
from kinema.data.geometry import ClipShape, Geometry
from kinema.data.latents import LatentCache
from kinema.data.ledger import Quarantine
from kinema.data.loading import make_loader
from kinema.data.pack import Pack
from kinema.data.plan import Plan, lanes_of
from kinema.data.planning import Planner, open_index
from kinema.data.quarantine import condemned_clips
from kinema.data.refusals import change_of_rights
from kinema.data.rights import RightsPolicy, idle_words
from kinema.data.shards import DatasetIndex
from kinema.distributed.activations import ActivationCheckpointing, keep_less
from kinema.distributed.collectives import barrier, from_main
from kinema.distributed.compiling import Compile, compiler
from kinema.distributed.engine import Engine, Precision
from kinema.distributed.process import Process, seed_everything
from kinema.distributed.sequence import Ulysses
from kinema.identity import digest, to_plain
from kinema.models.dit import DiT, Expert, Experts, make_denoiser
from kinema.models.vae import CausalVAE
from kinema.models.vae.losses import VAELoss
from kinema.plan import states_of
from kinema.sampling.conditioner import numbers_told
from kinema.sampling.denoiser import check_condition, check_embedded_guidance
from kinema.sampling.pipeline import Pipeline
from kinema.sampling.sample import geometry_of, image_encoder_of
from kinema.training.checkpoint import Checkpoint, CheckpointStore, write_json
from kinema.training.context_parallel import ContextParallel
from kinema.training.dit_task import DiTTask, check_sizes, check_training
from kinema.training.ema import EMA
from kinema.training.finetune import LoRA, frozen_parameters
from kinema.training.guard import Guard
from kinema.training.loop import Trainer
from kinema.training.metrics import WandbTracker
from kinema.training.mirror import Mirror, Uploads
from kinema.training.outputs import Outputs
from kinema.training.pictures import OverfitCheck, SampleMaker, StripMaker, save_timesteps
from kinema.training.preflight import SAME_LOSS, SAME_LOSS_BFLOAT16, Preflight
from kinema.training.progress import Progress
from kinema.training.run_folder import (
    Weights,
    carry_base,
    carry_vae,
    check_changes,
    checkpoint_of,
    load_vae,
    load_weights,
    open_base,
    open_run_folder,
    remove_refused,
    rights_of_plan,
    unadapted,
)
from kinema.training.saving import Saver, initial_weights
from kinema.training.seen import Start
from kinema.training.shared_packs import read_once
from kinema.training.signals import Signals
from kinema.training.skips import Skips
from kinema.training.start import check_same_vae
from kinema.training.vae_task import VAETask
from kinema.training.watchdog import Watchdog


@dataclass(frozen=True)
class Run:
    """The run folder and what goes beside its checkpoints."""

    outputs: Outputs
    store: CheckpointStore
    config_yaml: str

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.outputs.run_dir


@contextmanager
def start_run(config: Config, config_yaml: str, process: Process) -> Iterator[Run]:
    """Open the run folder on the main rank, check it against the configuration, which is kept once the run goes on.

    Of a run that is refused while it is built, no folder is left.
    """
    seed_everything(config.seed)
    run_dir = Path(config.run_root) / config.name
    outputs = Outputs(run_dir, process.is_main, tracker=None)
    problem, lock = None, None
    if process.is_main:
        try:
            lock = open_run_folder(run_dir)
            stored = run_dir / "config.yaml"
            if config.checkpoint.remote is not None:
                told = functools.partial(outputs.event, 0, "resume")
                Mirror.below(config.checkpoint.remote, run_dir).restore(told)
            began = stored.exists() and bool(CheckpointStore(run_dir).steps())  # a failed start binds nobody
            differences = changed_keys(stored.read_text(), config_yaml) if began else []
            check_changes(run_dir, differences, config.allow_config_change)
            for line in differences:
                outputs.event(0, "configuration changed", line)
        except ValueError as error:
            problem = str(error)
    if problem := from_main(problem):
        raise ValueError(problem)
    try:
        yield Run(outputs, CheckpointStore(run_dir, config.checkpoint.keep, config.checkpoint.keep_every), config_yaml)
    except ValueError:
        if lock:
            remove_refused(run_dir)
        raise
    finally:
        if lock:
            lock.close()


def build_dit(config: Config, run: Run, process: Process, unread_keys: Callable[[], str | None]) -> Trainer:
    """The trainer of `task=dit`."""
    source = checkpoint_of(config.vae.path, "vae.path")
    if config.model.expert_boundary and config.model.expert is Expert.both:
        raise ValueError(
            f"model.expert_boundary={config.model.expert_boundary}: one of two experts is trained at a time, so that "
            "no rank waits for gradients of one that got no clip. Type model.expert=high or model.expert=low."
        )
    vae, vae_identity = load_vae(source, config.vae.weights)
    if config.init_from is not None and not run.store.steps():
        told = check_same_vae(
            checkpoint_of(config.init_from, "init_from"), vae_identity, allow_other=config.allow_other_vae
        )
        if told and process.is_main:
            run.outputs.event(0, "init_from", told)
    text_encoder = text_encoder_of(config)
    geometry = geometry_of(vae.geometry_strides, config.model)
    image_encoder = image_encoder_of(config.condition)
    check_condition(config.condition, config.model, vae.config, image_encoder)
    model = make_denoiser(config.model, vae.config.latent_channels, text_encoder.width)
    check_embedded_guidance(config.task.embedded_guidance, config.model, "task.embedded_guidance")
    check_training(config.condition, config.data, vae.config)
    check_sizes(config.model, geometry, config.data.clip_shapes)

    def clip_flops(shape: ClipShape) -> float:
        return model.flops(geometry.token_grid(shape), config.text.max_tokens)

    data = build_data(config, geometry, process, run, vae_identity["hash"], clip_flops)
    check_captions(text_encoder, config, data)
    line, base = start_weights(config, model, run, process)
    twin = deepcopy(model)  # which samples on one rank
    if process.mesh.sequence_group is not None:
        model.share_tokens(Ulysses(process.mesh))
    if config.parallel.compile is Compile.blocks:
        model.compile_blocks(compiler())
    engine = build_engine(config, model, data.lanes_per_rank)
    task = DiTTask(
        engine=engine,
        vae=vae.to(process.device),
        context=context_parallel(config, vae, data, run, process),
        text_encoder=text_encoder.to(process.device),
        objective=config.objective,
        condition=config.condition,
        image_encoder=image_encoder and image_encoder.to(process.device),
        geometry=geometry,
        guidance_dropout=config.task.guidance_dropout,
        numbers=numbers_told(config.model, config.data.fps, config.task.embedded_guidance),
        posterior=config.task.posterior,
        timestep_range=config.model.timestep_range,
        seed=config.seed,
        device=process.device,
        frozen=frozen_parameters(twin) if base is None else {},
    )
    pipeline = Pipeline(
        denoiser=twin,
        vae=vae,
        text_encoder=text_encoder,
        objective=config.objective,
        geometry=geometry,
        fps=config.data.fps,
        shapes=data.shapes,
        guidance_dropout=config.task.guidance_dropout,
        sampling=config.task.samples.alone(),
        condition=config.condition,
        image_encoder=image_encoder,
    )
    samples = SampleMaker(pipeline, config.task.samples, run.folder)
    manifest = {
        "task": "dit",
        "model": {"config": to_plain(config.model)},
        "vae": vae_identity,
        "text": {"config": to_plain(config.text), "policy": text_encoder.policy()},
        "geometry": geometry.describe(),
        "objective": to_plain(config.objective),
        "fps": config.data.fps,
        "shapes": [list(shape) for shape in data.shapes],
        "guidance_dropout": config.task.guidance_dropout,
        "condition": to_plain(config.condition),
        "image": image_encoder and image_encoder.policy(),
        "posterior": config.task.posterior.value,
        "sampling": to_plain(config.task.samples.alone()),
        **({} if base is None else {"base": base}),
        **common_manifest(config, data),
    }
    if process.is_main:
        carry_vae(run.folder, source, config.vae.weights)
        tqdm.write(samples.settings)
        save_timesteps(
            run.folder, config.objective, config.task.samples, geometry, data.shapes, config.model.timestep_range
        )
    flops = 3 * sum(map(clip_flops, data.step_shapes))
    ideal_seconds = describe_run(config, run, process, engine, line, twin, flops_per_step=flops)
    trainer = assemble(
        config,
        run,
        process,
        task,
        data,
        engine,
        manifest,
        unread_keys,
        samples,
        config.task.samples.every_steps,
        ideal_seconds,
    )
    if config.task.overfit_check and process.is_main:
        pack = data.some_packs(1)[0][0]
        assert pack.frames is not None
        trainer.final_check = OverfitCheck(pipeline, config.task.samples, pack.captions[0], pack.frames[0], run.folder)
    return trainer


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


def context_parallel(
    config: Config, vae: CausalVAE, data: "Data", run: Run, process: Process, crop: Sequence[int] = ()
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


def text_encoder_of(config: Config) -> TextEncoder:
    """The text encoder, or what was encoded by it before."""
    if config.data.text is None:
        return build_text_encoder(config.text)
    return CachedTextEncoder.load(config.data.text, config.text)


def check_captions(encoder: TextEncoder, config: Config, data: Data) -> None:
    """Refuse a text cache that lacks a caption of the run, before its first step."""
    if isinstance(encoder, CachedTextEncoder):
        parts = [part for index in (data.index, data.heldout) for part in index.members.values()]
        captions = (caption for part in parts for caption in part.table.texts("caption"))
        folders = dict.fromkeys(str(part.folder) for part in parts)
        encoder.check_covers(captions, config.task.samples.captions(), list(folders))


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


def describe_run(
    config: Config,
    run: Run,
    process: Process,
    engine: Engine,
    trained: str,
    whole: nn.Module,
    flops_per_step: float,
) -> float:
    """Write `run.json`, print the header (what runs, on what, with which identity), and start the tracker.

    Returns the seconds that a step takes on all ranks at their measured peak; 0 but on the main rank.
    """
    if not process.is_main:
        return 0.0
    peak = measure_peak_flops(process.device, getattr(torch, config.parallel.precision.value))
    parameters = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in engine.module.parameters())
    record = {
        "name": config.name,
        "task": "dit" if config.model is not None else "vae",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": redacted(" ".join(sys.argv)),
        "steps": config.steps,
        "world_size": process.world_size,
        "device": device_name(process),
        "threads": torch.get_num_threads(),
        "versions": {
            **{name: version(name) for name in ("torch", "deepspeed", "kinema")},
            "python": platform.python_version(),
        },
        "parameters": parameters,
        "flops_per_step": flops_per_step,
        "peak_flops_measured": peak,
        "config_hash": digest(run.config_yaml),
        "git": git_revision(),
    }  # fmt: skip
    write_json(run.folder / "run.json", record)
    parallel = config.parallel
    tqdm.write(
        f"run {run.folder}: {parameters / 1e6:.2f} M parameters, config {record['config_hash'][:8]}, "
        f"{process.world_size} rank(s) on {process.device}, {parallel.line()}, "
        f"{engine.traffic.line(parallel.zero_stage)}"
    )
    tqdm.write(trained)
    tqdm.write(f"{states_of(config, whole, process.world_size).line()} (activations: kinema plan)")
    run.outputs.tracker = WandbTracker(config.logging, run.folder, {"config": run.config_yaml})
    rate, checkpoint, logging = config.optim.learning_rate, config.checkpoint, config.logging
    rates = [rate * config.schedule.factor(step, config.steps) for step in (0, config.steps // 2, config.steps - 1)]
    tqdm.write(
        f"steps {config.steps}, learning rate {rates[0]:.1e} first, {rates[1]:.1e} halfway, {rates[2]:.1e} last; "
        f"checkpoint every {checkpoint.every_steps} (keeps {checkpoint.keep}, "
        f"{checkpoint.max_failed_saves} saves may fail), "
        f"validation every {config.validation.every_steps} on {config.validation.clips} clips, "
        f"metrics every {logging.every_steps}, W&B {logging.wandb.value} ({logging.project})"
    )
    if config.schedule.warmup_steps > config.steps:
        tqdm.write(
            f"schedule.warmup_steps={config.schedule.warmup_steps} is longer than steps={config.steps}: the learning "
            f"rate ends at {rates[2]:.1e} and never reaches optim.learning_rate={rate:g}. Type fewer warm-up steps."
        )
    return flops_per_step / (peak * process.world_size)


def device_name(process: Process) -> str:
    """The accelerator's or the processor's name."""
    if process.device.type == "cuda":
        return torch.cuda.get_device_name(process.device)
    return platform.processor() or platform.machine()


def measure_peak_flops(device: torch.device, dtype: torch.dtype, repeats: int = 8) -> float:
    """Floating-point operations a second of a matrix product of this type on this device: what MFU is measured against.

    On random numbers, of a size that fills a GPU.
    """
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def git_revision() -> str | None:
    """The commit of the code, with a mark if files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or None if answer.returncode == 0 else None

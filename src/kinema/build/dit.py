"""The trainer of `task=dit`."""

from collections.abc import Callable
from copy import deepcopy

from tqdm import tqdm

from kinema.build.data import Data, build_data
from kinema.build.header import describe_run
from kinema.build.parts import assemble, build_engine, common_manifest, context_parallel, start_weights
from kinema.build.run import Run
from kinema.conditioning.text import CachedTextEncoder, TextEncoder, build_text_encoder
from kinema.config import Config
from kinema.data.geometry import ClipShape
from kinema.distributed.compiling import Compile, compiler
from kinema.distributed.process import Process
from kinema.distributed.sequence import Ulysses
from kinema.identity import to_plain
from kinema.models.dit import Expert, make_denoiser
from kinema.sampling.conditioner import numbers_told
from kinema.sampling.denoiser import check_condition, check_embedded_guidance
from kinema.sampling.pipeline import Pipeline
from kinema.sampling.sample import geometry_of, image_encoder_of
from kinema.training.dit_task import DiTTask, check_sizes, check_training
from kinema.training.finetune import frozen_parameters
from kinema.training.loop import Trainer
from kinema.training.records.pictures import OverfitCheck, SampleMaker, save_timesteps
from kinema.training.run_folder import carry_vae, checkpoint_of, load_vae
from kinema.training.start import check_same_vae


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

"""One short sampling through the pipeline class that an export is for, beside our own from the same noise."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kinema.conditioning.condition import Condition, with_words
from kinema.diffusion.guidance import guided
from kinema.diffusion.objective import Objective
from kinema.diffusion.solvers import solve
from kinema.interop.comparing import Sample, relative, words_of
from kinema.interop.preset import Record
from kinema.interop.reading import read_json
from kinema.interop.reference import reference_class
from kinema.interop.releases import HABITS, habits_of
from kinema.interop.schedulers import scheduled
from kinema.sampling.denoiser import Denoiser
from kinema.sampling.pipeline import SamplingConfig, guidance_of

STEPS = 4
LIMIT = 1e-3
"""Largest relative difference of the latents after all steps, each of which starts from the differences before."""

Run = Callable[[Any, Sample, dict[str, Any]], Tensor]
"""run(pipeline, sample, options) -> the latents (C, T, H, W) of its first clip, captioned `text[0]` and led from 1."""


def wan(pipeline: Any, sample: Sample, options: dict[str, Any]) -> Tensor:
    """WanPipeline."""
    captions = {"prompt_embeds": sample.text[:1], "negative_prompt_embeds": sample.text[1:]}
    return pipeline(latents=sample.latents[:1], **captions, **options).frames[0]


def hunyuan_video(pipeline: Any, sample: Sample, options: dict[str, Any]) -> Tensor:
    """HunyuanVideoPipeline, whose guidance_scale is the embedded one."""
    assert sample.pooled is not None
    captions = {"prompt_embeds": sample.text[:1], "pooled_prompt_embeds": sample.pooled[:1]}
    mask = torch.ones(sample.text[:1].shape[:2])
    told = {**options, "guidance_scale": HABITS["HunyuanVideoPipeline"].embedded_guidance}
    return pipeline(latents=sample.latents[:1], prompt_attention_mask=mask, **captions, **told).frames[0]


def ltx_video(pipeline: Any, sample: Sample, options: dict[str, Any]) -> Tensor:
    """LTXPipeline: latents are tokens in a row."""
    mask = torch.ones(sample.text[:1].shape[:2])
    captions = {"prompt_embeds": sample.text[:1], "negative_prompt_embeds": sample.text[1:]}
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    noise = sample.latents[0]
    found = pipeline(latents=noise.flatten(1).T[None], **captions, **masks, **options).frames[0]
    return found.T.unflatten(1, noise.shape[1:])


def cogvideox(pipeline: Any, sample: Sample, options: dict[str, Any]) -> Tensor:
    """CogVideoXPipeline: frames before channels."""
    captions = {"prompt_embeds": sample.text[:1], "negative_prompt_embeds": sample.text[1:]}
    return pipeline(latents=sample.latents[:1].transpose(1, 2), **captions, **options).frames[0].transpose(0, 1)


RUNS: dict[str, Run] = {
    "WanPipeline": wan,
    "HunyuanVideoPipeline": hunyuan_video,
    "LTXPipeline": ltx_video,
    "CogVideoXPipeline": cogvideox,
}
"""Pipeline class of the reference -> how it samples."""


@torch.no_grad()
def sampled(
    folder: Path, parts: dict[str, Any], denoiser: nn.Module, config: Record, objective: Objective, shift: float | None
) -> tuple[SamplingConfig, float]:
    """How the pipeline in `folder` samples, and the largest relative difference of our latents from its own.

    `parts` are its components through the reference library; `config` is its transformer's, `objective` ours.
    """
    index = read_json(folder / "model_index.json")
    name = index["_class_name"]
    settings = settings_of(folder, shift)
    pipeline = reference_class(name)(**{**parts, **choices_in(index)}, scheduler=scheduler_in(folder))
    pipeline.set_progress_bar_config(disable=True)
    one = getattr(denoiser, "high", denoiser)
    sample = Sample.of(one, words_of(config), tokens=tokens_of(config))
    _, _, frames, height, width = sample.latents.shape
    time, space = strides(pipeline)
    options = {
        "num_frames": (frames - 1) * time + 1,
        "height": height * space,
        "width": width * space,
        "num_inference_steps": STEPS,
        "guidance_scale": settings.guidance_scale,
        "output_type": "latent",
    }
    if settings.guidance_scale_low is not None:
        options["guidance_scale_2"] = settings.guidance_scale_low
    expected = RUNS[name](pipeline, sample, options)
    return settings, relative(our_latents(denoiser, sample, objective, settings), expected)


def tokens_of(config: Record) -> tuple[int, int, int]:
    """A small odd grid; CogVideoX's own where it turns tokens, since its pipeline stretches the angles of any other."""
    if not config.get("use_rotary_positional_embeddings"):
        return (3, 3, 5)
    return (1, config["sample_height"] // config["patch_size"], config["sample_width"] // config["patch_size"])


def settings_of(folder: Path, shift: float | None) -> SamplingConfig:
    """How a pipeline samples with the scheduler that lies in its folder."""
    habits = habits_of(read_json(folder / "model_index.json"))
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    return SamplingConfig(
        num_steps=STEPS,
        guidance_scale=habits.guidance_scale,
        guidance_scale_low=habits.guidance_scale_low,
        embedded_guidance=habits.embedded_guidance,
        timestep_shift=shift,
        **scheduled(config, gives_sigmas=habits.gives_sigmas).sampling,
    )


def our_latents(denoiser: nn.Module, sample: Sample, objective: Objective, settings: SamplingConfig) -> Tensor:
    """The same sampling here."""
    words = [
        {"text": sample.text[i], **({} if sample.pooled is None else {"pooled": sample.pooled[i]})} for i in range(2)
    ]
    told = [replace(Condition(**words[0]), guidance=settings.embedded_guidance)]
    model = Denoiser(denoiser.eval(), denoiser.config.patch_size[0])
    tokens = sample.latents[0, 0].numel() // torch.tensor(denoiser.config.patch_size).prod().item()
    return solve(
        guided(model, told, with_words(told, words[1]), guidance_of(settings, denoiser.config, objective)),
        [sample.latents[0]],
        objective,
        settings.solver,
        settings.num_steps,
        shift=settings.timestep_shift,
        spacing=settings.timestep_spacing,
        terminal=settings.timestep_terminal,
        scheduler=settings.scheduler,
        num_tokens=[int(tokens)],
    )[0]


def scheduler_in(folder: Path) -> Any:
    """The scheduler of a pipeline's folder, through the reference library."""
    name = read_json(folder / "scheduler" / "scheduler_config.json")["_class_name"]
    return reference_class(name).from_pretrained(folder / "scheduler")


def choices_in(index: Record) -> Record:
    """What a model_index.json says of the pipeline itself, for the class that has choices."""
    return {key: index[key] for key in ("boundary_ratio", "expand_timesteps") if key in index}


def strides(pipeline: Any) -> tuple[int, int]:
    """Frames and pixels a side of one of its latents."""
    if hasattr(pipeline, "vae_scale_factor_temporal"):
        return pipeline.vae_scale_factor_temporal, pipeline.vae_scale_factor_spatial
    return pipeline.vae_temporal_compression_ratio, pipeline.vae_spatial_compression_ratio

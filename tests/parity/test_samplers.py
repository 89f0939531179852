"""Sampling an imported pipeline is sampling the published one: its latents after every step, and its frames."""

from dataclasses import replace

import diffusers
import pytest
import torch

import kinema
from kinema.data.geometry import ClipShape
from kinema.diffusion.solvers import Solver
from kinema.diffusion.timesteps import TimestepSpacing
from kinema.interop.importing import import_model
from kinema.sampling.pipeline import initial_noise
from tests.parity.published import wan_pipeline

CAPTION, NEGATIVE = "a red circle moves left", "blurry grey"
SHAPE = ClipShape(5, 32, 48)

UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS = {
    "flow euler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow euler, no shift": diffusers.FlowMatchEulerDiscreteScheduler(),
    "unipc": diffusers.UniPCMultistepScheduler(**UNIPC),
    "unipc of third order": diffusers.UniPCMultistepScheduler(**UNIPC, solver_order=3),
    "dpm-solver++": diffusers.DPMSolverMultistepScheduler(**UNIPC),
}


def imported(whole, tmp_path):
    whole.save_pretrained(tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "run")
    return kinema.load(tmp_path / "run")


def published_steps(whole, noise, **options):
    """The published pipeline's latents after every step."""
    steps = []

    def keep(pipe, step, timestep, values):
        steps.append(values["latents"][0].clone())
        return {}

    whole.set_progress_bar_config(disable=True)
    whole(latents=noise[None], callback_on_step_end=keep, output_type="latent", **options)
    return steps


def our_steps(pipeline, config, shape=SHAPE):
    """Our latents after every step: what the denoiser is given in the next one, and the result."""
    given = []
    watch = pipeline.denoiser.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0][0].clone()))
    result = pipeline.latents([CAPTION], shape, config)[0]
    watch.remove()
    return [*given[1:], result]


def largest(actual, expected):
    assert len(actual) == len(expected)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(actual, expected, strict=True))


def wan_call(steps):
    return {
        "prompt": CAPTION, "negative_prompt": NEGATIVE, "height": 32, "width": 48, "num_frames": 5,
        "num_inference_steps": steps, "max_sequence_length": 512,
    }  # fmt: skip


def our_noise(pipeline, config):
    return initial_noise((pipeline.vae.config.latent_channels, *pipeline.geometry.latent_shape(SHAPE)), config.seed)


@pytest.mark.parametrize(("name", "steps"), [*((name, 4) for name in SCHEDULERS), ("flow euler", 1), ("unipc", 1)])
def test_wan(tmp_path, name, steps):
    whole = wan_pipeline(SCHEDULERS[name])
    ours = imported(whole, tmp_path)
    config = replace(ours.sampling, seed=7, num_steps=steps, negative_prompt=NEGATIVE)
    assert config.guidance_scale == 5.0
    expected = published_steps(whole, our_noise(ours, config), **wan_call(steps))
    assert largest(our_steps(ours, config), expected) <= 1e-5


def test_frames_of_wan(tmp_path):
    whole = wan_pipeline(SCHEDULERS["unipc"])
    ours = imported(whole, tmp_path)
    config = replace(ours.sampling, seed=7, num_steps=3, negative_prompt=NEGATIVE)
    noise = our_noise(ours, config)
    expected = whole(latents=noise[None], output_type="np", **wan_call(3)).frames[0]
    actual = ours.videos([CAPTION], SHAPE, config)[0]
    assert actual.shape == expected.shape
    assert (
        actual / 255 - torch.from_numpy(expected)
    ).abs().max() <= 0.5 / 255 + 1e-4  # they are rounded to whole numbers


WRONG = {
    "every timestep shifted twice": {"timestep_shift": 9.0},
    "timesteps spaced as in training": {"timestep_spacing": TimestepSpacing.trailing},
    "another solver": {"solver": Solver.heun},
    "another negative prompt": {"negative_prompt": ""},
}


def test_what_is_sampled_otherwise_is_seen(tmp_path):
    whole = wan_pipeline(SCHEDULERS["flow euler"])
    ours = imported(whole, tmp_path)
    config = replace(ours.sampling, seed=7, num_steps=3, negative_prompt=NEGATIVE)
    expected = published_steps(whole, our_noise(ours, config), **wan_call(3))[-1]
    for name, change in WRONG.items():
        actual = ours.latents([CAPTION], SHAPE, replace(config, **change))
        assert largest(actual, [expected]) > 1e-4, name

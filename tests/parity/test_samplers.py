"""Sampling an imported pipeline is sampling the published one: its latents after every step, and its frames."""

import json
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import load_file

import kinema
from kinema.data.decode.encoding import read_metadata
from kinema.data.geometry import ClipShape
from kinema.diffusion.solvers import Solver
from kinema.diffusion.timesteps import TimestepSpacing
from kinema.interop import exporting
from kinema.interop.importing import import_model
from kinema.sampling.pipeline import SamplingConfig, initial_noise
from kinema.sampling.sample import SampleConfig, sample
from tests.parity.published import cogvideox_pipeline, hunyuan_pipeline, latte_pipeline, ltx_pipeline, wan_pipeline

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


def our_noise(pipeline, config, shape=SHAPE):
    return initial_noise((pipeline.denoiser.latent_channels, *pipeline.geometry.latent_shape(shape)), config.seed)


@pytest.mark.parametrize(("name", "steps"), [*((name, 4) for name in SCHEDULERS), ("flow euler", 1), ("unipc", 1)])
def test_wan(tmp_path, name, steps):
    whole = wan_pipeline(SCHEDULERS[name])
    ours = imported(whole, tmp_path)
    config = replace(ours.sampling, seed=7, num_steps=steps, negative_prompt=NEGATIVE)
    assert config.guidance_scale == 5.0
    expected = published_steps(whole, our_noise(ours, config), **wan_call(steps))
    assert largest(our_steps(ours, config), expected) <= 1e-5


def test_wan_with_two_transformers(tmp_path):
    whole = wan_pipeline(SCHEDULERS["unipc"], low_noise=True)
    ours = imported(whole, tmp_path)
    config = replace(ours.sampling, seed=7, num_steps=4, negative_prompt=NEGATIVE)
    assert (config.guidance_scale, config.guidance_scale_low, ours.sampling.num_steps) == (4.0, 3.0, 40)
    config = replace(config, guidance_scale=40.0, guidance_scale_low=8.0)  # or the two hardly differ
    told = {"guidance_scale": 40.0, "guidance_scale_2": 8.0}
    expected = published_steps(whole, our_noise(ours, config), **wan_call(4), **told)
    assert largest(our_steps(ours, config), expected) <= 1e-5
    for wrong in ({"guidance_scale_low": None}, {"guidance_scale": 8.0}):
        assert largest(ours.latents([CAPTION], SHAPE, replace(config, **wrong)), expected[-1:]) > 1e-4

    typed = SampleConfig(run="a", prompt="b", guidance_scale=6.0).settings(ours.sampling)
    assert (typed.guidance_scale, typed.guidance_scale_low) == (6.0, None)
    alone = replace(ours, denoiser=ours.denoiser.high)
    with pytest.raises(ValueError, match=r"guidance_scale_low=8\.0 is for the expert for low noise"):
        alone.check(config, ours.shapes[0])


@pytest.mark.parametrize("make", [wan_pipeline, hunyuan_pipeline])
def test_frames(tmp_path, make):
    whole = make(diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0))
    ours = imported(whole, tmp_path)
    config = replace(ours.sampling, seed=7, num_steps=3)
    call = {"prompt": CAPTION, "height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 3}
    length = {"max_sequence_length": 512} if make is wan_pipeline else {}
    expected = whole(latents=our_noise(ours, config)[None], output_type="np", **call, **length).frames[0]
    actual = ours.videos([CAPTION], SHAPE, config)[0]
    assert actual.shape == expected.shape
    assert (
        actual / 255 - torch.from_numpy(expected)
    ).abs().max() <= 0.5 / 255 + 1e-4  # they are rounded to whole numbers


def test_sample_obeys_the_manifest_and_names_what_is_typed(tmp_path):
    imported(wan_pipeline(SCHEDULERS["unipc"]), tmp_path)
    lines = []
    typed = {"run": f"{tmp_path}/run", "prompt": CAPTION, "shape": list(SHAPE), "allow_untrained_shape": True}
    paths = sample(SampleConfig(**typed, num_steps=2, out=f"{tmp_path}/a"), lines.append)
    assert lines[1] == (
        "sampling: unipc, 2 steps, guidance 5, shift of training; other than its manifest says: num_steps=2 for 50"
    )
    assert json.loads(read_metadata(paths[0])["comment"])["solver"] == "unipc"
    config = SampleConfig(**typed, num_steps=50, solver=Solver.heun, guidance_scale=1.0).settings(SamplingConfig())
    assert (config.solver, config.guidance_scale, config.scheduler) == (Solver.heun, 1.0, {})


def test_latents_of_a_release_whose_vae_is_another(tmp_path):
    imported(cogvideox_pipeline(diffusers.CogVideoXDDIMScheduler(**COGVIDEOX_SCHEDULER)), tmp_path)
    typed = {"run": f"{tmp_path}/run", "prompt": CAPTION, "shape": list(SHAPE), "allow_untrained_shape": True}
    with pytest.raises(ValueError, match=r"cannot be AutoencoderKLCogVideoX.*latents_only=true"):
        sample(SampleConfig(**typed, num_steps=2), print)
    path = sample(SampleConfig(**typed, num_steps=2, latents_only=True), print)[0]
    assert load_file(path)["latents"].shape == (4, 2, 4, 6)


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


def test_hunyuan_video(tmp_path):
    whole = hunyuan_pipeline(diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0))
    ours = imported(whole, tmp_path)
    config = replace(ours.sampling, seed=7, num_steps=4)
    assert (config.guidance_scale, config.embedded_guidance, ours.objective.shift_for(None)) == (1.0, 6.0, 7.0)
    call = {"prompt": CAPTION, "height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 4}
    expected = published_steps(whole, our_noise(ours, config), **call)
    assert largest(our_steps(ours, config), expected) <= 1e-5

    call |= {"negative_prompt": NEGATIVE, "true_cfg_scale": 3.0}
    config = replace(config, guidance_scale=3.0, negative_prompt=NEGATIVE)
    expected = published_steps(whole, our_noise(ours, config), **call)
    assert largest(our_steps(ours, config), expected) <= 1e-5


LTX_SCHEDULER = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024,
                 "max_image_seq_len": 4096, "shift_terminal": 0.1}  # fmt: skip


def test_ltx_video(tmp_path):
    whole = ltx_pipeline(diffusers.FlowMatchEulerDiscreteScheduler(**LTX_SCHEDULER))
    ours, shape = imported(whole, tmp_path), ClipShape(17, 96, 160)
    config = replace(ours.sampling, seed=7, num_steps=4, negative_prompt=NEGATIVE)
    assert config.guidance_scale == 3.0
    assert config.timestep_terminal == 0.1
    noise = our_noise(ours, config, shape)
    expected = published_steps(
        whole, noise.flatten(1).T, prompt=CAPTION, negative_prompt=NEGATIVE, height=96, width=160, num_frames=17,
        num_inference_steps=4,
    )  # fmt: skip
    expected = [step.T.unflatten(1, noise.shape[1:]) for step in expected]
    assert largest(our_steps(ours, config, shape), expected) <= 1e-5
    for wrong in ({"timestep_terminal": None}, {"timestep_shift": 1.0}):
        assert largest(ours.latents([CAPTION], shape, replace(config, **wrong)), expected[-1:]) > 1e-3


COGVIDEOX_SCHEDULER = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "clip_sample": False,
                       "timestep_spacing": "trailing", "snr_shift_scale": 3.0}  # fmt: skip


@pytest.mark.parametrize("steps", [4, 3])
def test_cogvideox(tmp_path, steps):
    whole = cogvideox_pipeline(diffusers.CogVideoXDDIMScheduler(**COGVIDEOX_SCHEDULER))
    ours = imported(whole, tmp_path)
    config = replace(ours.sampling, seed=7, num_steps=steps, negative_prompt=NEGATIVE)
    assert config.guidance_scale == 6.0
    expected = published_steps(
        whole, our_noise(ours, config).transpose(0, 1), prompt=CAPTION, negative_prompt=NEGATIVE, height=32, width=48,
        num_frames=5, num_inference_steps=steps,
    )  # fmt: skip
    expected = [step.transpose(0, 1) for step in expected]
    assert largest(our_steps(ours, config), expected) <= 1e-5
    if steps == 4:  # where the steps divide the table, it is our own DDIM
        own = replace(config, solver=Solver.ddim, scheduler={})
        assert largest(our_steps(ours, own), expected) <= 2e-5
        for wrong in ({"rows_from_zero": False}, {"snr_shift": 1.0}):
            other = replace(ours, objective=replace(ours.objective, **wrong))
            assert largest(other.latents([CAPTION], SHAPE, own), expected[-1:]) > 1e-4


@pytest.mark.parametrize("steps", [4, 50])
def test_cogvideox_with_dynamic_guidance(tmp_path, steps):
    whole = cogvideox_pipeline(diffusers.CogVideoXDDIMScheduler(**COGVIDEOX_SCHEDULER))
    ours = imported(whole, tmp_path)
    assert not ours.sampling.dynamic_guidance
    config = replace(ours.sampling, seed=7, num_steps=steps, negative_prompt=NEGATIVE, dynamic_guidance=True)
    expected = published_steps(
        whole, our_noise(ours, config).transpose(0, 1), prompt=CAPTION, negative_prompt=NEGATIVE, height=32, width=48,
        num_frames=5, num_inference_steps=steps, use_dynamic_cfg=True,
    )  # fmt: skip
    expected = [step.transpose(0, 1) for step in expected]
    assert largest(our_steps(ours, config), expected) <= 1e-5
    constant = ours.latents([CAPTION], SHAPE, replace(config, dynamic_guidance=False))
    assert largest(constant, expected[-1:]) > 1e-3


def test_dynamic_guidance_elsewhere_is_refused(tmp_path):
    ours = imported(wan_pipeline(SCHEDULERS["unipc"]), tmp_path)
    with pytest.raises(ValueError, match=r"dynamic_guidance=true is of CogVideoX"):
        ours.check(replace(ours.sampling, dynamic_guidance=True), ours.shapes[0])


LATTE_SCHEDULER = {"beta_schedule": "linear", "clip_sample": False, "timestep_spacing": "leading", "steps_offset": 1}


@pytest.mark.parametrize("steps", [4, 3])
def test_latte(tmp_path, steps):
    whole = latte_pipeline(diffusers.DDIMScheduler(**LATTE_SCHEDULER))
    ours, shape = imported(whole, tmp_path), ClipShape(3, 80, 80)
    config = replace(ours.sampling, seed=7, num_steps=steps, guidance_scale=1.0)
    expected = published_steps(
        whole, our_noise(ours, config, shape), prompt=CAPTION, guidance_scale=1.0, height=80, width=80,
        video_length=3, num_inference_steps=steps, clean_caption=False,
    )  # fmt: skip
    assert largest(our_steps(ours, config, shape), expected) <= 1e-5


WHOLE = {
    "wan": lambda: wan_pipeline(SCHEDULERS["unipc"]),
    "wan, euler": lambda: wan_pipeline(SCHEDULERS["flow euler"]),
    "wan, two transformers": lambda: wan_pipeline(SCHEDULERS["dpm-solver++"], low_noise=True),
    "hunyuan": lambda: hunyuan_pipeline(diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)),
    "ltx": lambda: ltx_pipeline(diffusers.FlowMatchEulerDiscreteScheduler(**LTX_SCHEDULER)),
    "cogvideox": lambda: cogvideox_pipeline(diffusers.CogVideoXDDIMScheduler(**COGVIDEOX_SCHEDULER)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_pipeline_goes_out_with_its_scheduler_and_a_sampling_through_it(tmp_path, name):
    whole = WHOLE[name]()
    whole.save_pretrained(tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "run")
    lines = kinema.export(tmp_path / "run", tmp_path / "out")
    assert lines[-1].startswith(f"{type(whole).__name__}: ")
    assert float(lines[-1].rsplit(" ", 1)[1]) <= 1e-5
    before, after = (
        json.loads((tmp_path / where / "scheduler/scheduler_config.json").read_text()) for where in ("published", "out")
    )
    assert after == before


def test_a_scheduler_that_samples_otherwise_is_not_exported(tmp_path, monkeypatch):
    whole = wan_pipeline(SCHEDULERS["flow euler"])
    whole.save_pretrained(tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "run")
    wrong = diffusers.FlowMatchEulerDiscreteScheduler(shift=9.0)
    monkeypatch.setattr(exporting, "published_scheduler", lambda *args, **options: wrong)
    with pytest.raises(ValueError, match=r"WanPipeline: euler, 4 steps.*nothing was written"):
        kinema.export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()

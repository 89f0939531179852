"""Memory foretold without computing anything, beside what is counted when it is computed; `kinema plan` tells it."""

import argparse
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import diffusers
import pytest
import torch
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.saved import saved_bytes
from kinema import plan
from kinema.cli import run_verb
from kinema.distributed.activations import ActivationCheckpointing, keep_less
from kinema.distributed.engine import Precision
from kinema.distributed.footprint import LiveBytes, Sharding, activations, states
from kinema.doctor.job import check_memory
from kinema.given import Given, given_by
from kinema.identity import to_plain
from kinema.interop.presets import PRESETS
from kinema.models.dit import DiT, DiTConfig
from kinema.models.vae import CausalVAE, VAEConfig
from kinema.training.checkpoints.store import CheckpointStore, json_writer
from kinema.training.finetune import LoRA
from tests.unit.test_activation_checkpointing import CONFIGS, DITS

NONE, SELECTIVE, ATTENTION, EVERY, FULL = ActivationCheckpointing
CASES = [("wan_tiny", SELECTIVE), ("hunyuan_tiny", FULL)]
ALL_CASES = [(name, kind) for name in DITS for kind in (NONE, SELECTIVE, ATTENTION, FULL)]


def denoise(config, precision, model):
    latents = [torch.randn(4, 4, 16, 12) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        found = model(latents, torch.rand(3), [torch.randn(9, 8) for _ in latents])
    return sum(clip.float().square().mean() for clip in found)


def counted(make, forward, kind):
    """The same by computing it."""
    model = make()
    keep_less(model.all_blocks(), kind)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with LiveBytes() as live:
        loss = forward(model)
        kept = live.now
        loss.backward()
    return kept, live.peak


def check_foretold(name, kind):
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DITS[name]), {"depth": 4}))
    make, forward = partial(DiT, config, 4, 8), partial(denoise, config, torch.bfloat16)
    foretold, real = activations(make, forward, DiT.all_blocks, kind), counted(make, forward, kind)
    assert foretold.kept == pytest.approx(real[0], rel=0.05)
    assert foretold.peak == pytest.approx(real[1], rel=0.1)  # the worst moment of few blocks may be another


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_activations_are_foretold(name, kind):
    check_foretold(name, kind)


@pytest.mark.soak
@pytest.mark.parametrize(("name", "kind"), ALL_CASES)
def test_activations_of_every_family_and_kind_are_foretold(name, kind):
    check_foretold(name, kind)


def test_activations_of_an_autoencoder_are_foretold():
    config = VAEConfig(width=8, decoder_width=8)
    job = SimpleNamespace(vae=config, parallel=SimpleNamespace(precision=Precision.float32))
    make, forward = partial(CausalVAE, config), partial(plan._reconstruct, job, [5, 32, 32], 2)
    foretold = activations(make, forward, CausalVAE.all_blocks, SELECTIVE)
    assert foretold == pytest.approx(counted(make, forward, SELECTIVE), rel=0.05)


def test_activations_beside_adapters_are_foretold():
    def adapted():
        model = DiT(DITS["wan_tiny"], 4, 8)
        lora.prepare(model)
        return model

    lora, forward = LoRA(rank=2, dropout=0.1), partial(denoise, None, torch.float32)
    make = partial(
        plan.made, SimpleNamespace(finetune=lora), SimpleNamespace(make=partial(DiT, DITS["wan_tiny"], 4, 8))
    )
    assert activations(make, forward, DiT.all_blocks, SELECTIVE) == pytest.approx(
        counted(adapted, forward, SELECTIVE), rel=0.05
    )


def test_a_plan_of_adapters_counts_gradients_of_what_is_trained_alone():
    found = []
    for words in (["model=wan_tiny"], ["model=wan_tiny", "finetune=lora", "init_from=runs/any"]):
        config = plan.composed(words)
        with FakeTensorMode():
            model = plan.made(config, plan.dit_job(config, Given()))
        found.append(plan.states_of(config, model, 1))
        assert found[-1].gradients == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole, adapters = found
    assert adapters.weights - whole.weights == adapters.gradients < whole.gradients


def test_what_lives_is_what_autograd_saves():
    config = DITS["wan_tiny"]
    model, forward = DiT(config, 4, 8), partial(denoise, config, torch.float32)
    kept, _ = counted(lambda: model, forward, NONE)
    assert kept == pytest.approx(saved_bytes(lambda: forward(model), model), rel=0.05)


def test_the_config_of_wan_1_3b_is_what_the_published_one_becomes():
    with torch.device("meta"):
        published = diffusers.WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30, text_dim=4096
        )
        (wan,) = (preset for preset in PRESETS if preset.name == "wan")
        model = wan.build(dict(published.config))
    values = OmegaConf.load(CONFIGS / "model" / "wan_1_3b.yaml")
    del values["defaults"]
    assert OmegaConf.to_object(OmegaConf.merge(DiTConfig, values)) == model.config


def test_what_is_offloaded_leaves_the_device_for_the_host():
    sharding = Sharding(zero_stage=3, ranks=4, bucket=10, live=100)
    here = states(1000, 200, 8000, 1, sharding)
    away = states(1000, 200, 8000, 1, replace(sharding, optimizer_on_host=True, weights_on_host=True))
    assert away.total == here.gradients + here.messages
    assert away.total + away.host == here.total


def planned(capsys, *words):
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    status = plan.run(parser.parse_args(words))
    return status, capsys.readouterr().out


def test_a_published_model_has_the_published_number_of_operations():
    """849 TFLOP a sample of 32,760 tokens: by the formula for one layer of Wan, thirty times and three times."""
    job = plan.dit_job(plan.composed(["model=wan_1_3b"]), Given([81, 480, 832], clips=1))
    tokens, words, width, hidden, layers = 32760, 512, 1536, 8960, 30
    linear = 8 * width**2 * tokens + 4 * width**2 * (tokens + words) + 4 * width * hidden * tokens
    attention = 4 * width * tokens**2
    assert job.flops == pytest.approx(layers * (linear + attention + 4 * width * tokens * words), rel=2e-3)
    assert job.attention_flops == pytest.approx(layers * attention, rel=1e-6)


def test_a_plan_recommends_the_fastest_kind_that_fits(capsys):
    tiny = ["model=wan_tiny", "--shape", "17", "64", "64", "--clips", "64", "--text-width", "64", "--text-tokens", "16"]
    status, told = planned(capsys, *tiny)
    assert status == 0
    assert "READY parallel.activation_checkpointing=none" in told
    kept = [float(line.split()[1]) for line in told.splitlines()[4:9]]
    assert kept[0] > kept[1] > kept[3] > kept[2] > kept[4] > 0  # of every second block all is kept
    status, told = planned(capsys, *tiny, "--device-gib", "0.001")
    assert status == 1
    assert "NO KIND FITS" in told.splitlines()[-1]


def test_a_plan_refuses_ranks_that_the_sequence_degree_does_not_divide(capsys):
    with pytest.raises(ValueError, match=r"parallel.sequence_degree=2 must divide the number of ranks, 3"):
        planned(capsys, "parallel.sequence_degree=2", "--ranks", "3")


TINY = ["model=wan_tiny", "data.shapes=[[1,32,32],[17,64,64]]", "data.clips_per_step=4", "data.lanes=2"]


@pytest.fixture
def vae_path(tmp_path):
    """A run folder whose manifest alone is there: all that a plan reads of a VAE."""
    manifest = {"vae": {"config": to_plain(VAEConfig(latent_channels=8))}}
    CheckpointStore(tmp_path / "vae").publish(1, {"manifest.json": json_writer(manifest)})
    return tmp_path / "vae"


def test_a_plan_has_the_facts_of_the_files_and_words_as_the_doctor_has(capsys, vae_path):
    words = [*TINY, f"vae.path={vae_path}", "text.width=48", "text.max_tokens=24"]
    given = given_by(plan.composed(words))
    assert given == Given([17, 64, 64], 2, (4, 8), 8, 48, 24)
    _, told = planned(capsys, *words)
    assert "a pack of 2 clip(s) of [17, 64, 64]: 160 tokens" in told
    assert "a step of 2 such packs" in told
    assert "ASSUMED" not in told
    assert "for a pack of 2 clip(s) of [17, 64, 64]: 160 tokens" in check_memory(plan.composed(words), 1).found


def test_a_plan_says_what_it_assumes_of_files_that_are_not_there(capsys):
    _, told = planned(capsys, *TINY, "--latent-channels", "8")
    assert [line for line in told.splitlines() if line.startswith("ASSUMED")] == [
        "ASSUMED --strides 4 8 (vae.path=nowhere is not there)"
    ]
    with pytest.raises(ValueError, match=r"vae\.path=nowhere holds no checkpoint"):
        given_by(plan.composed(TINY))  # as the doctor asks


def test_a_plan_refuses_ranks_that_do_not_divide_the_lanes(capsys):
    with pytest.raises(ValueError, match=r"data\.lanes=2 must be a multiple of the number of data ranks 3"):
        planned(capsys, *TINY, "--ranks", "3")


def test_words_may_stand_on_either_side_of_options(capsys):
    words = ["--clips", "1", "model=wan_tiny", "--ranks", "2", "data.lanes=2", "--text-tokens", "8", "text.width=48"]
    assert run_verb("plan", "kinema.plan", "plan", words) == 0
    assert "2 rank(s)" in (told := capsys.readouterr().out)
    assert "a step of 2 such packs" in told

"""Every tiny model of `configs/model`, and one axis of it changed at a time, learns on clips of the demo's kind."""

from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from kinema.conditioning.condition import Condition, embed
from kinema.conditioning.text import build_text_encoder
from kinema.config import register_schemas, to_config
from kinema.models.dit import DiT
from kinema.sampling.denoiser import Denoiser
from tests.end_to_end.commands import SHAPES
from tests.end_to_end.runs import run

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*_tiny.yaml"))
CHANGES = [
    "", "model.attention=factorised", "model.attention=windowed model.window=[2,2,2]", "model.text=joint",
    "model.text=shared", "model.attention=factorised model.text=joint", "model.attention=factorised model.text=shared",
    "model.text=joint model.modulation=linear", "model.modulation=lora", "model.qk_norm=none", "model.norm=rms",
    "model.activation=swiglu", "model.position_embedding=sincos",
]  # fmt: skip
CAPTIONS = ["a large red circle moves slowly right", "a star"]
CHANNELS = 4


@cache
def composed(model, change):
    register_schemas()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return to_config(compose("train", ["experiment=demo", f"model={model}", *change.split()]))


def losses(config, steps):
    """Of two clips at fixed noise, while AdamW learns them."""
    encoder, generator = build_text_encoder(config.text), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = DiT(config.model, CHANNELS, encoder.width)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    sizes = [(CHANNELS, 4, 8, 8), (CHANNELS, 4, 10, 8)]
    latents, noise = ([torch.randn(size, generator=generator) for size in sizes] for _ in range(2))
    conditions = [Condition(**words) for words in embed(encoder, CAPTIONS)]
    denoiser = Denoiser(model, config.model.patch_size[0])
    found = []
    for _ in range(steps):
        timesteps = torch.tensor([0.3, 0.8])
        loss = config.objective.loss(denoiser, latents, conditions, timesteps, noise, [64, 80], [0, 0]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    return found


POINTS = [("wan_tiny", change) for change in CHANGES]
POINTS += [(m, change) for m in MODELS for change in ("", "model.activation=silu") if m != "wan_tiny"]


@pytest.mark.parametrize(("model", "change"), POINTS)
def test_a_model_and_its_neighbours_learn(model, change):
    found = losses(composed(model, change), steps=4)
    assert found[-1] < 0.97 * found[0], found


def test_what_another_choice_of_the_model_excludes_is_said_with_what_to_type():
    with pytest.raises(ValueError, match=r"model\.single_depth=2 needs .*Type model\.single_depth=0"):
        composed("hunyuan_tiny", "model.text=shared")


def test_runs_of_different_models_lie_side_by_side():
    names = {composed("wan_tiny", change).name for change in CHANGES}
    assert len(names) == len(CHANGES)
    assert composed("wan_tiny", "steps=2").name == composed("wan_tiny", "").name


def test_the_command_of_an_ablation_trains(folder):
    command = "train.py experiment=demo model=wan_tiny model.attention=factorised model.text=joint"
    options = [f"run_root={folder}/runs", f"vae.path={folder}/runs/vae", f"data.path={folder}/toy", SHAPES]
    options += [
        "steps=2",
        "data.latents=null",
        "data.clips_per_step=2",
        "schedule.warmup_steps=0",
        "validation.clips=2",
    ]
    answer = run(*command.split(), *options, "task.samples.every_steps=0", "logging=file")
    assert "step 2: end: finished" in answer.stdout + answer.stderr

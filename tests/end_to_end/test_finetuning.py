"""Parts of a model and adapters: what was not named stays bit for bit, and a killed run continues bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time

import diffusers
import pytest
import torch

import kinema
from kinema.interop.adapters import DIFFUSERS_FILE
from kinema.interop.comparing import Sample, relative, wan
from kinema.interop.importing import import_model
from kinema.interop.loading import held_of
from kinema.training.checkpoints.store import Checkpoint, CheckpointStore, json_writer, tensor_writer
from kinema.training.run_folder import Weights
from tests.end_to_end.commands import ROOT, checkpoint, dit_command, environment, frames, same_checkpoint, torchrun
from tests.end_to_end.runs import run, train_vae
from tests.end_to_end.test_imported import VAE, WAN, randomise

pytestmark = pytest.mark.slow
PARTS = ["finetune=parts", "finetune.train=[blocks.*.sublayers.1.*,head.*]", "schedule=constant",
         "allow_config_change=true", "ema.decay=0.5"]  # fmt: skip


def tensors(path, name="model"):
    return Checkpoint(path).tensors(name)


@pytest.fixture(scope="module")
def start(folder):
    """A trained model to begin with."""
    run(*dit_command(folder, "start", 2, "task.samples.every_steps=0"))
    return folder


def test_only_parts_move_and_the_run_continues_bit_for_bit(start):
    extra = [*PARTS, f"init_from={start}/runs/start", "task.samples.prompts=[a red circle]"]
    answer = run(*dit_command(start, "parts", 4, *extra))
    assert "trains 12 of 42 tensors" in answer.stdout
    run(*dit_command(start, "parts_again", 2, *extra))
    run(*dit_command(start, "parts_again", 4, *extra))
    found = checkpoint(start, "parts", 4)
    assert same_checkpoint(found, checkpoint(start, "parts_again", 4))

    before = tensors(checkpoint(start, "start", 2), "ema")
    for name in ("model", "ema"):
        after = tensors(found, name)
        assert after.keys() == before.keys()
        moved = {key for key in before if not torch.equal(after[key], before[key])}
        assert moved == {key for key in before if ".sublayers.1." in key or key.startswith("head.")}
    assert {key.split("/")[2] for key in tensors(found, "optimizer")} == moved
    assert json.loads((found / "manifest.json").read_text())["finetune"]["type"] == "Parts"


def test_parts_of_a_vae_are_trained_and_the_others_are_in_its_checkpoint(folder):
    train_vae(folder, "vae_decoder", 2, "finetune=parts", "finetune.train=[decoder.*]", f"init_from={folder}/runs/vae")
    before = tensors(checkpoint(folder, "vae", 4), "ema")  # what init_from takes
    after = tensors(checkpoint(folder, "vae_decoder", 2))
    assert after.keys() == before.keys()
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert {key.split(".")[0] for key in moved} == {"decoder"}  # and with the encoder the statistics of its latents


LORA = ["finetune=lora", "finetune.rank=2", "finetune.dropout=0.2", "ema.decay=0.5", "checkpoint.every_steps=1",
        "task.samples.prompts=[a small red circle moves slowly left]", "task.samples.every_steps=3",
        "task.samples.shape=[5,32,32]"]  # fmt: skip


def lora_command(folder, name, *extra):
    return dit_command(folder, name, 3, *LORA, f"init_from={folder}/runs/start", *extra)


def test_adapters_killed_on_two_ranks_continue_bit_for_bit_and_are_sampled(start):
    folder = start
    answer = run(*lora_command(folder, "lora"), ranks=2)
    assert "adapters of rank 2 on 10 linear layers, trains 20 of 62 tensors" in answer.stdout
    kill_after_a_checkpoint(folder, "killed_lora", lora_command(folder, "killed_lora"))
    run(*lora_command(folder, "killed_lora"), ranks=2)
    found = checkpoint(folder, "lora", 3)
    assert same_checkpoint(found, checkpoint(folder, "killed_lora", 3))
    assert all(".lora_" in key for key in tensors(found))

    sampled = run("sample.py", f"run={folder}/runs/lora", "prompt=a small red circle moves slowly left", "num_steps=2",
                  "guidance_scale=2", f"out={folder}/lora_sampled")  # fmt: skip
    assert "wrote 1 video" in sampled.stdout
    assert torch.equal(
        frames(folder / "lora_sampled/000.mp4"), frames(folder / "runs/lora/samples/step-00000003/00.mp4")
    )

    refused = run(*dit_command(folder, "on_top", 1, f"init_from={folder}/runs/lora"), expect=None)
    assert "holds adapters. Merge them into their base first" in refused.stderr
    other = CheckpointStore(folder / "runs/lora/base")
    other.publish(2, {"ema.safetensors": tensor_writer({key: value + 1 for key, value in base_of(folder).items()}),
                      "manifest.json": json_writer({})})  # fmt: skip
    refused = run("sample.py", f"run={folder}/runs/lora", "prompt=a", expect=None)
    assert "is not the one that the adapters of" in refused.stderr


def base_of(folder):
    return tensors(checkpoint(folder, "start", 2), "ema")


def kill_after_a_checkpoint(folder, name, command):
    """SIGKILL to the launcher and its ranks as soon as step 1 is saved."""
    process = subprocess.Popen(
        [sys.executable, *torchrun(2), *command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not checkpoint(folder, name, 1).exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not checkpoint(folder, name, 3).exists()


def test_adapters_of_an_imported_wan_compute_the_same_in_diffusers(folder, tmp_path):
    transformer = randomise(diffusers.WanTransformer3DModel(**WAN))
    transformer.save_pretrained(tmp_path / "transformer")
    randomise(diffusers.AutoencoderKLWan(**VAE)).save_pretrained(tmp_path / "vae")
    import_model(tmp_path / "transformer", tmp_path / "imported", vae=tmp_path / "vae")
    command = (
        f"train.py --config-dir {tmp_path}/imported/configs experiment=imported name=tuned run_root={tmp_path}/runs "
        f"steps=2 data.path={folder}/toy data.shapes=[[5,32,32]] text.width=12 data.clips_per_step=2 data.lanes=2 "
        "data.num_workers=0 logging=file validation.clips=2 task.samples.every_steps=0 schedule.warmup_steps=0 "
        "optim.learning_rate=0.05 finetune=lora finetune.rank=2 finetune.alpha=3"
    )
    run(*command.split(), ranks=2)
    lines = kinema.export(tmp_path / "runs/tuned", tmp_path / "lora", format="lora-diffusers", weights="raw")
    lines += kinema.export(tmp_path / "runs/tuned", tmp_path / "comfyui", format="lora-comfyui", weights="raw")
    differences = [float(line.rsplit(" ", 1)[1]) for line in lines]
    assert len(differences) == 3  # by diffusers, as ComfyUI does, and by diffusers from ComfyUI's file
    assert max(differences) < 1e-5

    ours, _ = held_of(tmp_path / "runs/tuned", Weights.raw).models["transformer"]
    sample = Sample.of(ours, 7)
    with torch.no_grad():
        expected = torch.stack(ours.predict(list(sample.latents), sample.timesteps, list(sample.text)))
        before = wan(transformer, {}, sample)
        transformer.load_lora_adapter(tmp_path / "lora", prefix="transformer", weight_name=DIFFUSERS_FILE)
        assert relative(wan(transformer, {}, sample), expected) < 1e-5
    assert relative(before, expected) > 1e-3
    assert json.loads((tmp_path / "lora/manifest.json").read_text())["exported"]["format"] == "lora-diffusers"

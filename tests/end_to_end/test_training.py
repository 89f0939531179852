"""From clips to a checkpoint, killed and continued, on one rank and on two: the same numbers."""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from kinema.training.checkpoints.store import Checkpoint
from tests.end_to_end.commands import (
    ROOT,
    checkpoint,
    dit_command,
    environment,
    frames,
    losses,
    records,
    same_checkpoint,
    torchrun,
)
from tests.end_to_end.runs import fresh, run, train_vae

pytestmark = pytest.mark.slow
STEPS = 6
PROMPTS = "task.samples.prompts=[a small red circle moves slowly left,a large blue square moves slowly up]"
SAMPLES = ["task.samples.every_steps=3", "task.samples.shape=[5,32,32]", PROMPTS]


@pytest.fixture(scope="module")
def whole(folder):
    """The uninterrupted run that the others are compared with."""
    run(*dit_command(folder, "whole", STEPS, *SAMPLES))
    return folder


def test_a_run_killed_at_any_moment_continues_bit_for_bit(whole):
    command = dit_command(whole, "killed", STEPS, *SAMPLES)
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = whole / "runs/killed/metrics.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (metrics.exists() and '"step": 4' in metrics.read_text()):
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not checkpoint(whole, "killed", STEPS).exists()
    run(*command)
    assert same_checkpoint(checkpoint(whole, "whole", STEPS), checkpoint(whole, "killed", STEPS))
    assert losses(whole, "killed") == losses(whole, "whole")
    assert not same_checkpoint(checkpoint(whole, "whole", STEPS), checkpoint(whole, "whole", 4))


def test_two_ranks_then_one_then_two_follow_the_same_trajectory(whole):
    name, allow = "elastic", "allow_config_change=true"
    fresh(*torchrun(2), *dit_command(whole, name, 2, *SAMPLES, allow, "parallel.zero_stage=2"))
    run(*dit_command(whole, name, 4, *SAMPLES, allow, "data.num_workers=0"))
    command = dit_command(whole, name, STEPS, *SAMPLES, allow, "parallel.zero_stage=3", "data.num_workers=2")
    run(*command, ranks=2)
    kept = (whole / "runs" / name / "config.yaml").read_text()
    assert kept == (checkpoint(whole, name, STEPS) / "config.yaml").read_text()
    assert "zero_stage: 3" in kept
    expected = losses(whole, "whole")
    assert losses(whole, name) == pytest.approx(expected, rel=1e-4)
    ours, theirs = (Checkpoint(checkpoint(whole, n, STEPS)).tensors("ema") for n in (name, "whole"))
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=2e-5)
    # 24 clips, 6 steps of 4: each clip was seen exactly once, whoever decoded it.

    ledger = json.loads((whole / "runs" / name / "ledger.json").read_text())
    totals = [
        sum(account[field] for account in ledger["shards"].values()) for field in ("decoded", "failed", "repeated")
    ]
    assert totals == [24, 0, 0]


def test_the_deepspeed_launcher_gives_the_losses_of_one_rank(whole):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(port)]
    answer = fresh(*launcher, *dit_command(whole, "launched", 2, *SAMPLES))  # it adds --local_rank to the command
    assert "2 rank(s)" in answer.stdout
    expected = losses(whole, "whole")
    assert losses(whole, "launched") == {step: pytest.approx(expected[step], rel=1e-4) for step in (1, 2)}


def test_sigterm_saves_and_the_same_command_continues(whole):
    command = dit_command(whole, "stopped", STEPS, *SAMPLES, "checkpoint.every_steps=1000")
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = whole / "runs/stopped/metrics.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (metrics.exists() and '"kind": "train"' in metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "the same command continues" in output
    run(*command)
    assert same_checkpoint(checkpoint(whole, "whole", STEPS), checkpoint(whole, "stopped", STEPS))


def test_samples_during_training_are_the_samplers_samples(whole):
    from kinema.data.decode.encoding import read_metadata

    prompts = whole / "prompts.txt"
    prompts.write_text("a small red circle moves slowly left\na large blue square moves slowly up\n")
    answer = run(
        "sample.py", f"run={whole}/runs/whole", f"prompts_file={prompts}", "num_steps=2", "guidance_scale=2",
        "shape=[5,32,32]", f"out={whole}/sampled",
    )  # fmt: skip
    manifest = json_of(checkpoint(whole, "whole", STEPS) / "manifest.json")
    assert f"fingerprint {manifest['fingerprints']['ema']}" in answer.stdout
    for i in (0, 1):
        during = frames(whole / f"runs/whole/samples/step-{STEPS:08d}/{i:02d}.mp4")
        assert torch.equal(during, frames(whole / f"sampled/{i:03d}.mp4"))
        assert not torch.equal(
            during, frames(whole / f"runs/whole/samples/step-00000003/{i:02d}.mp4")
        )  # the weights moved
    metadata = read_metadata(whole / "sampled/001.mp4")
    origin = json.loads(metadata["comment"])
    assert origin["prompt"] == "a large blue square moves slowly up"
    assert origin["seed"] == 1
    assert origin["fingerprint"] == manifest["fingerprints"]["ema"]


def test_the_sampler_refuses_what_contradicts_the_manifest(whole):
    base = [
        "sample.py",
        f"run={whole}/runs/whole",
        "prompt=a small red circle moves slowly left",
        "num_steps=2",
        f"out={whole}/refused",
    ]
    for extra, message in (
        ("fps=24", "contradicts the checkpoint"),
        ("shape=[6,32,32]", "Nearest legal"),
        ("shape=[5,64,64]", "not one that these weights were trained on"),
        ("guidance_scale=-1", "guidance_scale=-1"),
        ("run=" + str(whole / "runs/vae"), "holds a vae"),
        ("run=" + str(whole / "runs/absent"), "holds no checkpoint"),
    ):
        answer = run(*base, extra, expect=None)
        assert answer.returncode != 0
        assert message in answer.stderr, (extra, answer.stderr[-800:])


def test_a_changed_configuration_is_refused_by_name(whole):
    answer = run(*dit_command(whole, "whole", STEPS, *SAMPLES, "seed=5"), expect=None)
    assert answer.returncode != 0
    assert "seed: 0 -> 5" in answer.stderr


def test_the_vae_run_has_statistics_pictures_and_every_term(folder):
    manifest = json_of(checkpoint(folder, "vae", 4) / "manifest.json")
    assert manifest["task"] == "vae"
    weights = Checkpoint(checkpoint(folder, "vae", 4)).tensors("ema")
    assert not torch.equal(weights["latent_std"], torch.ones_like(weights["latent_std"]))
    train = records(folder, "vae", "train")
    assert set(train[4]["terms"]) == {"squared", "kl"}
    assert (folder / "runs/vae" / records(folder, "vae", "reconstruction")[4]["sheet"]).exists()


def test_an_adversarial_vae_resumes_its_discriminator_too(folder):
    extra = [
        "task.loss.adversarial=0.1",
        "task.loss.discriminator_width=4",
        "task.loss.discriminator_layers=1",
        "allow_config_change=true",
        "schedule=constant",
    ]
    train_vae(folder, "gan_whole", 4, *extra)
    train_vae(folder, "gan", 2, *extra)
    train_vae(folder, "gan", 4, *extra)
    assert same_checkpoint(checkpoint(folder, "gan", 4), checkpoint(folder, "gan_whole", 4))
    assert records(folder, "gan", "train")[4]["terms"]["discriminator"] != 0


def json_of(path):
    return json.loads(path.read_text())

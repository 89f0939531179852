"""A run that reads cached embeddings is the run that encodes its captions, without the encoder in memory."""

import json

import pytest
import torch

from kinema.training.checkpoints.store import Checkpoint
from tests.end_to_end.commands import checkpoint, dit_command, frames, losses, records
from tests.end_to_end.runs import run
from tests.parity.tiny_texts import clip, llama

pytestmark = pytest.mark.slow
STEPS = 2
PROMPTS = "task.samples.prompts=[a small red circle moves slowly left]"
OPTIONS = ["task.samples.every_steps=2", "task.samples.shape=[5,32,32]", PROMPTS, "validation.every_steps=2"]


@pytest.fixture(scope="module", name="text")
def hunyuan_like(folder):
    """A LLaMA for the tokens and a CLIP for one pooled vector, as overrides."""
    words = ["text=hunyuan", "text.tokens.template='see {}'", "text.tokens.crop=0", "text.tokens.max_tokens=64"]
    for name, made in {"tokens": llama, "pooled": clip}.items():
        for part in made():
            part.save_pretrained(folder / "text" / name)
        words.append(f"text.{name}.path={folder}/text/{name}")
    return [*words, "model.pooled_width=8", "model.modulation=linear"]


def encode_text(folder, *words):
    return run("-m", "kinema.cli", "data", "encode-text", f"{folder}/toy", "--out", f"{folder}/embeddings", *words)


def test_the_same_losses_samples_and_manifest_on_one_rank_and_on_two(folder, text):
    run(*dit_command(folder, "encoding", STEPS, *OPTIONS, *text))
    cached = [*OPTIONS, *text, f"data.text={folder}/embeddings"]
    encode_text(folder, "--run", f"{folder}/runs/encoding")
    refused = run(*dit_command(folder, "refused", STEPS, *cached), expect=None)
    assert refused.returncode != 0
    assert f"--out {folder}/embeddings --prompt 'a small red circle moves slowly left'" in refused.stderr
    encode_text(folder, "--prompt", "a small red circle moves slowly left")

    run(*dit_command(folder, "cached", STEPS, *cached))
    assert losses(folder, "cached") == losses(folder, "encoding")
    validated = [records(folder, name, "validation") for name in ("cached", "encoding")]
    assert validated[0][STEPS]["loss"] == validated[1][STEPS]["loss"]
    one, other = (checkpoint(folder, name, STEPS) for name in ("cached", "encoding"))
    ours, theirs = (Checkpoint(path).tensors("model") for path in (one, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    sample = f"samples/step-{STEPS:08d}/00.mp4"
    assert frames(folder / "runs/cached" / sample).equal(frames(folder / "runs/encoding" / sample))
    documents = [json.loads((path / "manifest.json").read_text()) for path in (one, other)]
    assert documents[0]["text"] == documents[1]["text"]

    run(*dit_command(folder, "cached_two", STEPS, *cached), ranks=2)
    assert losses(folder, "cached_two") == pytest.approx(losses(folder, "encoding"), rel=1e-4)

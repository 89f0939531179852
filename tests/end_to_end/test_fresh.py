"""A fork of the warm process is what a fresh interpreter is: the same state, numbers, words and exit statuses."""

import json
import os
import time

import pytest

from tests.end_to_end.commands import checkpoint, dit_command, frames, records, same_checkpoint
from tests.end_to_end.runs import fresh, run
from tests.warm import warm_process

pytestmark = pytest.mark.slow
PROMPT = "a small red circle moves slowly left"
STARTS = {"fresh": fresh, "forked": run}
SCRIPT = """
import json, os, random, resource, signal, sys, threading
import deepspeed, numpy, torch, wandb
from hydra.core.global_hydra import GlobalHydra
import kinema.build

print(json.dumps({
    "words": sys.argv, "main": [__name__, __file__], "folder": os.getcwd(),
    "variables": {name: value for name, value in os.environ.items() if name != "KEPT"},
    "signals": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
    "limits": [resource.getrlimit(kind) for kind in range(16)], "umask": os.umask(0o22),
    "threads": [torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()],
    "random": [random.random(), numpy.random.rand(), torch.rand(()).item()],
    "hydra": GlobalHydra.instance().is_initialized(),
    "torch": [str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()],
    "of the run before": [os.environ.get("KEPT"), getattr(torch, "kept", None)],
}))
os.environ["KEPT"] = torch.kept = "by this run"
torch.manual_seed(1)
torch.set_num_threads(2)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
GlobalHydra.instance().hydra = "in use"
sys.exit("and an end with words")
"""


def test_it_starts_as_one_does_and_nothing_of_it_is_left_for_the_next(tmp_path, monkeypatch):
    script = tmp_path / "state.py"
    script.write_text(SCRIPT)
    monkeypatch.setenv("KINEMA_OF_THIS_TEST", "set while it runs")
    monkeypatch.chdir(tmp_path)
    answers = [start(f"{script}", "a=1", "b='2 3'", expect=1) for start in (fresh, run, run)]
    states = [json.loads(answer.stdout.splitlines()[-1]) for answer in answers]
    drawn = [number for state in states for number in state.pop("random")]
    assert len(set(drawn)) == 9, "each draws its own"
    assert states[0] == states[1] == states[2]
    assert states[0]["variables"].items() >= os.environ.items()
    assert all(answer.stderr.endswith("and an end with words\n") for answer in answers)


def test_ranks_that_end_at_the_same_moment_are_all_seen(tmp_path):
    (tmp_path / "nothing.py").write_text("")
    job = warm_process().start([f"{tmp_path}/nothing.py"], tmp_path / "log", 4)
    time.sleep(0.5)
    assert job.wait(5) == [0, 0, 0, 0]


@pytest.fixture(scope="module")
def trained(folder):
    """The same training, sampled on the way, by a fresh interpreter and by a fork."""
    samples = ["task.samples.every_steps=2", "task.samples.shape=[5,32,32]", f"task.samples.prompts=[{PROMPT}]"]
    for name, start in STARTS.items():
        start(*dit_command(folder, name, 2, *samples))
    return folder


@pytest.mark.parametrize("kind", ["train", "validation"])
def test_training_gives_the_same_numbers_bit_for_bit(trained, kind):
    compared = ("loss", "grad_norm", "learning_rate", "clips", "tokens")
    one, other = (
        {step: [record.get(key) for key in compared] for step, record in records(trained, name, kind).items()}
        for name in STARTS
    )
    assert one == other
    assert len(one) == {"train": 2, "validation": 1}[kind]


def test_and_the_same_checkpoint_and_samples(trained):
    assert same_checkpoint(*(checkpoint(trained, name, 2) for name in STARTS))
    command = ["sample.py", f"run={trained}/runs/fresh", f"prompt={PROMPT}", "num_steps=2", "guidance_scale=2",
               "shape=[5,32,32]"]  # fmt: skip
    videos = [trained / f"runs/{name}/samples/step-00000002/00.mp4" for name in STARTS]
    for name, start in STARTS.items():
        start(*command, f"out={trained}/sampled_{name}")
        videos.append(trained / f"sampled_{name}/000.mp4")
    assert all(frames(video).equal(frames(videos[0])) for video in videos)


def test_a_verb_says_the_same_and_ends_with_the_same_status(folder):
    for data, status in (("toy", 0), ("none", 1)):
        one, other = (
            start("-m", "kinema.cli", "data", "stats", f"{folder}/{data}", expect=status) for start in STARTS.values()
        )
        assert one.stdout == other.stdout
        assert one.stderr.splitlines()[-1:] == other.stderr.splitlines()[-1:]

"""Muon and 8-bit AdamW through train.py: stopped on two ranks, continued on one at another ZeRO stage."""

import pytest

from tests.end_to_end.commands import dit_command, losses
from tests.end_to_end.runs import run, train_vae

pytestmark = pytest.mark.slow
OPTIONS = ["checkpoint.every_steps=3", "validation.every_steps=0", "task.samples.every_steps=0", "data.num_workers=0",
           "data.lanes=2"]  # fmt: skip
MUON = ["optim=muon", "optim.newton_schulz_precision=float32"]
EIGHT_BITS = ["optim=adamw_8bit"]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains to a step on some ranks, and gives the loss of every step so far."""
    folder = tmp_path_factory.mktemp("optimizers")

    def train(name, steps, ranks, *options):
        run(*dit_command(folder, name, steps, *OPTIONS, "allow_config_change=true", *options), ranks=ranks)
        return losses(folder, name)

    run("data_prep/toy.py", "--out", f"{folder}/toy", "--clips", "12", "--heldout", "4", "--sizes", "64x64")
    train_vae(folder, "vae", 1, "validation.every_steps=0", "data.num_workers=0")
    return train


@pytest.mark.parametrize(
    ("name", "options", "stages", "near"),
    [("muon", MUON, (3, 1), 1e-5), ("eight_bits", EIGHT_BITS, (2, 0), 1e-3)],
)
def test_a_run_continues_on_another_layout(train, tmp_path, name, options, stages, near):
    before, after = (f"parallel.zero_stage={stage}" for stage in stages)
    disk = ["parallel.offload.optimizer=nvme", f"parallel.offload.nvme_path={tmp_path}"]
    whole = train(f"{name}_whole", 6, 1, *options)
    train(name, 3, 2, *options, before, *disk)
    assert train(name, 6, 1, *options, after) == pytest.approx(whole, rel=near)
    assert not list(tmp_path.iterdir())  # files of the state have no name

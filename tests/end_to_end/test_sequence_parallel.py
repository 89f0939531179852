"""A run whose ranks work on packs together: the numbers, the ledger and the checkpoints of one rank."""

import json

import pytest

from tests.end_to_end.commands import dit_command, losses, records
from tests.end_to_end.runs import run

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS = 4
TOGETHER = "parallel.sequence_degree=2"


@pytest.fixture(name="runs", scope="module")
def three_runs(folder):
    """One rank, two that share every pack under ZeRO 3, and one that goes on with two that do, and then alone again."""

    def train(name: str, steps: int, ranks: int, *extra: str) -> None:
        arguments = [f"steps={steps}", "schedule=constant", "data.num_workers=0", "logging.keys=true", *extra]
        run(*dit_command(folder, name, STEPS, *arguments), ranks=ranks)

    train("alone", STEPS, 1)
    train("together", STEPS, 2, TOGETHER, "parallel.zero_stage=3")
    train("halfway", STEPS // 2, 1)
    train("halfway", STEPS - 1, 2, TOGETHER, "parallel.zero_stage=1", "allow_config_change=true")
    train("halfway", STEPS, 1, "allow_config_change=true")
    return folder


@pytest.mark.parametrize("name", ["together", "halfway"])
def test_ranks_that_share_every_pack_train_as_one_rank_does(runs, name):
    assert losses(runs, name) == pytest.approx(losses(runs, "alone"), rel=1e-5)
    for kind, keys in (("train", ("grad_norm", "clips", "tokens")), ("validation", ("loss",))):
        ours, theirs = (records(runs, run, kind) for run in (name, "alone"))
        for step, record in theirs.items():
            assert [ours[step][key] for key in keys] == pytest.approx([record[key] for key in keys], rel=1e-4)


@pytest.mark.parametrize("name", ["together", "halfway"])
def test_what_they_saw_is_counted_once(runs, name):
    ours, theirs = (json.loads((runs / "runs" / run / "ledger.json").read_text()) for run in (name, "alone"))
    assert ours == theirs

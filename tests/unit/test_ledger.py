import json

import pytest
import torch

from kinema.data.account.ledger import DataBudgetError, Ledger, Quarantine
from kinema.data.geometry import ClipShape
from kinema.data.packs.pack import Failure, Pack
from kinema.data.steps.candidates import plan_clips
from tests.unit.clips import GEOMETRY, SHAPES, build


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    facts = {
        "license": lambda i: "CC-BY-3.0" if i < 4 else "CC0-1.0",
        "source": lambda i: "film" if i < 4 else "toy",
        "caption": lambda i: "" if i == 7 else "a ball",
    }
    return build(tmp_path_factory.mktemp("data") / "set", 8, **facts)


def pack(numbers, *, failed=(), withdrawn=(), epoch=0):
    keys = [f"clip-{number:03d}" for number in numbers]
    return Pack(
        step=0,
        lane=0,
        keys=keys,
        captions=keys,
        shapes=[ClipShape(9, 32, 32)] * len(keys),
        frames=None,
        latents=None,
        weights=torch.tensor([float(number not in (*failed, *withdrawn)) for number in numbers]),
        cost=1.0,
        positions=list(numbers),
        epochs=[epoch] * len(keys),
        failures=[Failure(f"clip-{number:03d}", "shard", "no video stream") for number in failed],
        fps=8.0,
        seconds=0.1,
        entries=list(numbers),
        withdrawn=[Failure(f"clip-{number:03d}", "shard", "withdrawn") for number in withdrawn],
    )


def test_clips_are_entered_by_shard_and_source(index):
    ledger = Ledger()
    ledger.record(pack([0, 1, 4, 5], failed=[1]), index)
    ledger.record(pack([0, 6], epoch=1), index)
    film, toy = ledger.sources["film"], ledger.sources["toy"]
    assert (film.decoded, film.failed, film.repeated, film.clips) == (2, 1, 1, 3)
    assert (toy.decoded, toy.failed, toy.repeated) == (3, 0, 1)
    assert film.seconds == pytest.approx(2 * 9 / 8)
    assert dict(film.licenses) == {"CC-BY-3.0": 2}
    assert ledger.shards["clips-000000.tar"] == film
    assert ledger.shards["clips-000001.tar"] == toy
    assert ledger.total.clips == 6


def test_ranks_ledgers_add_up_to_that_of_one_rank(index):
    whole, ranks = Ledger(), [Ledger(), Ledger()]
    for rank, numbers in enumerate([[0, 1, 2], [3, 4, 5]]):
        for ledger in (whole, ranks[rank]):
            ledger.record(pack(numbers, failed=[2]), index)
    ranks[0].merge(Ledger.from_dict(json.loads(json.dumps(ranks[1].to_dict()))))
    assert ranks[0].to_dict() == whole.to_dict()


def test_a_ledger_goes_through_json_and_on(index):
    ledger = Ledger()
    ledger.record(pack([0, 1], failed=[1]), index)
    again = Ledger.from_dict(json.loads(json.dumps(ledger.to_dict())))
    for one in (ledger, again):
        one.record(pack([2, 3]), index)
    assert again.to_dict() == ledger.to_dict()


def test_clips_left_out_are_entered_by_source(index):
    ledger = Ledger()
    ledger.record_kept(plan_clips(index, SHAPES, 8, GEOMETRY)[1])
    assert ledger.sources["toy"].dropped == 1
    assert ledger.total.clips == 0


def test_the_limit_is_a_share_and_a_number(index):
    quarantine = Quarantine(max_failed_fraction=0.25, min_failed_clips=2)
    ledger = Ledger()
    quarantine.check(ledger)
    ledger.record(pack([0, 1], failed=[0, 1]), index)
    quarantine.check(ledger)  # all of them, but two only
    ledger.record(pack([2, 3, 4, 5, 6, 7], failed=[4]), index)
    with pytest.raises(DataBudgetError) as error:
        quarantine.check(ledger)
    message = str(error.value)
    assert "3 of 8 clips (37.5%)" in message
    assert "data.max_failed_fraction=0.25" in message
    assert "3 x no video stream" in message
    assert "clips-000000.tar (2)" in message
    assert 'quarantine.jsonl in the run\'s folder names the clips; one with "fatal": true is tried again' in message


def test_a_damaged_clip_counts_once_however_often_and_wherever_it_is_shown(index):
    quarantine, ranks = Quarantine(max_failed_fraction=0.125, min_failed_clips=0), [Ledger(), Ledger()]
    for epoch in range(6):
        ranks[epoch % 2].record(pack(range(8), failed=[5], epoch=epoch), index)
    ranks[0].merge(Ledger.from_dict(json.loads(json.dumps(ranks[1].to_dict()))))
    assert ranks[0].total.failed == 6
    assert (ranks[0].damaged_clips, ranks[0].distinct_clips) == (1, 8)
    quarantine.check(ranks[0])
    ranks[0].record(pack([2], failed=[2], epoch=6), index)
    with pytest.raises(DataBudgetError, match=r"^2 of .*7 x no video stream"):
        quarantine.check(ranks[0])


def test_the_names_of_damaged_clips_stay_few_and_their_number_true(index, monkeypatch):
    monkeypatch.setattr("kinema.data.account.ledger.MOST_NAMES", 2)
    ledger = Ledger()
    ledger.record(pack([0, 1, 2, 3], failed=[0, 1, 2, 3]), index)
    assert len(ledger.damaged) == 3
    assert ledger.damaged_clips == 4

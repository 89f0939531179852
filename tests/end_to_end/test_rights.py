"""A clip that is withdrawn in the middle of a run: who saw it, and that everything else goes on as it would have."""

import json

import pytest

from kinema.data.dataset.shards import DatasetIndex
from kinema.training.records.seen_table import Question, answer
from tests.end_to_end.commands import checkpoint
from tests.end_to_end.runs import run, train_vae

pytestmark = pytest.mark.slow


def json_of(path):
    return json.loads(path.read_text())


def test_a_clip_withdrawn_from_a_run_is_shown_no_more_and_nothing_else_moves(folder):
    whole = folder / "runs/withdrawn"
    few = "data.max_clips=6"  # 6 steps of 4 show each clip four times
    train_vae(folder, "withdrawn", 2, few)
    keys = [entry.record.key for entry in DatasetIndex.load(folder / "toy", "train").entries[:6]]
    first = checkpoint(folder, "withdrawn", 2)
    assert answer(whole, Question()).verdict() == "SEEN 8 clips by step-00000002"
    before = {key: answer(first, Question(key=key)).rows[0].shown for key in keys}
    assert sum(before.values()) == 8

    exclude = f"data.rights.excluded_keys=[{keys[0]}]"
    told = train_vae(folder, "withdrawn", 6, few, exclude, "allow_config_change=true")
    assert f"1 of its 6 clips are no longer read: key in data.rights.excluded_keys 1 ({keys[0]})" in told.stdout
    after = {key: answer(checkpoint(folder, "withdrawn", 6), Question(key=key)).rows[0].shown for key in keys}
    assert after == {key: before[key] if key == keys[0] else 4 for key in keys}
    ledger = json_of(whole / "ledger.json")
    (source,) = ledger["sources"].values()
    assert source["withdrawn"] == 4 - before[keys[0]] > 0
    assert (source["decoded"], source["distinct"], source["failed"]) == (24 - source["withdrawn"], 6, 0)
    assert ledger["withdrawn"] == {"key in data.rights.excluded_keys": source["withdrawn"]}
    assert ledger["left_out"] == {"beyond data.max_clips": 18}
    assert answer(whole, Question(key=keys[0])).seeing == [f"step-0000000{step}" for step in (2, 4, 6)]

    # A new run from these weights plans without the clip, and still answers for it.
    told = train_vae(folder, "after", 1, "data.max_clips=8", exclude, f"init_from={first}")
    assert "key in data.rights.excluded_keys 1" in told.stdout
    assert json_of(folder / "runs/after/ledger.json")["withdrawn"] == {}
    asked = ["-m", "kinema.cli", "data", "ledger", str(folder / "runs/after"), "--key", keys[0], "--json"]
    told = json.loads(run(*asked).stdout)
    assert [row["shown"] for row in told["rows"]] == [before[keys[0]], 0]
    assert told["seen_by"] == ["step-00000001"]
    data = json_of(checkpoint(folder, "after", 1) / "manifest.json")["data"]
    assert data["rights"]["excluded_keys"] == [keys[0]]
    assert data["start"]["seen"]["licenses"]["CC0-1.0"]["shown"] == 8
    assert data["seen"]["licenses"]["CC0-1.0"]["shown"] == 4

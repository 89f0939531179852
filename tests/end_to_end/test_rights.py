"""A clip that is withdrawn in the middle of a run: who saw it, and that everything else goes on as it would have."""

import json

import pytest

from kinema.data.shards import DatasetIndex
from tests.end_to_end.commands import checkpoint, dit_command, records, run, torchrun

pytestmark = pytest.mark.slow


def ledger(run_folder, *words, expect=0):
    return run("-m", "kinema.cli", "data", "ledger", str(run_folder), *words, expect=expect).stdout.splitlines()


def first_packs(folder, name):
    """The keys that were shown, by checkpoint: asked one by one."""
    keys = [entry.record.key for entry in DatasetIndex.load(folder / "toy", "train").entries]
    return {key: json.loads(ledger(folder / "runs" / name, "--key", key, "--json")[0])["seen_by"] for key in keys[:4]}


def test_a_clip_withdrawn_from_a_run_is_shown_no_more_and_nothing_else_moves(folder):
    name, runs = "withdrawn", folder / "runs"
    few = "data.max_clips=6"  # every clip comes again within 6 steps of 4
    run(*dit_command(folder, name, 2, few))
    before = json.loads(ledger(runs / name, "--json")[0])
    assert before["verdict"] == "SEEN 8 clips by step-00000002"
    index = DatasetIndex.load(folder / "toy", "train")
    key = index.entries[0].record.key
    (row,) = json.loads(ledger(runs / name, "--key", key, "--json")[0])["rows"]
    assert row["shown"] in {1, 2}

    exclude = f"data.rights.excluded_keys=[{key}]"
    refused = run(*dit_command(folder, name, 6, few, exclude), expect=None)
    assert refused.returncode == 1 or refused.returncode == 64
    assert "data.rights.excluded_keys" in refused.stdout + refused.stderr
    told = run(*torchrun(2), *dit_command(folder, name, 6, few, exclude, "allow_config_change=true"))
    assert f"1 of its 6 clips are no longer read: key in data.rights.excluded_keys 1 ({key})" in told.stdout

    lines = ledger(runs / name, "--key", key)
    assert lines[-1].startswith(f"SEEN key {key}: by 3 of 3 checkpoint(s), first step-00000002, {row['shown']} times")
    whole = json.loads((runs / name / "ledger.json").read_text())
    (source,) = whole["sources"].values()
    # 6 steps of 4 over 6 clips show each 4 times, but for the withdrawn one.
    assert source["withdrawn"] == 4 - row["shown"]
    assert (source["decoded"], source["failed"]) == (20 + row["shown"], 0)
    assert whole["withdrawn"] == {"key in data.rights.excluded_keys": source["withdrawn"]}
    assert whole["left_out"] == {"beyond data.max_clips": 18}
    for entry in index.entries[1:6]:
        (other,) = json.loads(ledger(runs / name, "--key", entry.record.key, "--json")[0])["rows"][-1:]
        assert other["shown"] == 4


def test_a_run_that_starts_from_weights_has_seen_what_they_saw(folder):
    one = "data.max_clips=4"
    run(*dit_command(folder, "parent", 2, one))
    key = DatasetIndex.load(folder / "toy", "train").entries[0].record.key
    exclude = f"data.rights.excluded_keys=[{key}]"
    init = f"init_from={checkpoint(folder, 'parent', 2)}"
    answer = run(*dit_command(folder, "child", 2, "data.max_clips=8", exclude, init))
    assert "key in data.rights.excluded_keys 1" in answer.stdout  # left out of the plan, not of the steps
    assert json.loads((folder / "runs/child/ledger.json").read_text())["withdrawn"] == {}
    table = ledger(folder / "runs/child", "--key", key)
    assert "start " in table[1]
    assert table[-1].endswith("first step-00000002, 2 times by step-00000002")
    rights = json.loads((checkpoint(folder, "child", 2) / "manifest.json").read_text())["data"]["rights"]
    assert rights["excluded_keys"] == [key]


def test_a_data_set_that_changed_does_not_continue_a_run(folder, tmp_path):
    run("data_prep/toy.py", "--out", f"{tmp_path}/toy", "--clips", "20", "--heldout", "4", "--sizes", "64x64,64x48")
    run(*dit_command(folder, "moved", 2))
    other = [
        word.replace(f"data.path={folder}/toy", f"data.path={tmp_path}/toy") for word in dit_command(folder, "moved", 4)
    ]
    answer = run(*other, "allow_config_change=true", expect=None)
    assert answer.returncode != 0
    assert "data.path: the data set has changed since the checkpoint, from hash" in answer.stdout + answer.stderr
    assert not records(folder, "moved", "train").get(3)

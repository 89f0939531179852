import multiprocessing
import os
import re
import shutil
import signal
import time

import pytest
import torch

from kinema.data.account.ledger import DataBudgetError, Ledger, Quarantine
from kinema.data.dataset.shards import DatasetIndex
from kinema.data.packs import workers
from kinema.data.packs.decoded_clips import DecodedClips
from kinema.data.packs.loading import make_loader
from kinema.data.packs.workers import DataWorkerError
from tests.end_to_end.killing import killed
from tests.unit.clips import SHAPES, build, make_plan

CLIPS = 40
DAMAGED = {7, 23}  # 5 %


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return build(tmp_path_factory.mktemp("data") / "sound", CLIPS)


def packs_of(index, steps=10, **options):
    loader = make_loader(index, make_plan(index, shapes=SHAPES[:1]), [0, 1], 0, steps, fps=8, seed=0, **options)
    return [pack for row in loader for pack in row]


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_clips_are_counted_and_nothing_else_moves(sound, tmp_path, workers):
    index = build(tmp_path / "set", CLIPS, damaged=DAMAGED)
    ledger, packs = Ledger(), packs_of(index, num_workers=workers)
    for pack, clean in zip(packs, packs_of(sound), strict=True):
        ledger.record(pack, index)
        assert (pack.keys, pack.positions, pack.shapes) == (clean.keys, clean.positions, clean.shapes)
        for i, key in enumerate(pack.keys):
            bad = int(key[-3:]) in DAMAGED
            assert pack.weights[i] == (0.0 if bad else 1.0)
            assert torch.equal(pack.frames[i], torch.zeros_like(clean.frames[i]) if bad else clean.frames[i])
    keys = [key for pack in packs for key in pack.keys]
    assert len(set(keys)) == len(keys) == CLIPS
    assert ledger.total.failed / ledger.total.clips == 0.05
    assert {failure.key for pack in packs for failure in pack.failures} == {"clip-007", "clip-023"}
    Quarantine(0.05, 0).check(ledger)
    with pytest.raises(DataBudgetError, match=r"2 of 40 clips \(5.0%\) .*data\.max_failed_fraction=0.04.*decord"):
        Quarantine(0.04, 0).check(ledger)


def test_flipped_bits_in_a_shard_never_reach_the_decoder(sound, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(sound.folder, folder)
    entry = DatasetIndex.load(folder).entries[9]
    member = entry.members["mp4"]
    with open(folder / entry.shard, "r+b") as shard:
        shard.seek(member.offset + member.size // 2)
        byte = shard.read(1)[0]
        shard.seek(-1, 1)
        shard.write(bytes([byte ^ 16]))
    failures = [failure for pack in packs_of(DatasetIndex.load(folder)) for failure in pack.failures]
    assert [(failure.key, failure.shard) for failure in failures] == [("clip-009", entry.shard)]
    assert "checksum" in failures[0].reason


def test_a_shard_that_vanishes_costs_its_own_clips_only(sound, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(sound.folder, folder)
    index = DatasetIndex.load(folder)
    (folder / "clips-000003.tar").unlink()
    failed = [failure.key for pack in packs_of(index) for failure in pack.failures]
    assert sorted(failed) == [f"clip-{number:03d}" for number in range(12, 16)]


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_shard_cut_short_or_missing_is_named_before_the_first_step(sound, tmp_path, harm):
    folder = tmp_path / "set"
    shutil.copytree(sound.folder, folder)
    shard = folder / "clips-000002.tar"
    size = shard.stat().st_size
    shard.unlink() if harm == "gone" else os.truncate(shard, size - 1)
    with pytest.raises(ValueError, match=rf"clips-000002\.tar.*{size}"):
        DatasetIndex.load(folder)


def harmed(monkeypatch, number, harm):
    """Decoding this clip in a worker does harm to the worker."""
    read, parent = DecodedClips.read, os.getpid()

    def read_or_harm(contents, clip):
        if clip.slot.clip.entry_index == number and os.getpid() != parent:
            harm()
        return read(contents, clip)

    monkeypatch.setattr(DecodedClips, "read", read_or_harm)
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.2)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), r"killed the process \(exit code -11\)"),
        (lambda: os._exit(3), r"killed the process \(exit code 3\)"),
        (lambda: time.sleep(60), "takes over data.timeout_seconds=3"),
    ],
    ids=["crash", "exit", "hang"],
)
def test_a_clip_that_kills_or_hangs_its_worker_is_quarantined(sound, monkeypatch, harm, reason):
    expected = packs_of(sound)
    harmed(monkeypatch, 13, harm)
    actual = packs_of(sound, num_workers=2, timeout_seconds=3.0)
    failures = [failure for pack in actual for failure in pack.failures]
    assert [failure.key for failure in failures] == ["clip-013"]
    assert re.search(reason, failures[0].reason)
    for one, other in zip(expected, actual, strict=True):
        assert (one.keys, one.positions) == (other.keys, other.positions)
        for key, mine, theirs in zip(one.keys, one.frames, other.frames, strict=True):
            assert key == "clip-013" or torch.equal(mine, theirs)


def test_workers_stopped_by_the_scheduler_accuse_no_clip(sound, monkeypatch):
    once = multiprocessing.Value("i", 0)

    def stop_once():
        with once.get_lock():
            once.value += 1
        if once.value == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    harmed(monkeypatch, 13, stop_once)
    packs = packs_of(sound, num_workers=1)
    assert once.value >= 2
    assert not any(pack.failures for pack in packs)


@pytest.mark.parametrize(("times", "condemned"), [(1, []), (9, ["clip-013"])])
def test_a_clip_is_tried_once_more_when_somebody_else_killed_its_worker(sound, monkeypatch, times, condemned):
    left = multiprocessing.Value("i", times)
    harmed(monkeypatch, 13, killed(left))
    failures = [failure.key for pack in packs_of(sound, num_workers=1) for failure in pack.failures]
    assert failures == condemned
    assert left.value == (7 if condemned else -1)


def test_full_shared_memory_is_named(sound, monkeypatch):
    harmed(monkeypatch, 13, lambda: os.kill(os.getpid(), signal.SIGBUS))
    with pytest.raises(DataWorkerError, match=r"/dev/shm.*data\.prefetch"):
        packs_of(sound, num_workers=1)


def test_a_bug_in_reading_is_raised_and_not_counted(sound, monkeypatch):
    def broken(contents, clip):
        raise KeyError("a bug")

    monkeypatch.setattr(DecodedClips, "read", broken)
    for number in (0, 1):
        with pytest.raises(KeyError, match="a bug"):
            packs_of(sound, num_workers=number)

"""Shards and clips that go bad: named, counted, and too many of them stop the run."""

import os
import re
from pathlib import Path

import pytest

from kinema.data.dataset.shards import DatasetIndex, ShardWriter, read_member
from tests.faults.suite.harm import Harm
from tests.faults.suite.scene import Scene, Shown, said

pytestmark = pytest.mark.faults

READ, DECODE = "kinema.data.packs.decoded_clips:DecodedClips.read", "kinema.data.decode.clip_decoder:_decode_into"
SLOW = Harm("kinema.distributed.engine:Engine.step", "slow", times=1000)
ANY = "data.max_failed_fraction=0.9"


def copy_of_data(scene: Scene, name: str) -> Path:
    """The same clips in shards of four, so that one bad shard leaves others."""
    toy, folder = scene.folder / "toy", scene.folder / f"data-{name}"
    with ShardWriter(folder, max_samples=4) as writer:
        for entry in DatasetIndex.load(toy).entries:
            writer.write(entry.record, read_member(toy, entry, "mp4"))
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def flip(shard: Path, every: int) -> None:
    content = bytearray(shard.read_bytes())
    for place in range(3000, len(content), every):
        content[place] ^= 0xFF
    shard.write_bytes(content)


@pytest.mark.parametrize(("number", "fault", "deed", "status"), [
    ("C1", "a shard was cut before the start", lambda shard: os.truncate(shard, shard.stat().st_size // 2), 64),
    ("C5", "a shard is missing at the start", lambda shard: shard.unlink(), 64),
    ("C4", "a shard is a web page", lambda shard: shard.write_text("<html>404</html>"), 64),
    ("C22", "every clip of a shard is damaged", lambda shard: flip(shard, 700), 65),
])  # fmt: skip
def test_bad_shards_stop_a_run_before_they_teach_it_anything(scene, show, number, fault, deed, status):
    name = f"shard-{number}"
    data = copy_of_data(scene, name)
    deed(shards(data)[0])
    job = scene.finish(scene.start(name, f"data.path={data}", "data.min_failed_clips=0"), status)
    show(number, fault, Shown(said(job, "error"), str(status)))


@pytest.mark.parametrize(("number", "fault", "deed"), [
    ("C1", "shards are cut while they are read", lambda shard: os.truncate(shard, shard.stat().st_size // 2)),
    ("C5", "shards vanish while they are read", lambda shard: shard.unlink()),
    ("C3", "bits of shards flip while they are read", lambda shard: flip(shard, 5000)),
])  # fmt: skip
def test_a_shard_that_goes_bad_costs_its_own_clips_and_each_is_named(scene, show, number, fault, deed):
    name = f"bad-{number}"
    data = copy_of_data(scene, name)
    job = scene.start(name, f"data.path={data}", ANY, "data.num_workers=0", harm=SLOW)
    scene.wait_for_step(job, name, 1)
    for shard in shards(data)[:2]:  # of every step some clips are left
        deed(shard)
    scene.finish(job)
    named = (scene.run(name) / "quarantine.jsonl").read_text().count("\n")
    assert named == len(re.findall("quarantine", job.output)) > 0
    show(number, f"{fault} ({named} clips)", Shown(said(job, "quarantine"), "-", None, 0))


@pytest.mark.parametrize(("number", "fault", "where", "deed"), [
    ("C14", "a data worker crashes", READ, "segfault"),
    ("C14", "a decoder crashes in its own process", DECODE, "segfault"),
    ("C15", "a data worker hangs for ever", READ, "sleep"),
    ("C15", "a decoder hangs for ever", DECODE, "sleep"),
])  # fmt: skip
def test_a_clip_that_kills_its_decoder_is_named_and_the_run_goes_on(scene, show, number, fault, where, deed):
    name = f"decoder-{deed}-{where == READ}"
    limits = [
        "data.decode_timeout_seconds=1",
        "data.timeout_seconds=3",
        "data.min_failed_clips=100",
        "data.num_workers=2",
    ]
    job = scene.finish(scene.start(name, *limits, ANY, harm=Harm(where, deed, 6)))
    assert "quarantine" in job.output
    show(number, fault, Shown(said(job, "quarantine"), "-", None, 0))


def test_fewer_clips_than_lanes_are_refused_at_the_start(scene, show):
    job = scene.finish(scene.start("few", "data.lanes=8", "data.clips_per_step=4"), 64)
    show("C20", "fewer clips than a step needs", Shown(said(job, "error"), "64"))


def test_the_number_of_workers_changes_nothing(scene, show):
    for workers in (0, 2, 3):
        name = f"workers-{workers}"
        scene.finish(scene.start(name, f"data.num_workers={workers}", "allow_config_change=true"))
        scene.check_as_undisturbed(name)
    show("C23", "another number of data workers: 0, 2, 3", Shown("the same weights bit for bit", "-", None, 0))

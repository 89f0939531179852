"""Footage to shards with the real stages and the real command: equal bytes whatever was killed, and wherever it ran."""

import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep.pipeline.cluster import RayEngine
from data_prep.pipeline.engines import LocalEngine
from data_prep.pipeline.inputs import input_rows, write_inputs
from data_prep.pipeline.rows import read_rows, write_rows
from data_prep.pipeline.run import DROPPED, FAILED, INPUT, ROWS, Limits, Pipeline
from data_prep.stages.cut import Cut
from data_prep.stages.ingest import Ingest
from data_prep.stages.probe import Probe
from data_prep.stages.split import HeldOut, Split
from data_prep.stages.write import Write
from kinema.data.dataset.shards import DatasetIndex
from kinema.data.decode.encoding import write_video
from kinema.data.verbs.check import check_dataset
from tests.unit.made_stages import Where

ROOT = Path(__file__).parents[2]
NUM_VIDEOS = 4


def scene(seed, frames, size=(48, 64)):
    """A textured background with a bright square that moves."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 120, (size[0] // 8, size[1] // 8, 3)).repeat(8, 0).repeat(8, 1) + 20 * (seed % 5)
    pictures = np.repeat(blocks[None].astype(np.uint8), frames, 0)
    for number, picture in enumerate(pictures):
        picture[8:16, number : number + 8] = 250
    return pictures


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    """Videos of two shots each, with captions beside them."""
    folder = tmp_path_factory.mktemp("footage")
    for number in range(NUM_VIDEOS):
        frames = np.concatenate([scene(2 * number, 12 + number), scene(2 * number + 1, 14)])
        write_video(folder / f"v{number}.mp4", frames, 10)
        (folder / f"v{number}.txt").write_text(f"caption {number}")
    return folder


def stages(out, **changes):
    return {
        "ingest": Ingest(license="CC0-1.0"),
        "probe": Probe(),
        "split": Split(heldout=HeldOut(every=2)),
        "cut": Cut(),
        "write": Write(str(out)),
    } | changes


def run(footage, out, engine=None, **changes):
    made = stages(out, **changes)
    pipeline = Pipeline(made, out.with_suffix(".work"), engine or LocalEngine(0), Limits())
    write_inputs(pipeline.work, input_rows([str(footage)]))
    return pipeline.run(made, show=False)


def command(footage, out, *more):
    """The command line that a person types."""
    given = [f"input={footage}", f"out={out}", "ingest.license=CC0-1.0", "split.heldout.every=2", *more]
    return [sys.executable, str(ROOT / "data_prep/prepare.py"), *given]


def content(folder):
    """The bytes of every file of a data set; of the manifest all but the command line."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".png"}
    lines = found["dataset.json"].splitlines()
    return found | {"dataset.json": [line for line in lines if b'"command"' not in line]}


@pytest.fixture(scope="module")
def reference(footage, tmp_path_factory):
    """The data set made in this process without interruption."""
    out = tmp_path_factory.mktemp("reference") / "mine"
    run(footage, out)
    return out


def test_footage_becomes_a_data_set_that_is_what_its_records_say(footage, reference):
    index = DatasetIndex.load(reference)
    records = {entry.record.key: entry.record for entry in index.entries}
    assert sorted(records) == [f"v{number}-{shot:04d}" for number in range(NUM_VIDEOS) for shot in (0, 1)]
    assert {key: record.split for key, record in records.items()}["v1-0000"] == "heldout"
    record = records["v2-0000"]
    assert (record.num_frames, record.fps, record.width, record.height) == (14, 10, 64, 48)
    assert (record.caption, record.license, record.source) == ("caption 2", "CC0-1.0", footage.name)
    result = check_dataset(reference)
    assert result.ready, result.verdict()


def test_running_again_changes_nothing(footage, reference):
    before = {path: path.stat().st_mtime_ns for path in reference.iterdir()}
    reports = run(footage, reference)
    assert [report.kept for report in reports] == [NUM_VIDEOS, NUM_VIDEOS, 8, 8, 8]
    assert {path: path.stat().st_mtime_ns for path in reference.iterdir()} == before


def kill_when(footage, out, wait_until):
    """Whether the command was killed before it was done."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(footage, out, "engine.workers=1"), **quiet)
    while process.poll() is None and not wait_until():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def test_a_killed_run_goes_on_and_gives_equal_bytes(footage, reference, tmp_path):
    out = tmp_path / "mine"
    assert kill_when(footage, out, lambda: list(tmp_path.glob("mine.work/04-cut/files/*/*.mp4")))
    assert not out.exists()
    run(footage, out, LocalEngine(2))
    assert content(out) == content(reference)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_twenty_random_kills_change_nothing(footage, reference, tmp_path):
    generator, killed = random.Random(0), 0
    for number in range(20):
        out = tmp_path / str(number) / "mine"
        until = time.monotonic() + generator.uniform(3, 12)
        killed += kill_when(footage, out, lambda until=until: time.monotonic() > until)
        run(footage, out, LocalEngine(2))
        assert content(out) == content(reference), number
    assert killed >= 10


def damaged(video: bytes, generator: random.Random) -> bytes:
    """A video as broken disks, interrupted copies and careless renaming leave it."""
    place = generator.randrange(len(video))
    match generator.randrange(5):
        case 0:
            return video[:place]
        case 1:
            return video[:place] + generator.randbytes(64) + video[place + 64 :]
        case 2:
            flipped = bytearray(video)
            for _ in range(20):
                flipped[generator.randrange(len(video))] ^= 1 << generator.randrange(8)
            return bytes(flipped)
        case 3:
            return generator.choice([b"", b"<html>404</html>", video[place:], bytes(len(video))])
        case _:
            return video


def account_for_damage(footage, tmp_path, count, engine):
    generator, folder = random.Random(0), tmp_path / "damaged"
    folder.mkdir()
    videos = [path.read_bytes() for path in sorted(footage.glob("*.mp4"))]
    for number in range(count):
        (folder / f"{number:05d}.mp4").write_bytes(damaged(generator.choice(videos), generator))
        (folder / f"{number:05d}.txt").write_text("whatever is left of it")
    made = stages(tmp_path / "mine")
    pipeline = Pipeline(made, tmp_path / "work", engine, Limits(max_failed_fraction=1.0))
    write_inputs(pipeline.work, input_rows([str(folder)]))
    ingest, probe, split, cut, write = pipeline.run(made, show=False)
    assert ingest.kept == count
    assert probe.kept + sum(probe.failed.values()) == count
    in_shots = {row["video"] for row in read_rows(pipeline.place("split").folder / ROWS)}
    out_of_shots = {row["video"] for name in (DROPPED, FAILED) for row in read_rows(tmp_path / "work/03-split" / name)}
    assert len(in_shots | out_of_shots) == probe.kept
    assert cut.kept + sum(cut.failed.values()) + sum(cut.dropped.values()) == split.kept
    assert write.kept == cut.kept
    clips = check_dataset(tmp_path / "mine")
    assert clips.ready, clips.verdict()
    return probe, split, cut


def test_damaged_videos_are_counted_one_by_one(footage, tmp_path):
    probe, _, cut = account_for_damage(footage, tmp_path, 30, LocalEngine(0))
    assert sum(probe.failed.values()) >= 8
    assert cut.kept >= 6  # the probe refuses what is cut short


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_thousand_damaged_videos_are_counted_one_by_one(footage, tmp_path):
    reports = account_for_damage(footage, tmp_path, 2000, LocalEngine(2))
    print(*(report.line() for report in reports), sep="\n")


@pytest.fixture
def cluster():
    """A Ray cluster of two nodes, each with its own processes, on this machine."""
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster()
    cluster.add_node(**small)
    cluster.add_node(**small)
    yield cluster
    cluster.shutdown()


@pytest.mark.distributed
def test_a_ray_cluster_of_two_nodes_gives_equal_bytes(footage, reference, tmp_path, cluster):
    out = tmp_path / "mine"
    run(footage, out, RayEngine(address=cluster.address), where=Where())
    assert content(out) == content(reference)
    rows = list(read_rows(tmp_path / "mine.work" / "06-where" / "rows.jsonl"))
    assert len({row["raylet"] for row in rows}) == 2


@pytest.mark.soak
@pytest.mark.distributed
def test_rows_of_a_node_that_is_killed_go_to_the_other(tmp_path, cluster):
    work = tmp_path / "work"
    work.mkdir()
    given = [{"key": f"row-{n}"} for n in range(30)]
    write_rows(work / INPUT, given)
    nodes = cluster.list_all_nodes()

    def kill_when_both_work():
        while len(list(work.rglob("raylet-*"))) < 2:
            time.sleep(0.1)
        time.sleep(3)
        cluster.remove_node(nodes[-1], allow_graceful=False)

    killer = threading.Thread(target=kill_when_both_work)
    killer.start()
    pipeline = Pipeline({"where": Where(seconds=1.0)}, work, RayEngine(address=cluster.address), Limits())
    pipeline.run(["where"], show=False)
    killer.join()
    rows = list(read_rows(work / "01-where" / ROWS))
    assert [row["key"] for row in rows] == [row["key"] for row in given]
    assert len({row["raylet"] for row in rows}) == 2

"""Saving on several ranks: training meanwhile changes nothing, any layout reads it, a failure is everybody's."""

import json
import re
import resource
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from kinema.distributed.mesh import Mesh
from kinema.distributed.process import Process
from kinema.training.checkpoints.saving import Saver
from kinema.training.checkpoints.store import Checkpoint, CheckpointConfig, CheckpointError, CheckpointStore, verify
from kinema.training.ema import EMA, EMAConfig
from kinema.training.records.journal import KeyJournal
from kinema.training.records.outputs import Outputs
from kinema.training.records.progress import Progress
from tests.distributed.test_engine import LANES, build, mine, run_steps
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed
MANIFEST = {"data": {"hash": "0"}, "task": "dit"}


def make_saver(run: Path, engine, step: int = 0) -> Saver:
    """A saver of nothing but an engine and its average, as the loop has it after `step`."""
    task = SimpleNamespace(engines=lambda: {"model": engine}, beside=lambda gather: {"frozen": torch.arange(5.0)})
    plan = SimpleNamespace(state=lambda step: {"cursor": step})
    progress = Progress(SimpleNamespace(entries=[], parts=[]))
    progress.step = step
    process = Process(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"), Mesh())
    store = CheckpointStore(run, keep=9)
    return Saver(
        process=process, task=task, plan=plan, ema=EMA(EMAConfig(decay=0.9), engine), store=store,
        config=CheckpointConfig(max_failed_saves=3), outputs=Outputs(run, process.is_main, None), manifest=MANIFEST,
        config_yaml="", progress=progress,
    )  # fmt: skip


def everything(saver: Saver) -> dict[str, torch.Tensor]:
    engine = saver.task.engines()["model"]
    found = {f"model/{key}": value for key, value in engine.gather()}
    found |= {f"ema/{key}": value for key, value in saver.ema.full().items()}
    for name in engine.state_names:
        found |= {f"optimizer/model/{name}/{key}": value for key, value in engine.gather_state(name)}
    return found


def stored(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    names = ("model", "ema", "optimizer")
    found = {f"{name}/{key}": value for name in names for key, value in checkpoint.tensors(name).items()}
    return {key: value for key, value in found.items() if not key.endswith("frozen")}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def train_while_saving(folder: Path, stage: int) -> None:
    """A save begun before a step, and published after it, holds the state before it; the next save waits for none."""
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = build(stage, LANES // world)
    saver = make_saver(folder / f"stage{stage}", engine, 2)
    saver.plan = SimpleNamespace(state=lambda step: time.sleep(0.1) or {"cursor": step})  # is waited for, and counts
    run_steps(engine, mine(rank, world), 0, 2, saver.ema)
    before = everything(saver)
    saver._thread.submit(time.sleep, 0.3)  # the copy begins late: what is about to move must wait for it
    saver.save(must=False)
    assert saver.store.steps() == []
    run_steps(engine, mine(rank, world), 2, 3, saver.ema)
    after = everything(saver)
    saver.settle(must=False)
    assert equal(stored(saver.store.open(2)), before)
    saver.progress.step = 3
    saver.save(must=True)
    assert equal(stored(saver.store.open(3)), after)
    assert not equal(before, after)
    assert torch.equal(saver.store.open(3).tensors("ema")["frozen"], torch.arange(5.0))
    own = saver.store.open(3).files("optimizer")[rank]
    assert own.stat().st_size < 1.2 * sum(8 * v.numel() for v in engine.parameters().values()) / world + 2000
    dist.barrier()


def read_on_another_layout(folder: Path, stage: int, written: int) -> None:
    engine = build(stage, LANES // dist.get_world_size())
    saver = make_saver(folder / f"stage{written}", engine)
    saver.resume(9, KeyJournal(folder, 0))
    assert saver.progress.step == 3
    assert engine.optimizer_step() == 3
    found, expected = everything(saver), stored(saver.store.open(3))
    for key in found:
        assert key.startswith("model/") or torch.equal(found[key], expected[key]), (stage, written, key)


def a_rank_cannot_write(folder: Path) -> None:
    """Of two ranks one meets the limit that the kernel sets: nothing is published, the third failure ends the run."""
    saver = make_saver(folder / "full", build(1, LANES // dist.get_world_size()), 1)
    saver.save(must=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    for step in (2, 3):
        saver.progress.step = step
        saver.save(must=False)
        saver.settle(must=False)
    saver.progress.step = 4
    saver.save(must=False)
    with pytest.raises(CheckpointError, match=r"step 4 could not be written.*File too large.*intact: \[1\]"):
        saver.settle(must=False)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    assert sorted(path.name for path in (folder / "full/checkpoints").iterdir()) == ["latest", "step-00000001"]
    assert verify(folder / "full/checkpoints/step-00000001") is None
    dist.barrier()  # both have looked
    saver.save(must=True)  # the same step again, now that there is room
    assert saver.store.steps() == [1, 4]


def numbers_that_are_not_finite(folder: Path) -> None:
    saver = make_saver(folder / "nan", build(1, LANES // dist.get_world_size()), 1)
    if dist.get_rank() == 1:
        saver.ema.shards[0].view(-1)[0] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        saver.save(must=True)
    assert saver.store.steps() == []


def on_two_ranks(folder: Path) -> None:
    for stage in (0, 1, 2, 3):
        train_while_saving(folder, stage)
    for stage, written in ((0, 3), (3, 2), (1, 0), (2, 1)):
        read_on_another_layout(folder, stage, written)
    a_rank_cannot_write(folder)
    numbers_that_are_not_finite(folder)


def on_one_rank(folder: Path) -> None:
    for stage, written in ((0, 1), (3, 3), (1, 2)):
        read_on_another_layout(folder, stage, written)


def test_saves_on_two_ranks_while_training_goes_on_and_any_layout_reads_them(tmp_path):
    run_ranks(on_two_ranks, 2, tmp_path)
    run_ranks(on_one_rank, 1, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "stage1/metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if line["kind"] == "checkpoint"]
    assert [line["step"] for line in told] == [2, 3]
    assert all(0 <= line["waited_seconds"] <= line["stall_seconds"] <= line["seconds"] for line in told)
    assert told[0]["stall_seconds"] > 0.1
    events = [line["detail"] for line in lines if line["kind"] == "event" and line["event"] == "checkpoint"]
    assert re.fullmatch(r"published, \d+\.\d MiB in \d+\.\d\d s, of which training waited 0\.\d\d s", events[0])
    failed = [json.loads(line) for line in (tmp_path / "full/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in failed if line.get("event") == "checkpoint failed"] == [2, 3, 4]

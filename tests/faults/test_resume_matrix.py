"""Killed at any point, most of all inside a save, a run goes on as if nothing had been; on other layouts, to rounding.

Every start is real ranks of `train.py`. A start goes on from what the kill before it left, and is killed itself.
"""

import json
import shutil
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from kinema.training.checkpoints.mirror import Mirror, run_address
from kinema.training.checkpoints.store import CheckpointStore
from tests.end_to_end.commands import dit_command, losses
from tests.faults.suite.harm import Harm
from tests.faults.suite.scene import same_state
from tests.warm import Warm

pytestmark = pytest.mark.slow
EVERY = 2
SYNCS = {0: 12, 1: 4}
"""Flushes to the disk that a save costs the main rank, and another: 3 files and the folder; on the main rank also
4 documents, the seal, its folder, the folder above, and `latest`."""
MIDDLE = [Harm("zlib_ng.zlib_ng:crc32_combine", "kill", 30, rank=rank, after=4) for rank in (0, 1)]
"""Between two tensors of a file that is half written."""
SAVE = [  # the nth call within the second save of a start, from its first file to `latest`
    *MIDDLE,
    *(
        Harm("os:fsync", "kill", SYNCS[rank] + n, rank=rank, after=2)
        for rank in SYNCS
        for n in range(1, SYNCS[rank] + 1)
    ),
    *(
        Harm("kinema.training.checkpoints.save:write_pieces", "kill", 3 + n, rank=rank)
        for rank in SYNCS
        for n in (1, 2, 3)
    ),
    *(Harm("kinema.training.checkpoints.save:write_synced", "kill", 4 + n) for n in (1, 2, 3, 4)),
    Harm("kinema.training.checkpoints.saving:write_part", "kill", 2, rank=1),
    Harm("kinema.training.checkpoints.store:CheckpointStore.seal", "kill", 2),
    Harm("kinema.training.checkpoints.store:CheckpointStore.announce", "kill", 2),
    Harm("os:rename", "kill", 2, after=2),
    Harm("os:replace", "kill", 2, after=2),
]
STEP = [
    Harm("kinema.training.checkpoints.snapshot:HostMemory.copy", "kill", 2, rank=1),
    Harm("kinema.training.checkpoints.saving:Saver.advance", "kill", 3),
    Harm("kinema.training.checkpoints.saving:Saver.advance", "kill", 4, rank=1),
    Harm("kinema.distributed.engine:Engine.backward", "kill", 4, rank=1),
    Harm("kinema.distributed.engine:Engine.step", "kill", 4),
    Harm("kinema.training.ema:EMA.update", "kill", 4),
]


class Matrix:
    """Runs by name, and the process that starts them."""

    def __init__(self, warm: Warm, folder: Path) -> None:
        self.warm, self.folder = warm, folder

    def run(self, command: list[str], ranks: int = 1, harm: Harm | None = None, **variables: Any) -> list[int]:
        """Start a command and wait for it; 0 for all ranks, unless it comes to harm."""
        if harm:
            variables["KINEMA_TEST_HARM"] = json.dumps(asdict(harm))
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        job = self.warm.start(command, log, ranks, **variables)
        statuses = job.wait(240)
        assert harm or not any(statuses), job.output[-4000:]
        return statuses

    def train(self, name: str, steps: int, *extra: str, ranks: int = 2, harm: Harm | None = None) -> list[int]:
        """Train a run to `steps`; every checkpoint stays."""
        usual = ["checkpoint.keep=999", "validation.every_steps=0", "logging.wandb=disabled", "data.num_workers=0"]
        return self.run(dit_command(self.folder, name, steps, *usual, *extra), ranks, harm)

    def store(self, name: str) -> CheckpointStore:
        return CheckpointStore(self.folder / "runs" / name)

    def whole(self, stage: int, steps: int) -> str:
        """The name of a run on two ranks that nobody disturbs."""
        name = f"whole-at-{stage}-{steps}"
        if not self.store(name).steps():
            self.train(name, steps, f"parallel.zero_stage={stage}")
        return name

    def killed_and_resumed(self, stage: int, harms: list[Harm]) -> int:
        """A run that dies once by each harm ends as the one that nobody disturbed, bit for bit; returns the deaths."""
        steps, option = 2 * EVERY * (len(harms) + 1), f"parallel.zero_stage={stage}"
        whole, name = self.whole(stage, steps), f"killed-{stage}-{steps}"
        for harm in harms:
            statuses = self.train(name, steps, option, harm=harm)
            assert statuses[harm.rank] == -signal.SIGKILL, (harm, statuses)
            self._check_newest(name, whole, harm)
        self.train(name, steps, option)
        assert losses(self.folder, name) == losses(self.folder, whole)
        self._check_newest(name, whole, None)
        assert self.store(name).newest().step == steps
        assert not list(self.store(name).folder.glob(".writing*"))
        return len(harms)

    def _check_newest(self, name: str, whole: str, harm: Harm | None) -> None:
        found = self.store(name).newest()
        if found is not None:
            expected = self.store(whole).open(found.step)
            assert same_state(found, expected), (harm, found.step)
            training = [one.document("training") for one in (found, expected)]
            assert training[0]["plan"] == training[1]["plan"]
            assert training[0]["ledger"] == training[1]["ledger"]


@pytest.fixture(scope="module", name="matrix")
def make_matrix(scene):
    return Matrix(scene.warm, scene.folder)


LAYOUTS = [
    (2, 1, []),
    (4, 2, ["parallel.zero_stage=1"]),
    (6, 4, ["parallel.zero_stage=3"]),
    (8, 2, ["parallel.zero_stage=2"]),
    (10, 2, ["parallel.zero_stage=2", "parallel.sequence_degree=2"]),
    (12, 2, ["parallel.zero_stage=3", "parallel.offload.optimizer=cpu", "parallel.offload.parameters=cpu"]),
    (14, 1, ["parallel.zero_stage=1"]),
]
"""Up to which step, on how many ranks, how."""


def across_layouts(matrix: Matrix, layouts: list, name: str) -> float:
    """Largest relative difference of a loss to those of one rank that trained alone."""
    allow = ["allow_config_change=true", "data.lanes=4"]
    matrix.train(f"{name}-alone", layouts[-1][0], *allow, ranks=1)
    for steps, ranks, options in layouts:
        matrix.train(name, steps, *allow, *options, ranks=ranks)
    ours, theirs = losses(matrix.folder, name), losses(matrix.folder, f"{name}-alone")
    assert ours.keys() == theirs.keys() == set(range(1, layouts[-1][0] + 1))
    return max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in theirs)


def test_kills_inside_a_save_of_two_ranks_change_nothing(matrix):
    harms = [harm for harm in SAVE if harm == MIDDLE[1] or harm.where == "os:rename"]
    assert matrix.killed_and_resumed(1, harms) == 2


def test_a_run_whose_disk_is_lost_goes_on_from_an_address(matrix, tmp_path):
    options = ["parallel.zero_stage=1", f"checkpoint.remote=file://{tmp_path}/far", "allow_config_change=true"]
    matrix.train("far", 4, *options)
    shutil.rmtree(matrix.folder / "runs/far")
    matrix.train("far", 12, *options)
    assert "resume: step-00000004 was fetched from file://" in (matrix.folder / "log").read_text()
    assert same_state(matrix.store("far").open(12), matrix.store(matrix.whole(1, 12)).open(12))
    here = tmp_path / "here"
    Mirror(run_address(f"file://{tmp_path}/far/far", "path"), here).fetch_newest(print)
    said = ["prompt=a red circle", "num_steps=1", "shape=[5,32,32]", f"out={tmp_path}/video"]
    matrix.run(["sample.py", f"run={here}", *said])  # what lies there is all that the sampler needs
    assert len(list((tmp_path / "video").glob("*.mp4"))) == 1


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_kills_at_every_point_of_a_save(matrix, stage):
    deaths = matrix.killed_and_resumed(stage, [*SAVE, *STEP])
    assert deaths >= 30
    print(f"ZeRO {stage}, 2 ranks: {deaths} kills ({len(SAVE)} inside a save), every one continued bit for bit")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ranks_stages_sequence_degree_and_offload_may_change_at_every_start(matrix):
    worst = across_layouts(matrix, LAYOUTS, "changing")
    assert worst < 1e-5
    print(f"{len(LAYOUTS)} layouts one after the other, {LAYOUTS[-1][0]} steps: losses differ by {worst:.1e} at most")

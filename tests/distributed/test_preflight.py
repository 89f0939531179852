"""The checks of the first steps: a sound job of two ranks passes, and each fails by name when its subject is broken."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kinema.data.geometry import ClipShape
from kinema.data.packs.pack import Pack
from kinema.distributed.engine import Engine, Precision
from kinema.distributed.mesh import Mesh
from kinema.training.ema import EMA, EMAConfig
from kinema.training.preflight import Preflight, PreflightConfig, PreflightFailed
from kinema.training.task import marks_of_noise
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed
CLIPS = 2
FAULTS = {
    "none": None,
    "none under ZeRO 2": None,
    "none under ZeRO 3": None,
    "none in a sequence group": None,
    "same clips on both ranks": "clips: 1 lane(s) come to more than one lane, such as 0.",
    "a clip twice": "clips: 1 clip(s) come to more than one lane",
    "ranks at different steps": "clips: ranks stand at different steps: [0, 1].",
    "other clips in a sequence group": "clips: rank 1 works with others of data rank 0 on different packs.",
    "noise by lane alone": "noise: clips 0 and 2 of the batch got the same noise.",
    "other noise in a sequence group": "noise: rank 1 drew other noise",
    "other weights on rank 1": "loss: clip",
    "weights of rank 1 pushed": "replicas: after the update 1 of 2 weights of model differ between rank 0 and rank 1",
    "average of rank 1 broken": "finite: ema of rank 1 hold inf or nan",
    "average forgotten": "ema: nothing moved in the first steps.",
    "learning rate 0": "weights: nothing moved in the first steps.",
}


class Line:
    """A task as small as one can be: the loss of a clip is the square of a line at its noise."""

    def __init__(self, engine: Engine, fault: str) -> None:
        self.engine, self.fault = engine, fault
        self.clip_losses, self.noise_marks = {}, {}

    def engines(self):
        return {"model": self.engine}

    def losses(self, pack: Pack):
        keys = [position % CLIPS if self.fault == "noise by lane alone" else position for position in pack.positions]
        if self.fault == "other noise in a sequence group":
            keys = [key + 10 * dist.get_rank() for key in keys]
        noise = [torch.randn(4, generator=torch.Generator().manual_seed(key)) for key in keys]
        self.noise_marks = marks_of_noise(pack.positions, noise)
        return self.engine(torch.stack(noise)).square().mean(1)

    def micro_step(self, pack: Pack, rate: float) -> None:
        losses = self.losses(pack)
        self.clip_losses = dict(zip(pack.positions, losses.tolist(), strict=True))
        self.engine.backward(losses.sum() / 4)
        self.engine.step(rate)

    @torch.no_grad()
    def recompute(self, pack: Pack):
        return dict(zip(pack.positions, self.losses(pack).tolist(), strict=True))


def pack_of(step: int, lane: int, fault: str) -> Pack:
    if fault == "same clips on both ranks" or "sequence group" in fault:
        lane = 0
    if fault == "other clips in a sequence group":
        lane = dist.get_rank()
    positions = [lane * CLIPS + i for i in range(CLIPS)]
    entries = [7, 8] if lane == 0 else [8, 9] if fault == "a clip twice" else [10, 11]
    step += dist.get_rank() if fault == "ranks at different steps" else 0
    return Pack(
        step, lane, [str(entry) for entry in entries], ["", ""], [ClipShape(1, 1, 1)] * CLIPS, None, None,
        torch.ones(CLIPS), 1.0, positions, [0, 0], [], 8.0, 0.0, entries,
    )  # fmt: skip


def two_steps(fault: str, config: PreflightConfig) -> None:
    """As the loop takes them."""
    rank = dist.get_rank()
    torch.manual_seed(rank if fault == "other weights on rank 1" else 0)
    module = nn.Linear(4, 3)
    stage = int(fault[-1]) if "ZeRO" in fault else 0
    # The engine gives every rank the weights of the first: they are broken after it is built.
    engine = Engine(module, torch.optim.AdamW(module.parameters(), lr=1e-2), zero_stage=stage,
                    precision=Precision.float32, accumulation=1, gradient_clipping=1.0)  # fmt: skip
    if fault == "other weights on rank 1" and rank == 1:
        engine.shards()[0].add_(0.5)
    ema, task = EMA(EMAConfig(), engine), Line(engine, fault)
    mesh = Mesh(0, 1, rank, 2, dist.group.WORLD) if "sequence group" in fault else Mesh(rank, 2)
    preflight = Preflight(config, mesh, task, ema, print)
    for step in range(3):
        pack = pack_of(step, rank, fault)
        preflight.begin([pack])
        task.micro_step(pack, 0.0 if fault == "learning rate 0" else 1e-2)
        preflight.hear()
        if fault == "weights of rank 1 pushed" and rank == 1:
            engine.shards()[0].mul_(1.001)
        if fault != "average forgotten":
            ema.update(step + 1)
        if fault == "average of rank 1 broken" and rank == 1:
            ema.shards[0].view(-1)[0] = float("nan")
        preflight.end()


def what_is_said() -> dict[str, str | None]:
    said = {}
    for fault in FAULTS:
        try:
            two_steps(fault, PreflightConfig())
            said[fault] = None
        except PreflightFailed as failed:
            said[fault] = str(failed)
    two_steps("average of rank 1 broken", PreflightConfig(steps=0))  # unchecked
    return said


def test_every_fault_is_named_on_both_ranks_and_a_sound_job_passes():
    first, second = run_ranks(what_is_said, 2)
    assert first == second
    for fault, expected in FAULTS.items():
        assert (first[fault] or "").startswith(expected or ""), f"{fault}: {first[fault]}"
        assert (first[fault] is None) == (expected is None), f"{fault}: {first[fault]}"


def test_the_number_of_steps_is_checked():
    with pytest.raises(ValueError, match=r"preflight\.steps=-1 must be at least 0"):
        PreflightConfig(steps=-1)

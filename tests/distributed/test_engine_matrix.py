"""Every ZeRO stage, offload and optimiser moves the weights as plain PyTorch does on one process, in float64."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kinema.distributed.deepspeed_config import OffloadConfig, OptimizerOffload, ParameterOffload, TrafficConfig
from kinema.distributed.engine import Engine, Precision
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed
LANES, STEPS, RATE = 4, 3, 1e-2

OFFLOADS = {
    "none": OffloadConfig(),
    "cpu": OffloadConfig(OptimizerOffload.cpu),
    "cpu, cpu": OffloadConfig(OptimizerOffload.cpu, ParameterOffload.cpu),
    "nvme": OffloadConfig(OptimizerOffload.nvme),
}


class Twice(nn.Module):
    """A submodule used twice, a frozen parameter, sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 13)
        self.shared = nn.Linear(13, 13)
        self.frozen = nn.Linear(13, 13)
        self.last = nn.Linear(13, 3, bias=False)
        self.norm = nn.LayerNorm(3)
        self.frozen.requires_grad_(False)

    def forward(self, clips: Tensor) -> Tensor:
        hidden = self.shared(self.first(clips).tanh()).tanh()
        return self.norm(self.last(self.shared(self.frozen(hidden)).tanh()))


def network() -> nn.Module:
    torch.manual_seed(0)
    return Twice()


def lane_loss(module, step: int, lane: int, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + lane)
    clips = torch.randn(lane + 1, 7, generator=generator).to(dtype)
    return (module(clips) - clips[:, :3]).square().mean(dim=1).sum() / sum(range(1, LANES + 1))


def groups(module: nn.Module) -> list[dict]:
    trained = [p for p in module.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0}]  # fmt: skip


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(module), lr=RATE, eps=1e-3)


def reference(make) -> tuple[list[float], dict[str, Tensor]]:
    module = network().double()
    optimizer, norms = make(module), []
    for step in range(STEPS):
        optimizer.zero_grad()
        for lane in range(LANES):
            lane_loss(module, step, lane, torch.float64).backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), 0.5)))
        optimizer.step()
    return norms, {k: v.detach() for k, v in module.named_parameters() if v.requires_grad}


def difference(stage: int, offload: str, make, expected, folder: str) -> float:
    world, rank = dist.get_world_size(), dist.get_rank()
    module, where = network(), dataclasses.replace(OFFLOADS[offload])
    where.nvme_path = folder if offload == "nvme" else None
    engine = Engine(
        module, make(module), zero_stage=stage, precision=Precision.float32, accumulation=LANES // world,
        gradient_clipping=0.5, offload=where, traffic=TrafficConfig(bucket_elements=60, resident_elements=5),
    )  # fmt: skip
    norms = []
    for step in range(STEPS):
        for lane in range(rank * LANES // world, (rank + 1) * LANES // world):
            engine.backward(lane_loss(engine, step, lane))
            engine.step(RATE)
        norms.append(engine.grad_norm())
    found = dict(engine.gather())
    return max(
        *(abs(a / b - 1) for a, b in zip(norms, expected[0], strict=True)),
        *(float((found[k] - v).abs().max() / v.abs().max()) for k, v in expected[1].items()),
    )


def cells(folder: str) -> dict[str, float]:
    expected = reference(adamw)
    kinds = [(0, "none"), *((s, o) for s in (1, 2, 3) for o in ("none", "cpu", "nvme")), (3, "cpu, cpu")]
    return {f"zero {s}, offload {o}": difference(s, o, adamw, expected, folder) for s, o in kinds}


def test_every_stage_and_offload_equals_plain_pytorch(tmp_path):
    for found in run_ranks(cells, 2, str(tmp_path)):
        assert max(found.values()) < 1e-5, found

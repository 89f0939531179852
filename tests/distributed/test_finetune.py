"""Frozen parameters stay as they are at every ZeRO stage, have no state, and leave the trained ones alone."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kinema.distributed.engine import Engine, Precision
from kinema.training.ema import EMA, EMAConfig
from kinema.training.finetune import Parts, frozen_parameters
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed
STEPS, RATE = 3, 1e-2


def network() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(7, 13), nn.GELU(), nn.Linear(13, 5), nn.GELU(), nn.Linear(5, 3, bias=False))
    Parts(["2.*", "0.bias"]).prepare(made)
    return made


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=RATE, eps=1e-3, weight_decay=0.1)


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(10 * step + rank))


def reference(ranks: int) -> dict[str, torch.Tensor]:
    """The same steps by plain PyTorch on one process, in float64."""
    module = network().double()
    moves = optimizer(module)
    for step in range(STEPS):
        moves.zero_grad()
        sum(module(batch(step, rank).double()).square().mean() for rank in range(ranks)).backward()
        moves.step()
    return {name: value.detach() for name, value in module.named_parameters()}


def train_at_every_stage() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    expected = reference(ranks)
    for stage in (0, 1, 2, 3):
        module = network()
        start = {name: value.clone() for name, value in frozen_parameters(module).items()}
        engine = Engine(
            module,
            optimizer(module),
            zero_stage=stage,
            precision=Precision.float32,
            accumulation=1,
            gradient_clipping=1e9,
        )
        ema = EMA(EMAConfig(decay=0.5, warmup=False), engine)
        for step in range(STEPS):
            engine.backward(engine(batch(step, rank)).square().mean())
            engine.step(RATE)
            ema.update(step + 1)
        found = dict(engine.gather())
        assert list(found) == ["0.bias", "2.weight", "2.bias"]
        assert ema.full().keys() == dict(engine.gather_state("exp_avg")).keys() == found.keys()
        for name, value in found.items():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
        state = {id(p) for p in engine.deepspeed.optimizer.param_groups[0]["params"]}
        assert len(state) < len(list(module.parameters()))
        if stage < 3:  # under stage 3 weights are empty between steps
            for name, value in start.items():
                assert torch.equal(dict(module.named_parameters())[name], value)
                assert dict(module.named_parameters())[name].grad is None


def test_chosen_parts_train_as_plain_pytorch_trains_them_at_every_zero_stage():
    run_ranks(train_at_every_stage, 2)

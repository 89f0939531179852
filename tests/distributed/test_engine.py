"""ZeRO stages and accumulation change how a step is spread and nothing else; sharded state survives any change."""

import pytest
import torch
from torch import Tensor, nn

from kinema.distributed.engine import Engine, Precision
from kinema.training.ema import EMA, EMAConfig
from kinema.training.profiles import exponent_of
from tests.ranks import run_ranks
from tests.unit.test_profiles import power_shares

pytestmark = pytest.mark.distributed
LANES, STEPS = 4, 3


def network() -> nn.Module:
    torch.manual_seed(0)
    # Sizes that no number of ranks divides, so that partitions need padding.
    return nn.Sequential(nn.Linear(7, 13), nn.GELU(), nn.Linear(13, 3, bias=False), nn.LayerNorm(3))


def build(stage: int, lanes: int, weights: dict[str, Tensor] | None = None, precision=Precision.float32) -> Engine:
    module = network()
    if weights:
        module.load_state_dict(weights)
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": 0.1},
         {"params": [p for p in module.parameters() if p.ndim == 1], "weight_decay": 0.0}],
        lr=1e-2, eps=1e-3,  # damped, or Adam blows rounding of tiny gradients up
    )  # fmt: skip
    return Engine(module, optimizer, zero_stage=stage, precision=precision, accumulation=lanes, gradient_clipping=0.5)


def lane_loss(module, step: int, lane: int) -> Tensor:
    """Lanes of unequal size, as packs are: lane k holds k + 1 clips, and the loss is a mean over all of them."""
    generator = torch.Generator().manual_seed(100 * step + lane)
    clips = torch.randn(lane + 1, 7, generator=generator)
    total = sum(range(1, LANES + 1))
    return module(clips).square().mean(dim=1).sum() / total


def run_steps(engine: Engine, lanes: list[int], first: int, last: int, ema: EMA | None = None) -> list[float]:
    norms = []
    for step in range(first, last):
        for lane in lanes:
            engine.backward(lane_loss(engine, step, lane))
            engine.step(1e-2)
        norms.append(engine.grad_norm())
        if ema:
            ema.update(step + 1)
    return norms


def state(engine: Engine) -> dict[str, Tensor]:
    found = {f"weights/{k}": v for k, v in engine.gather()}
    for name in engine.state_names:
        found |= {f"{name}/{k}": v for k, v in engine.gather_state(name)}
    return found


def reference() -> tuple[dict[str, Tensor], list[float], list[dict[str, Tensor]]]:
    """The same steps by plain PyTorch on one process, in float64: first gradients, norms, weights of each step."""
    module = network().double()
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": 0.1},
         {"params": [p for p in module.parameters() if p.ndim == 1], "weight_decay": 0.0}],
        lr=1e-2, eps=1e-3,  # damped, or Adam blows rounding of tiny gradients up
    )  # fmt: skip
    norms, trail = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        for lane in range(LANES):
            generator = torch.Generator().manual_seed(100 * step + lane)
            clips = torch.randn(lane + 1, 7, generator=generator).double()
            (module(clips).square().mean(dim=1).sum() / sum(range(1, LANES + 1))).backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), 0.5)))
        if step == 0:
            gradients = {k: v.grad.clone() for k, v in module.named_parameters()}
        optimizer.step()
        trail.append({k: v.detach().clone() for k, v in module.named_parameters()})
    return gradients, norms, trail


def mine(rank: int, world: int) -> list[int]:
    share = LANES // world
    return list(range(rank * share, (rank + 1) * share))


def compare_stages_with_reference() -> dict[int, float]:
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    gradients, expected_norms, trail = reference()
    largest = {}
    for stage in (0, 1, 2, 3):
        engine = build(stage, LANES // world)
        ema = EMA(EMAConfig(decay=0.9, warmup=False, power=[0.1]), engine)
        norms = run_steps(engine, mine(rank, world), 0, 1, ema)
        moments = dict(engine.gather_state("exp_avg"))  # after one step: 0.1 * the clipped gradient
        norms += run_steps(engine, mine(rank, world), 1, STEPS, ema)
        assert norms == pytest.approx(expected_norms, rel=1e-5)
        assert {tuple(value.shape) for value in moments.values()} == {(13, 7), (13,), (3, 13), (3,)}
        differences = [
            *((moments[k].double() - 0.1 * g).abs().max() / (0.1 * g).abs().max() for k, g in gradients.items()),
            *((value - trail[-1][k]).abs().max() / trail[-1][k].abs().max() for k, value in engine.gather()),
        ]
        largest[stage] = float(max(differences))
        # The average follows the gathered weights by its closed form, on every rank and stage (S31).
        average = {k: v.double() for k, v in network().named_parameters()}
        for weights in trail:
            average = {k: 0.9 * average[k] + 0.1 * weights[k] for k in average}
        for key, value in ema.full().items():
            torch.testing.assert_close(value.double(), average[key].detach(), rtol=1e-4, atol=1e-5)
        shares = power_shares(exponent_of(0.1), STEPS)
        for key, value in engine.gather(ema.averages["ema_0.100"]):
            whole = sum(share * weights[key] for share, weights in zip(shares, trail, strict=True))
            torch.testing.assert_close(value.double(), whole, rtol=1e-4, atol=1e-5)
    return largest


def test_every_zero_stage_on_two_ranks_equals_plain_pytorch_on_one():
    for largest in run_ranks(compare_stages_with_reference, 2):
        assert max(largest.values()) < 5e-5, largest  # float32 against float64, each tensor by its largest entry


def resume_across_layouts() -> None:
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    for stage in (0, 1, 2, 3):
        engine = build(stage, LANES // world)
        ema = EMA(EMAConfig(decay=0.9), engine)
        run_steps(engine, mine(rank, world), 0, 2, ema)
        saved, saved_ema, count = state(engine), ema.full(), engine.optimizer_step()
        run_steps(engine, mine(rank, world), 2, STEPS, ema)
        uninterrupted, uninterrupted_ema = state(engine), ema.full()
        for other in (0, 1, 2, 3):
            weights = {k.removeprefix("weights/"): v for k, v in saved.items() if k.startswith("weights/")}
            again = build(other, LANES // world, weights)
            for name in again.state_names:
                again.load_state(name, {k: saved[f"{name}/{k}"] for k in again.parameters_with(name)})
            again.set_optimizer_step(count)
            ema_again = EMA(EMAConfig(decay=0.9), again)
            again.layout.scatter(saved_ema, ema_again.shards)
            for key, value in state(again).items():
                assert torch.equal(value, saved[key]), (stage, other, key)
            run_steps(again, mine(rank, world), 2, STEPS, ema_again)
            for key, value in state(again).items():
                if other == stage:  # the same layout continues bit for bit
                    assert torch.equal(value, uninterrupted[key]), (stage, key)
                torch.testing.assert_close(value, uninterrupted[key], rtol=1e-5, atol=1e-6)
            for key, value in ema_again.full().items():
                torch.testing.assert_close(value, uninterrupted_ema[key], rtol=1e-5, atol=1e-6)


def test_state_moves_between_stages_and_continues_bit_for_bit_on_the_same_one():
    run_ranks(resume_across_layouts, 2)


def bf16_moves_small_updates() -> float:
    engine = build(1, 1, precision=Precision.bfloat16)
    before = {k: v.clone() for k, v in engine.gather()}
    for step in range(5):
        engine.backward(lane_loss(engine, step, 0))
        engine.step(1e-5)
    moved = [(value != before[key]).float().mean() for key, value in engine.gather()]
    assert all(moment.dtype == torch.float32 for moment in engine.state("exp_avg"))
    return float(torch.stack(moved).min())


def test_bfloat16_keeps_float32_masters_that_small_updates_move():
    assert run_ranks(bf16_moves_small_updates, 1)[0] > 0.99

"""Muon and 8-bit AdamW: against torch's own, their formulas, and what their papers promise."""

import copy

import pytest
import torch
from torch import nn

from kinema.distributed.engine import Precision
from kinema.training.optimizers.blockwise import BLOCK, Moment, codebook
from kinema.training.optimizers.muon import orthogonalize
from kinema.training.optimizers.optim import AdamW, AdamW8bit, MuonAdamW, hidden_matrices


@pytest.mark.parametrize("shape", [(12, 12), (8, 30), (30, 8)])
def test_orthogonalizing_keeps_singular_vectors_and_evens_out_the_values(shape):
    torch.manual_seed(0)
    left, values, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    found = left.T @ orthogonalize(left * values @ right, dtype=torch.float64) @ right.T
    diagonal = found.diagonal()
    torch.testing.assert_close(found, torch.diag(diagonal))
    assert 0.6 < diagonal.min() < diagonal.max() < 1.3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 10), nn.Conv3d(2, 4, 3)])
        self.head = nn.Linear(10, 3)


def test_muon_takes_matrices_and_kernels_inside_lists_only():
    net = Net()
    assert [id(p) for p in hidden_matrices(net)] == [id(net.blocks[0].weight), id(net.blocks[1].weight)]
    groups = MuonAdamW(weight_decay=0.3).build(net).param_groups
    assert [(len(g["params"]), g["muon"], g["weight_decay"]) for g in groups] == [
        (2, True, 0.3), (1, False, 0.3), (3, False, 0.0),
    ]  # fmt: skip


def test_muon_equals_torchs_bit_for_bit():
    torch.manual_seed(0)
    ours, theirs = torch.randn(6, 10), None
    theirs = nn.Parameter(ours.clone())
    optimizer = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    momentum = torch.zeros_like(ours)
    for _ in range(4):
        theirs.grad = torch.randn(6, 10)
        momentum.lerp_(theirs.grad, 1 - 0.95)
        update = orthogonalize(theirs.grad.lerp(momentum, 0.95))
        ours = ours * (1 - 0.02 * 0.1)
        ours.add_(update, alpha=-0.02 * 0.2 * 10**0.5)
        optimizer.step()
        assert torch.equal(ours, theirs.detach())


@pytest.mark.parametrize("signed", [True, False])
def test_the_codebook_is_a_dynamic_tree_of_8_bits(signed):
    values = codebook(signed)
    assert len(values) == (255 if signed else 256)
    assert torch.equal(values, values.unique())
    assert {0.0, 1.0} <= set(values.tolist())
    assert torch.equal(values, -values.flip(0)) == signed
    # Relative spacing within the first decade, where most weights of a moment lie.
    inside = values[values >= 0.5]
    assert float((inside.diff() / inside[1:]).max()) < (0.03 if signed else 0.015)


def test_quantizing_keeps_block_maxima_and_signs_and_is_idempotent():
    torch.manual_seed(0)
    values = torch.randn(3 * BLOCK + 17) * torch.logspace(-8, 3, 3 * BLOCK + 17)
    moment = Moment(values, True, torch.zeros_like)
    moment.write(0, values)
    once = moment.read(0, len(values))
    largest = values[:BLOCK].abs().argmax()
    assert once[largest] == values[largest]
    scale = moment.scales.repeat_interleave(BLOCK)[: len(values)]
    assert float(((once - values).abs() / scale).max()) < 0.01
    moment.write(0, once)
    assert torch.equal(moment.read(0, len(values)), once)


def test_a_second_moment_above_zero_never_becomes_zero():
    values = torch.full((BLOCK,), 1e-20)
    values[0] = 1.0
    moment = Moment(values, False, torch.zeros_like)
    moment.write(0, values)
    assert moment.read(0, BLOCK).min() > 0


def regression(config, steps: int = 60) -> tuple[list[float], nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
    teacher = copy.deepcopy(net)
    nn.init.normal_(teacher[0].weight)
    optimizer, losses = config.build(net), []
    if hasattr(optimizer, "create_state"):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.create_state(parameter, group, torch.zeros_like)
    for _ in range(steps):
        clips = torch.randn(64, 16)
        loss = (net(clips) - teacher(clips).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, net


def test_8_bit_adamw_learns_as_32_bits_do():
    exact, net = regression(AdamW(3e-3))
    quantized, other = regression(AdamW8bit(3e-3))
    assert quantized == pytest.approx(exact, rel=0.02)
    moved = [(p - q).norm() / (p - o).norm() for p, q, o in zip(
        net.parameters(), other.parameters(), regression(AdamW(3e-3), 0)[1].parameters(), strict=True)]  # fmt: skip
    assert max(moved) < 0.06  # of the way that each tensor went


def test_8_bit_adamw_follows_its_formula():
    """Adam in float64 whose moments are replaced by the nearest code after each step, found by search."""
    torch.manual_seed(0)
    weights = torch.randn(2, BLOCK)
    ours = nn.Parameter(weights.clone())
    optimizer = AdamW8bit(1e-2, betas=[0.9, 0.99], weight_decay=0.1).build(nn.ParameterList([ours]))
    optimizer.create_state(ours, optimizer.param_groups[0], torch.zeros_like)
    theirs, mean, square = weights.double(), torch.zeros(2, BLOCK).double(), torch.zeros(2, BLOCK).double()

    def nearest(values, codes):
        scale = values.abs().amax(dim=1, keepdim=True)
        picked = ((values / scale)[..., None] - codes.double()).abs().argmin(dim=-1)
        if codes[0] == 0:
            picked = torch.where(values > 0, picked.clamp(min=1), picked)
        return codes.double()[picked] * scale

    for step in range(1, 5):
        ours.grad = torch.randn(2, BLOCK)
        optimizer.step()
        mean = 0.9 * mean + 0.1 * ours.grad.double()
        square = 0.99 * square + 0.01 * ours.grad.double() ** 2
        root = (square / (1 - 0.99**step)).sqrt() + 1e-8
        theirs = theirs * (1 - 1e-3) - 1e-2 * mean / (1 - 0.9**step) / root
        mean, square = nearest(mean, codebook(True)), nearest(square, codebook(False))
    off = (ours.detach() - theirs).abs() > 1e-5
    assert off.float().mean() < 0.005  # a value halfway between two codes may go to either


def test_impossible_choices_are_refused():
    with pytest.raises(ValueError, match=r"optim\.momentum=1\.0"):
        MuonAdamW(momentum=1.0)
    with pytest.raises(ValueError, match=r"optim\.newton_schulz_steps=0"):
        MuonAdamW(newton_schulz_steps=0, newton_schulz_precision=Precision.float32)

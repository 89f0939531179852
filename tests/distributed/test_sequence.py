"""Sequence parallelism changes nothing but where tokens lie: real ranks against one, for every preset."""

import pytest
import torch
import torch.distributed as dist

from kinema.distributed.mesh import make_mesh
from kinema.distributed.sequence import Ulysses
from tests.distributed.sequence_cases import Inputs, configs, model
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def largest_difference(ours, theirs) -> float:
    """Of two lists of tensors, over the largest value of each, and of all: a gradient may be nothing but rounding."""
    with torch.no_grad():
        most = [float(x.abs().max()) for x in theirs]
        off = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    return max(difference / (own + 1e-3 * max(most)) for difference, own in zip(off, most, strict=True))


def compare(config, group) -> dict[str, float]:
    """Outputs and gradients of one model on this group against the same on this rank alone."""
    module, inputs = model(config), Inputs(config)
    for x in (*inputs.latents, *inputs.text):
        x.requires_grad_()
    leaves = [*module.parameters(), *inputs.latents, *inputs.text]

    def pass_through():
        outputs = inputs.outputs(module)
        loss = sum((x.square() * torch.linspace(0, 1, x.numel()).view_as(x)).mean() for x in outputs)
        return outputs, torch.autograd.grad(loss, leaves, allow_unused=True)

    expected, gradients = pass_through()
    module.share_tokens(group)
    outputs, parts = pass_through()
    assert [part is None for part in parts] == [gradient is None for gradient in gradients]
    used = [i for i, gradient in enumerate(gradients) if gradient is not None]
    for i in used:
        dist.all_reduce(parts[i])
    return {
        "outputs": largest_difference(outputs, expected),
        "gradients": largest_difference([parts[i] for i in used], [gradients[i] for i in used]),
    }


def presets(cases) -> dict[str, dict[str, float]]:
    group = Ulysses(make_mesh(dist.get_world_size()))
    return {name: compare(config, group) for name, config in cases.items()}


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_every_preset_says_and_learns_the_same_on_several_ranks(ranks):
    for found in run_ranks(presets, ranks, configs()):
        assert {name: values for name, values in found.items() if max(values.values()) > 1e-12} == {}

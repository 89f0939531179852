"""What is written out by hand for speed and memory: the same numbers, and gradients by finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kinema.models.dit import Activation, NormKind, norms
from kinema.models.dit.layers import FeedForward
from kinema.models.dit.memory import made_again
from kinema.models.dit.modulating import gated_sum, modulated
from kinema.models.dit.norms import Norm
from kinema.models.position import apply_rope

LENGTHS = (3, 3, 2)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("kind", list(NormKind))
@pytest.mark.parametrize("lengths", [(8,), LENGTHS])
def test_a_modulated_norm_is_the_norm_and_then_the_modulation(lengths, kind, affine, monkeypatch):
    norm = Norm(kind, 6, 1e-5, affine=affine).double()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x, shift, scale = draw(8, 6), draw(len(lengths), 6, seed=1), draw(len(lengths), 6, seed=2)
    torch.testing.assert_close(norm.modulated(x, shift, scale, lengths), modulated(norm(x), shift, scale, lengths))
    assert torch.autograd.gradcheck(lambda *given: norm.modulated(*given, lengths), (x, shift, scale))
    whole = norm.modulated(x, shift, scale, lengths)
    monkeypatch.setattr(norms, "FEW_ROWS", 0)
    torch.testing.assert_close(norm.modulated(x, shift, scale, lengths), whole)


@pytest.mark.parametrize("lengths", [(8,), LENGTHS])
def test_a_gated_sum_has_its_gradients(lengths):
    tokens, update, gate = draw(8, 6), draw(8, 6, seed=1), draw(len(lengths), 6, seed=2)
    rows = torch.repeat_interleave(gate, torch.tensor(lengths), dim=0)
    torch.testing.assert_close(gated_sum(tokens, gate, update, lengths), tokens + rows * update)
    assert torch.autograd.gradcheck(lambda *given: gated_sum(*given, lengths), (tokens, gate, update))


@pytest.mark.parametrize("table", [(5, 2), (5, 3, 2)])
def test_a_turn_has_its_gradients_and_compiles_to_the_same(table, monkeypatch):
    x, angles = draw(5, 3, 4), draw(*table, seed=1).detach()
    cos, sin = angles.cos(), angles.sin()
    turned = apply_rope(x, cos, sin)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, cos, sin), x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(apply_rope(x, cos, sin), turned)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", list(Activation))
def test_an_mlp_keeps_no_activated_channels_and_takes_no_product_twice(activation):
    mlp, kept = FeedForward(6, 40, activation, bias=True).double(), []
    x = draw(5, 6)

    def pack(tensor):
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with Products() as forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = mlp.mlp(x)
    with Products() as backward:
        y.sum().backward()
    layers = forward.count
    assert backward.count == 2 * layers
    parameters = {parameter.untyped_storage().data_ptr() for parameter in mlp.parameters()}
    assert len(set(kept) - parameters) == layers  # x and what each first layer gives; the second's input is made again

    leaf = x.detach().requires_grad_()
    expanded = F.linear(leaf, mlp.expand.weight, mlp.expand.bias)
    if activation is Activation.swiglu:
        active = F.silu(F.linear(leaf, mlp.gate.weight, mlp.gate.bias)) * expanded
    else:
        names = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}
        active = names[activation.value](expanded)
    F.linear(active, mlp.project.weight, mlp.project.bias).sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad)


def test_what_is_made_again_draws_the_same_dropout():
    x = draw(50, 50)
    torch.manual_seed(0)
    y = made_again(lambda x: F.dropout(x, 0.5) * x, x)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x.detach() / 2, y.detach())

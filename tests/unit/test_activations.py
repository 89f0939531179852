"""The GELU of a CPU is PyTorch's, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from kinema.models.dit.activations import gelu_tanh


@pytest.mark.parametrize("compiling", [False, True])
def test_it_is_pytorchs_in_float64(compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x = torch.linspace(-30, 30, 4001, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(4001, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, expected = gelu_tanh(x), F.gelu(x, approximate="tanh")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    (gradient,), (right,) = (torch.autograd.grad(y, x, upstream) for y in (found, expected))
    torch.testing.assert_close(gradient, right, rtol=1e-12, atol=1e-14)


def test_float32_is_as_near_to_float64_as_pytorchs():
    x = torch.linspace(-12, 12, 10001)

    def both(function, dtype):
        leaf = x.to(dtype).requires_grad_()
        y = function(leaf)
        return y.detach(), torch.autograd.grad(y.sum(), leaf)[0]

    def theirs(x):
        return F.gelu(x, approximate="tanh")

    values = zip(both(gelu_tanh, x.dtype), both(theirs, x.dtype), both(theirs, torch.float64), strict=True)
    for found, pytorchs, exact in values:
        assert (found - exact).abs().max() <= 2 * (pytorchs - exact).abs().max()


def test_large_inputs_stay_finite():
    x = torch.tensor([-1e12, -3e4, 3e4, 1e12], requires_grad=True)
    y = gelu_tanh(x)
    y.sum().backward()
    assert y.tolist() == [0, 0, 3e4, x[3].item()]
    assert x.grad.tolist() == [0, 0, 1, 1]

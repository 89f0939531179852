"""GELU by its tanh form where PyTorch's own kernel is slow."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CUBIC = 0.044715
STEEPNESS = 2 * math.sqrt(2 / math.pi)


def gelu_tanh(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))): Hendrycks and Gimpel 2016, GELU, section 2. Any shape.

    (1 + tanh(u)) / 2 is sigmoid(2u), which takes a CPU less than a third of the time.
    """
    if x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(STEEPNESS * (x + CUBIC * x * x * x))
    return _TanhGELU.apply(x)


class _TanhGELU(torch.autograd.Function):
    """Both directions in as few passes over memory as there are."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return torch.addcmul(x, x * x, x, value=CUBIC).mul_(STEEPNESS).sigmoid_().mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        square = x * x
        sigmoid = torch.addcmul(x, square, x, value=CUBIC).mul_(STEEPNESS).sigmoid_()
        slope = torch.addcmul(x, square, x, value=3 * CUBIC, out=square)
        falling = slope.mul_(1 - sigmoid)  # slope - slope * sigmoid would lose its digits where x is large
        return sigmoid.addcmul_(falling, sigmoid, value=STEEPNESS).mul_(grad)

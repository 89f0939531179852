"""Norms over channels, in float32 whatever the dtype of tokens and weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kinema.models.attention import Lengths
from kinema.models.dit.axes import NormKind
from kinema.models.dit.modulating import modulated

FEW_ROWS = 8


class Norm(nn.Module):
    """Layer norm (Ba et al. 2016) or root-mean-square norm (Zhang and Sennrich 2019) over the last axis."""

    def __init__(self, kind: NormKind, channels: int, eps: float, *, affine: bool) -> None:
        super().__init__()
        self.kind, self.channels, self.eps = kind, channels, eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine and kind is NormKind.layer else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., channels) -> the same shape in at least float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        return self._normalised(x.to(dtype), weight, bias)

    def modulated(self, x: Tensor, shift: Tensor | None, scale: Tensor, lengths: Lengths | None) -> Tensor:
        """forward(x) * (1 + scale) + shift, one row for each length: x (N, D), rows (R, D) -> (N, D), at least float32.

        A row is then the weight and bias of a norm, and a norm needs only its input for the backward. Many rows are
        broadcast instead: a kernel for each would take longer. Without lengths, one row for each token: `compiled.py`.
        """
        if lengths is None or len(lengths) > FEW_ROWS:
            return modulated(self(x), shift, scale, lengths)
        parts = x.to(scale.dtype).split(lengths)
        weights, biases = self._composed(shift, scale)
        rows = [self._normalised(*row) for row in zip(parts, weights, biases, strict=True)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _composed(self, shift: Tensor | None, scale: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Weights and biases of this norm with the modulation behind it, (R, D) each."""
        weight, bias = 1 + scale, shift
        if self.bias is not None:
            own = self.bias.to(weight.dtype)
            bias = weight * own if shift is None else torch.addcmul(shift, weight, own)
        composed = weight if self.weight is None else weight * self.weight.to(weight.dtype)
        return composed, [None] * len(scale) if bias is None else list(bias)

    def _normalised(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.kind is NormKind.layer:
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        if (
            weight is not None and x.device.type == "cpu" and not torch.compiler.is_compiling()
        ):  # no fused kernel there: its backward takes twelve passes
            return _RMSNorm.apply(x, weight, bias, self.eps)
        normed = F.rms_norm(x, x.shape[-1:], weight, self.eps)
        return normed if bias is None else normed + bias


class _RMSNorm(torch.autograd.Function):
    """F.rms_norm, and a bias, with its backward written out, in half the passes over memory."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:  # type: ignore[no-untyped-def]
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = torch.rsqrt(length.square() / x.shape[-1] + eps)
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight if bias is None else torch.addcmul(bias, normed, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:  # type: ignore[no-untyped-def]
        normed, inverse, weight = ctx.saved_tensors
        product = grad * normed
        along = (product @ weight).unsqueeze(-1) / len(weight)
        grad_weight = product.sum_to_size(weight.shape)
        grad_bias = grad.sum_to_size(weight.shape) if ctx.needs_input_grad[2] else None
        grad_x = torch.mul(grad, weight, out=product).addcmul_(normed, along, value=-1).mul_(inverse)
        return grad_x, grad_weight, grad_bias, None

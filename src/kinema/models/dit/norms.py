"""Norms over channels, in float32 whatever the dtype of tokens and weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kinema.models.dit.config import NormKind


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
        x = x.to(dtype)
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        if self.kind is NormKind.layer:
            return F.layer_norm(x, (self.channels,), weight, bias, self.eps)
        if weight is not None and x.device.type == "cpu":  # no fused kernel there: its backward takes twelve passes
            return _RMSNorm.apply(x, weight, self.eps)
        return F.rms_norm(x, (self.channels,), weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """F.rms_norm with its backward written out, in half the passes over memory."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def]
        inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        normed, inverse, weight = ctx.saved_tensors
        product = grad * normed
        along = (product @ weight).unsqueeze(-1) / len(weight)
        grad_x = torch.addcmul(grad * weight, normed, along, value=-1).mul_(inverse)
        return grad_x, product.sum_to_size(weight.shape), None

"""Whether the attention kernels of this machine compute what attention is: outputs and gradients."""

import torch
from torch import Tensor

from kinema.doctor.finding import Check, Finding, graded
from kinema.models.attention import Attention, AttentionKernel, attention_of

LENGTHS = (5, 17, 64, 17)
"""Of a pack: odd, equal and long ones."""
HEADS, WIDTH = 4, 32
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference, relative to the largest value of the reference."""


def kernel_checks() -> list[Check]:
    """One for each kernel that can be had here, in the formats that it is used in."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    asked = [(AttentionKernel.sdpa, torch.float32), (AttentionKernel.sdpa, torch.bfloat16)]
    if on_gpu and _has_flash():
        asked.append((AttentionKernel.flash, torch.bfloat16))
    return [
        (kernel.value, lambda kernel=kernel, dtype=dtype: check_kernel(kernel, dtype, device))  # type: ignore[misc]
        for kernel, dtype in asked
    ]


def check_kernel(kernel: AttentionKernel, dtype: torch.dtype, device: str) -> Finding:
    """A pack of clips through a kernel, and through a softmax in float64."""
    return compare(attention_of(kernel), f"{kernel.value} {str(dtype).removeprefix('torch.')}", dtype, device)


def compare(kernel: Attention, name: str, dtype: torch.dtype, device: str) -> Finding:
    """Outputs and the gradients of q, k and v against the plain formula in float64."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(sum(LENGTHS), HEADS, WIDTH, generator=generator).to(dtype) for _ in range(4)]
    here = [x.to(device, copy=True).requires_grad_() for x in given[:3]]
    exact = [x.double().requires_grad_() for x in given[:3]]
    found, expected = kernel(here[0], here[1], here[2], LENGTHS, LENGTHS), plain_attention(*exact)
    gradients = torch.autograd.grad(found, here, given[3].to(device))
    exact_gradients = torch.autograd.grad(expected, exact, given[3].double())
    pairs = zip((found, *gradients), (expected, *exact_gradients), strict=True)
    worst = max(_difference(mine, theirs) for mine, theirs in pairs)
    advice = "This kernel computes something else: choose another model.attention_kernel, or another torch."
    told = f"differs from a float64 softmax by {worst:.1e}, gradients too (allowed {ALLOWED[dtype]:.0e}, {device})"
    return graded(name, told, fail="" if worst <= ALLOWED[dtype] else advice)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of each clip by itself; q, k, v (N, h, d) -> (N, h, d)."""
    mixed = []
    for clip in zip(*(x.split(list(LENGTHS)) for x in (q, k, v)), strict=True):
        asking, answering, values = (x.transpose(0, 1) for x in clip)
        scores = asking @ answering.transpose(1, 2) / WIDTH**0.5
        mixed.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(mixed)


def _difference(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    difference = (found.double().cpu() - expected).abs().max() / expected.abs().max()
    return float(difference) if difference.isfinite() else float("inf")


def _has_flash() -> bool:
    try:
        attention_of(AttentionKernel.flash)
    except ValueError:
        return False
    return True

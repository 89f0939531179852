"""Where a token lies in its clip, and the embeddings that tell the model: one for everyone."""

from collections.abc import Sequence

import torch
from torch import Tensor


def grid_positions(frames: int, height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Positions (t, h, w) of a grid of tokens, time outermost -> float32 (frames * height * width, 3)."""
    axes = [torch.arange(size, dtype=torch.float32, device=device) for size in (frames, height, width)]
    return torch.cartesian_prod(*axes).view(-1, 3)


def rope_3d(
    positions: Tensor,
    head_dim: int,
    axes: Sequence[int],
    theta: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Rotary angles of tokens in space and time: positions (N, 3) -> cos, sin (N, head_dim / 2).

    Su et al. 2021 (RoFormer), section 3.2.2, once for each axis: the first `axes[0]` channels of a head turn
    with t, the next `axes[1]` with h, the last with w. Angles are float64 inside: at position 1000 a float32
    angle can be off by 3e-5. Positions need not be whole.
    """
    check_rope_axes(axes, head_dim)
    angles = [positions[:, axis, None] * _frequencies(size, theta, positions.device) for axis, size in enumerate(axes)]
    whole = torch.cat(angles, dim=1)
    return whole.cos().to(dtype), whole.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring channel pairs (0, 1), (2, 3), ...: x (N, ..., d), cos and sin (N, d / 2) -> like x.

    A pair is one complex number and the turn one multiplication: a single pass over memory. Computed in the
    precision of the table, returned in that of x.
    """
    turn = torch.complex(cos, sin).view(len(cos), *[1] * (x.ndim - 2), -1)
    pairs = torch.view_as_complex(x.to(cos.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def sincos_3d(positions: Tensor, width: int, theta: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sines and cosines of where a token lies, to be added to it: positions (N, 3) -> (N, width).

    Vaswani et al. 2017, section 3.5, once for each axis: a third of the channels each for t, h and w, of
    which the first half are sines; up to five channels that do not divide by six stay zero. Float64 inside.
    """
    size = width // 6 * 2
    angles = positions[:, :, None] * _frequencies(size, theta, positions.device)  # (N, 3, size / 2)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return torch.nn.functional.pad(waves, (0, width - 3 * size)).to(dtype)


def check_rope_axes(axes: Sequence[int], head_dim: int) -> None:
    """Refuse a split of the head that is not three even, non-negative sizes that sum to it."""
    if len(axes) == 3 and sum(axes) == head_dim and all(size >= 0 and size % 2 == 0 for size in axes):
        return
    side = head_dim // 6 * 2
    raise ValueError(
        f"model.rope_axes={list(axes)} must be three even numbers (time, height, width) that sum to the head "
        f"width {head_dim} (model.width / model.num_heads): each pair of channels turns with one axis. "
        f"Type model.rope_axes=[{head_dim - 2 * side},{side},{side}]."
    )


def _frequencies(size: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i / size) for each of the size / 2 pairs."""
    pairs = torch.arange(0, size, 2, dtype=torch.float64, device=device)
    return theta ** (-pairs / max(size, 1))

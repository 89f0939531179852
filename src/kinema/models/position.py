"""Where a token lies in its clip, and the embeddings that tell the model: one for everyone."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def grid_positions(frames: int, height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Positions (t, h, w) of a grid of tokens, time outermost -> float32 (frames * height * width, 3)."""
    axes = [torch.arange(size, dtype=torch.float32, device=device) for size in (frames, height, width)]
    return torch.cartesian_prod(*axes).view(-1, 3)


def word_positions(lengths: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Positions (i, 0, 0) of the words of captions of these lengths, one after the other -> float32 (M, 3)."""
    places = torch.cat([torch.arange(length, device=device) for length in lengths])
    return torch.nn.functional.pad(places[:, None].float(), (0, 2))


def rope_3d(
    positions: Tensor,
    head_dim: int,
    axes: Sequence[int],
    theta: float,
    dtype: torch.dtype = torch.float32,
    scale: Sequence[float] = (1.0, 1.0, 1.0),
    still: int = 0,
) -> tuple[Tensor, Tensor]:
    """Rotary angles of tokens in space and time: positions (N, 3) -> cos, sin (N, head_dim / 2).

    Su et al. 2021 (RoFormer), section 3.2.2, once for each axis: the first `axes[0]` channels of a head turn
    with t, the next `axes[1]` with h, the last with w. Angles are float64 inside: at position 1000 a float32
    angle can be off by 3e-5. Positions need not be whole. A `scale` makes the slowest wave of its axis that much
    longer and leaves the fastest (NTK-aware scaling; bloc97 2023). The last `still` channels do not turn.
    """
    check_rope_axes(axes, head_dim, still)
    bases = [theta if s == 1 else theta * s ** (size / (size - 2)) for size, s in zip(axes, scale, strict=True)]
    angles = [
        positions[:, axis, None] * _frequencies(size, base, positions.device)
        for axis, (size, base) in enumerate(zip(axes, bases, strict=True))
    ]
    whole = torch.nn.functional.pad(torch.cat(angles, dim=1), (0, still // 2))
    return whole.cos().to(dtype), whole.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring channel pairs (0, 1), (2, 3), ...: x (N, ..., d), cos and sin (N, d / 2) -> like x.

    With a table (N, h, d / 2) each head has turns of its own.

    A pair is one complex number and the turn one multiplication: a single pass over memory. Computed in the
    precision of the table, returned in that of x.
    """
    if torch.compiler.is_compiling() or cos.requires_grad:
        # The compiler has no complex numbers, and fuses real ones; a table that learns needs its gradient.
        return _turned_apart(x, cos, sin)
    return _Turned.apply(x, cos, sin)


class _Turned(torch.autograd.Function):
    """The turn; its backward turns back, and keeps the tables that all layers share, nothing else."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        turn = torch.complex(*(_for_heads(part, x) for part in (cos, sin)))
        packed = x if x.stride(-1) == 1 else x.contiguous()  # gradients of some kernels lie crosswise
        pairs = torch.view_as_complex(packed.to(cos.dtype).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return _Turned.apply(grad, cos, -sin), None, None


def _turned_apart(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (_for_heads(part, x) for part in (cos, sin))
    first, second = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def _for_heads(table: Tensor, x: Tensor) -> Tensor:
    """(N, d / 2) -> (N, 1, d / 2), the same for all heads; a table (N, h, d / 2) as it is."""
    return table if table.ndim == x.ndim else table.view(len(table), *[1] * (x.ndim - 2), table.shape[-1])


def fractional_rope(
    positions: Tensor,
    width: int,
    num_heads: int,
    theta: float,
    dtype: torch.dtype = torch.float32,
    *,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotary angles of places as fractions of a largest clip: (N, axes) in [0, 1] -> cos, sin (N, heads, d / 2).

    HaCohen et al. 2024 (LTX-Video): frequencies grow from pi / 2 to theta * pi / 2 over the whole width
    rather than each head, and a place p stands at 2p - 1. Channels that do not divide by twice the axes do not turn.
    Float32 inside, unlike `rope_3d`: at angles of 15 000 the published weights know its rounding; `exact` frequencies
    are rounded once, from float64 (LTX-2).
    """
    axes = positions.shape[1]
    count = width // (2 * axes)
    dtype_inside = torch.float64 if exact else torch.float32
    steps = torch.linspace(0.0, 1.0, count, dtype=dtype_inside, device=positions.device)
    frequencies = (theta**steps * math.pi / 2.0).float()
    angles = frequencies * (positions.float()[:, :, None] * 2 - 1)  # (N, axes, count)
    whole = torch.nn.functional.pad(angles.transpose(1, 2).flatten(1), (width // 2 - axes * count, 0))
    heads = whole.unflatten(1, (num_heads, -1))
    return heads.cos().to(dtype), heads.sin().to(dtype)


def centred(positions: Tensor, side: float) -> Tensor:
    """Positions (N, 3) of a whole grid, rows and columns about its middle and its area brought to side x side.

    Frames of any size and shape then cover the same area (Genmo 2024, Mochi 1). Time stays as it is.
    """
    last = positions.amax(0)
    step = side / (last[1:] + 1).prod().sqrt()
    return torch.cat([positions[:, :1], (positions[:, 1:] - last[1:] / 2) * step], dim=1)


def shared_frequencies(num_heads: int, head_dim: int, theta: float) -> Tensor:
    """Where learned frequencies begin, (3, heads, head_dim / 2): each pair turns with one axis, the three in turn."""
    pairs = torch.arange(head_dim // 2)
    waves = _frequencies(head_dim, theta, pairs.device).float() * (pairs % 3 == torch.arange(3)[:, None])
    return waves[:, None].repeat(1, num_heads, 1)


def mixed_rope(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary angles of all axes at once: positions (N, 3), frequencies (3, h, d / 2) -> cos, sin (N, h, d / 2).

    Heo et al. 2024, RoPE-Mixed: every pair of every head has a frequency along each axis, and they are learned.
    """
    waves = frequencies.to(torch.promote_types(frequencies.dtype, positions.dtype))
    time, row, column = (positions[:, axis, None, None] * wave for axis, wave in enumerate(waves))
    angles = time + row + column
    return angles.cos(), angles.sin()


def middles(positions: Tensor, patch: Sequence[int], units: Sequence[float], fps: float) -> Tensor:
    """Middle of what each token covers: (N, 3) indices -> (N, 3) seconds, rows and columns of pixels, float32.

    `units` are frames, rows and columns of pixels of a latent. The first latent frame of a causal VAE holds one frame
    only, so those behind it begin as many frames earlier (HaCohen et al. 2026, LTX-2).
    """
    ends = []
    for side in (0, 1):
        end = (positions + side) * positions.new_tensor(patch) * positions.new_tensor(units)
        seconds = (end[:, :1] + 1 - units[0]).clamp(min=0) / fps
        ends.append(torch.cat([seconds, end[:, 1:]], dim=1))
    return (ends[0] + ends[1]) / 2


def sincos_3d(positions: Tensor, width: int, theta: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sines and cosines of where a token lies, to be added to it: positions (N, 3) -> (N, width).

    Vaswani et al. 2017, section 3.5, once for each axis: a third of the channels each for t, h and w, of
    which the first half are sines; up to five channels that do not divide by six stay zero. Float64 inside.
    """
    size = width // 6 * 2
    return sincos(positions, [(axis, size) for axis in range(3)], width, theta, dtype)


def sincos_quarters(positions: Tensor, width: int, theta: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same in another layout (Yang et al. 2024, CogVideoX): a quarter for t, then three eighths for w and h."""
    return sincos(positions, [(0, width // 4), (2, width // 8 * 3), (1, width // 8 * 3)], width, theta, dtype)


def sincos_space(positions: Tensor, width: int, theta: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Columns and rows alone, half of the channels each (Chen et al. 2023, PixArt-alpha)."""
    return sincos(positions, [(2, width // 2), (1, width // 2)], width, theta, dtype)


def sincos_time(positions: Tensor, width: int, theta: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Frames alone, in all channels."""
    return sincos(positions, [(0, width)], width, theta, dtype)


def sincos(positions: Tensor, axes: Sequence[tuple[int, int]], width: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Sines, then cosines, of each (axis of the positions, channels) in turn; the rest of the width is zero."""
    waves = []
    for axis, size in axes:
        angles = positions[:, axis, None] * _frequencies(size, theta, positions.device)
        waves += [angles.sin(), angles.cos()]
    whole = torch.cat(waves, dim=1)
    return torch.nn.functional.pad(whole, (0, width - whole.shape[1])).to(dtype)


def check_rope_axes(axes: Sequence[int], head_dim: int, still: int = 0) -> None:
    """Refuse a split of the head that is not three even, non-negative sizes that sum to it, but for what is still."""
    turning = head_dim - still
    if len(axes) == 3 and sum(axes) == turning and all(size >= 0 and size % 2 == 0 for size in axes):
        return
    side = turning // 6 * 2
    rest = f", less model.rope_still={still}" if still else ""
    raise ValueError(
        f"model.rope_axes={list(axes)} must be three even numbers (time, height, width) that sum to the head "
        f"width {head_dim} (model.width / model.num_heads){rest}: each pair of channels turns with one axis. "
        f"Type model.rope_axes=[{turning - 2 * side},{side},{side}]."
    )


def _frequencies(size: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i / size) for each of the size / 2 pairs."""
    pairs = torch.arange(0, size, 2, dtype=torch.float64, device=device)
    return theta ** (-pairs / max(size, 1))

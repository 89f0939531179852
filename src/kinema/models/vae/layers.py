"""Layers of the causal VAE: a frame sees itself and earlier frames only, in one clip or streamed in chunks.

Every layer is called as `layer(x, state)` with x (B, C, T, H, W). `state=None` means that x is a whole clip;
a `StreamState` means that x continues the frames which earlier calls with the same state have seen.
"""

from enum import Enum

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Convolution(Enum):
    """How a 3 x 3 x 3 neighbourhood is covered."""

    full = "full"
    """One 3 x 3 x 3 convolution: most expressive, 27 weights a channel pair."""
    factorised = "factorised"
    """1 x 3 x 3 in space, then 3 x 1 x 1 in time (Cosmos Tokenizer): 12 weights a channel pair."""
    alternating = "alternating"
    """A residual block's first convolution is 1 x 3 x 3 and its second 3 x 1 x 1: 12 weights for the two."""


class Norm(Enum):
    """Normalisation over the channels of one pixel of one frame, so that nothing looks ahead in time."""

    layer = "layer"
    """LayerNorm; the fastest on a CPU, where PyTorch has a fused kernel for it."""
    rms = "rms"
    """RMSNorm without a mean, as in Wan 2.1."""


class TimePadding(Enum):
    """What stands before the first frame."""

    first = "first"
    """The first frame repeated: a single image is a clip that stands still."""
    zeros = "zeros"


class StreamState(dict[nn.Module, Tensor]):
    """What a stream has seen: for each causal layer the past frames that its next output needs.

    Keyed by layer and not by order of calls. It belongs to one stream of one model; start a new one for
    each video.
    """


class CausalConv(nn.Module):
    """3D convolution padded in front of the first frame only; kernel and stride are (time, height, width)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int],
        stride: tuple[int, int, int] = (1, 1, 1),
        time_padding: TimePadding = TimePadding.first,
    ) -> None:
        super().__init__()
        self.past_frames = kernel[0] - 1
        self.time_stride = stride[0]
        self.time_padding = time_padding
        spatial_padding = (0, kernel[1] // 2, kernel[2] // 2)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, spatial_padding)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """(B, C, T, H, W) -> (B, out, ceil(T / stride), ..), the outputs that the frames so far complete."""
        if self.past_frames == 0 and self.time_stride == 1:
            return self._convolve(x)
        past = self._before_first(x) if state is None or self not in state else state[self]
        x = torch.cat([past, x], dim=2)
        out = self._convolve(x)
        if state is not None:
            state[self] = x[:, :, out.shape[2] * self.time_stride :].clone()  # a view would keep the chunk alive
        return out

    def _convolve(self, x: Tensor) -> Tensor:
        """The convolution in the form that runs fastest on a CPU; a conv3d of a flat kernel takes longer."""
        weight, bias = self.conv.weight, self.conv.bias
        time, height, width = self.conv.kernel_size
        if time == 1:  # frames are a batch of images
            frames = x.movedim(1, -1).flatten(0, 1).movedim(-1, 1)  # stays channels last where this copies
            out = F.conv2d(frames, weight[:, :, 0], bias, self.conv.stride[1:], self.conv.padding[1:])
            return out.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
        if height == width == 1:  # one matrix product over the stacked frames
            count = (x.shape[2] - time) // self.time_stride + 1
            taps = [x[:, :, i : i + (count - 1) * self.time_stride + 1 : self.time_stride] for i in range(time)]
            stacked = torch.cat([tap.movedim(1, -1) for tap in taps], dim=-1)
            return F.linear(stacked, weight[..., 0, 0].transpose(1, 2).flatten(1), bias).movedim(-1, 1)
        return self.conv(x.contiguous(memory_format=torch.channels_last_3d))

    def _before_first(self, x: Tensor) -> Tensor:
        first = x[:, :, :1].expand(-1, -1, self.past_frames, -1, -1)
        return first if self.time_padding is TimePadding.first else torch.zeros_like(first)


class CausalSequential(nn.Sequential):
    """Layers one after another, all with the same stream state."""

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """(B, C, T, H, W) -> whatever the last layer returns."""
        for layer in self:
            x = layer(x, state)
        return x


def conv3x3x3(in_channels: int, out_channels: int, convolution: Convolution, time_padding: TimePadding) -> nn.Module:
    """One causal convolution over a 3 x 3 x 3 neighbourhood, whole or factorised."""
    if convolution is Convolution.full:
        return CausalConv(in_channels, out_channels, (3, 3, 3), time_padding=time_padding)
    return CausalSequential(
        CausalConv(in_channels, out_channels, (1, 3, 3)),
        CausalConv(out_channels, out_channels, (3, 1, 1), time_padding=time_padding),
    )


class ChannelNorm(nn.Module):
    """LayerNorm or RMSNorm over the channels of each pixel."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.norm: nn.Module
        self.norm = nn.LayerNorm(channels, eps=1e-6) if norm is Norm.layer else nn.RMSNorm(channels, eps=1e-6)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class ResBlock(nn.Module):
    """Pre-activation residual block: norm, SiLU, convolution, twice."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        convolution: Convolution,
        norm: Norm,
        time_padding: TimePadding,
    ) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(in_channels, norm)
        self.norm2 = ChannelNorm(out_channels, norm)
        self.conv1: nn.Module
        self.conv2: nn.Module
        if convolution is Convolution.alternating:
            self.conv1 = CausalConv(in_channels, out_channels, (1, 3, 3))
            self.conv2 = CausalConv(out_channels, out_channels, (3, 1, 1), time_padding=time_padding)
        else:
            self.conv1 = conv3x3x3(in_channels, out_channels, convolution, time_padding)
            self.conv2 = conv3x3x3(out_channels, out_channels, convolution, time_padding)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else CausalConv(in_channels, out_channels, (1, 1, 1))

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """(B, in, T, H, W) -> (B, out, T, H, W)."""
        out = self.conv1(F.silu(self.norm1(x)), state)
        out = self.conv2(F.silu(self.norm2(out)), state)
        return self.shortcut(x) + out


class Output(nn.Module):
    """Norm, SiLU and the last convolution, beside a linear path for the amplitude which the norm removes."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        convolution: Convolution,
        norm: Norm,
        time_padding: TimePadding,
    ) -> None:
        super().__init__()
        self.norm = ChannelNorm(in_channels, norm)
        self.conv = conv3x3x3(in_channels, out_channels, convolution, time_padding)
        self.linear = CausalConv(in_channels, out_channels, (1, 1, 1))

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """(B, in, T, H, W) -> (B, out, T, H, W)."""
        return self.linear(x, state) + self.conv(F.silu(self.norm(x)), state)


class FrameAttention(nn.Module):
    """Single-head self-attention among the pixels of each frame by itself."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, norm)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        batch, _, _, height, _ = x.shape
        pixels = rearrange(self.norm(x), "b c t h w -> (b t) 1 (h w) c")
        out = self.out(F.scaled_dot_product_attention(*self.qkv(pixels).chunk(3, dim=-1)))
        return x + rearrange(out, "(b t) 1 (h w) c -> b c t h w", b=batch, h=height)


class SpatialDown(nn.Module):
    """Halves height and width with a strided 1 x 3 x 3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv(channels, channels, (1, 3, 3), stride=(1, 2, 2))

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, H/2, W/2)."""
        return self.conv(x, state)


class SpatialUp(nn.Module):
    """Doubles height and width: a product to 4 C in each pixel, then depth to space."""

    copies = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv(channels, 4 * channels, (1, 1, 1))

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, 2H, 2W)."""
        return depth_to_space(self.conv(x, state), 2)


class TemporalDown(nn.Module):
    """Halves the frames with a strided 3 x 1 x 1 causal convolution: 2k + 1 frames become k + 1."""

    def __init__(self, channels: int, time_padding: TimePadding) -> None:
        super().__init__()
        self.conv = CausalConv(channels, channels, (3, 1, 1), stride=(2, 1, 1), time_padding=time_padding)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """(B, C, 2k+1, H, W) -> (B, C, k+1, H, W); later chunks of a stream: 2k frames -> k."""
        return self.conv(x, state)


class TemporalUp(nn.Module):
    """Doubles the frames: a 3 x 1 x 1 causal convolution to 2 C, then depth to time, less the clip's first.

    The first latent frame stands for one frame and every later one for two, so k + 1 become 2k + 1.
    """

    copies = 2

    def __init__(self, channels: int, time_padding: TimePadding) -> None:
        super().__init__()
        self.conv = CausalConv(channels, 2 * channels, (3, 1, 1), time_padding=time_padding)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """(B, C, k+1, H, W) -> (B, C, 2k+1, H, W); later chunks of a stream: k frames -> 2k."""
        starts_clip = state is None or self.conv not in state
        out = rearrange(self.conv(x, state), "b (r c) t h w -> b c (t r) h w", r=2)
        return out[:, :, 1:] if starts_clip else out


def space_to_depth(x: Tensor, factor: int) -> Tensor:
    """(B, C, T, H f, W f) -> (B, f f C, T, H, W): each f x f patch becomes one pixel."""
    return rearrange(x, "b c t (h p) (w q) -> b (p q c) t h w", p=factor, q=factor)


def depth_to_space(x: Tensor, factor: int) -> Tensor:
    """(B, f f C, T, H, W) -> (B, C, T, H f, W f): the inverse of `space_to_depth`."""
    return rearrange(x, "b (p q c) t h w -> b c t (h p) (w q)", p=factor, q=factor)

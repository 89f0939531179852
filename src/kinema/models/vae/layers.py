"""Layers of the causal VAE: a frame sees itself and earlier frames only, in one clip or streamed in chunks.

Every layer is called as `layer(x, state)` with x (B, C, T, H, W). `state=None` means that x is a whole clip;
a `StreamState` means that x continues the frames which earlier calls with the same state have seen; a `Slab` that x is
a part of a clip whose other parts are held by other workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kinema.models.vae.slabs import HEIGHT, TIME, WIDTH, Slab


class Convolution(Enum):
    """How a 3 x 3 x 3 neighbourhood is covered."""

    full = "full"
    """One 3 x 3 x 3 convolution: most expressive, 27 weights a channel pair."""
    factorised = "factorised"
    """1 x 3 x 3 in space, then 3 x 1 x 1 in time (Cosmos Tokenizer): 12 weights a channel pair."""
    alternating = "alternating"
    """A residual block's first convolution is 1 x 3 x 3 and its second 3 x 1 x 1: 12 weights for the two."""


class Norm(Enum):
    """What is normalised together. All but `group` stay within one frame, so that nothing looks ahead in time."""

    layer = "layer"
    """LayerNorm over the channels of one pixel; the fastest on a CPU, where PyTorch has a fused kernel for it."""
    rms = "rms"
    """RMSNorm over the channels of one pixel, without a mean."""
    length = "length"
    """The channels of one pixel scaled to the length sqrt(C), times a gain (Wan 2.1): RMSNorm without an epsilon."""
    pixel = "pixel"
    """RMSNorm without a gain (LTX-2; Karras et al. 2018, Progressive Growing of GANs, section 4.2)."""
    group_frame = "group_frame"
    """GroupNorm over the channels of a group and the pixels of one frame."""
    group = "group"
    """GroupNorm over the whole clip (HunyuanVideo). NOT causal: a frame changes with those after it, and an image
    is not the first frame of a video. Cannot be streamed or tiled."""


class TimePadding(Enum):
    """What stands before the first frame."""

    first = "first"
    """The first frame repeated: a single image is a clip that stands still."""
    zeros = "zeros"


class SpacePadding(Enum):
    """What stands around a frame."""

    zeros = "zeros"
    replicate = "replicate"
    """The border pixel repeated."""
    reflect = "reflect"
    """The picture mirrored at its border pixels; needs two pixels a side."""


class StreamState(dict[nn.Module, Tensor]):
    """What a stream has seen: for each causal layer the past frames that its next output needs.

    Keyed by layer and not by order of calls. It belongs to one stream of one model; start a new one for
    each video.
    """


State = StreamState | Slab | None
"""What lies beside the frames that a layer is given."""


def slab_of(state: State) -> Slab | None:
    """The slab that a layer works on, if the clip is cut."""
    return None if isinstance(state, StreamState) else state


def slab_in_time(state: State) -> Slab | None:
    """The slab, if the clip is cut along time."""
    slab = slab_of(state)
    return slab if slab is not None and slab.axis == TIME else None


def slab_in_space(state: State) -> Slab | None:
    """The slab, if the clip is cut along height or width."""
    slab = slab_of(state)
    return slab if slab is not None and slab.axis != TIME else None


def ends_clip(state: State, axis: int) -> bool:
    """Whether a layer sees the end of the clip along `axis`."""
    slab = slab_of(state)
    return slab is None or slab.axis != axis or slab.last


def starts_clip(layer: nn.Module, state: State) -> bool:
    """Whether a layer that keeps no frames sees the first ones of its clip now; a stream remembers that it did."""
    if not isinstance(state, StreamState):
        return (slab := slab_in_time(state)) is None or slab.first
    first = layer not in state
    state.setdefault(layer, torch.empty(0))
    return first


def group_means(x: Tensor, groups: int) -> Tensor:
    """(B, C, ...) -> (B, groups, ...): means of neighbouring channels.

    Added one by one, because the order in which `mean` adds depends on the strides, and with it the last bits.
    """
    members = x.unflatten(1, (groups, -1)).unbind(2)
    return sum(members[1:], members[0]) / len(members)


def together(parts: Sequence[Tensor]) -> Tensor:
    """Frames (B, C, T, H, W) one after the other, copied; channels last, which a cut along T else ceases to be."""
    return torch.cat([part.movedim(1, -1) for part in parts], dim=1).movedim(-1, 1)


def activated(normed: Tensor) -> Tensor:
    """SiLU; in place where no backward will ask for what it was."""
    return F.silu(normed, inplace=not torch.is_grad_enabled())


def convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """F.conv2d or F.conv3d, x (B, C, [T,] H, W).

    On a CPU by oneDNN whatever the size. PyTorch takes another kernel for small inputs, among them every first layer
    with its three channels: a third of the speed, and it leaves channels first.
    """
    has_onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    in_float32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if has_onednn and in_float32 and x.device.type == "cpu":
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, [1] * len(stride), 1)
    return (F.conv2d if x.ndim == 4 else F.conv3d)(x, weight, bias, stride, padding)


class CausalConv(nn.Module):
    """3D convolution padded in front of the first frame only; kernel and stride are (time, height, width).

    `causal=False` pads both ends of the clip with as many frames instead; such a layer cannot be streamed.
    `time_padding=None` puts nothing before the first frame, `space_padding=None` nothing around frames.
    `frame_by_frame` takes the frames of a flat kernel one at a time, so that their number changes no bit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int],
        stride: tuple[int, int, int] = (1, 1, 1),
        time_padding: TimePadding | None = TimePadding.first,
        space_padding: SpacePadding | None = SpacePadding.zeros,
        causal: bool = True,
        frame_by_frame: bool = False,
    ) -> None:
        super().__init__()
        self.past_frames = kernel[0] - 1 if causal else kernel[0] // 2
        self.future_frames = kernel[0] - 1 - self.past_frames
        self.time_stride = stride[0]
        self.time_padding = time_padding
        self.space_padding = space_padding
        self.frame_by_frame = frame_by_frame
        self.border = (kernel[1] // 2, kernel[2] // 2) if space_padding else (0, 0)
        padding = (0, *self.border) if space_padding is SpacePadding.zeros else 0
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, padding)

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, C, T, H, W) -> (B, out, ceil(T / stride), ..), the outputs that the frames so far complete."""
        if (slab := slab_in_space(state)) is not None:
            x = self._widened_in_space(x, slab)
        if self.past_frames == 0 and self.time_stride == 1:
            return self._convolve(x, slab)
        x = self._lengthened(x, state)
        out = self._convolve(x, slab)
        if isinstance(state, StreamState):
            state[self] = together([x[:, :, out.shape[2] * self.time_stride :]])  # a view would keep the chunk alive
        return out

    def _lengthened(self, x: Tensor, state: State) -> Tensor:
        """x between the frames before and behind it: padding, those of the stream, or those of other slabs."""
        slab = slab_in_time(state)
        past, future = [], []
        if isinstance(state, StreamState):
            assert self.future_frames == 0, "a layer that looks ahead cannot be streamed"
            past = [state[self]] if self in state else []
        if not past and (slab is None or slab.first):
            past = [self._beside(x[:, :, :1], self.past_frames if self.time_padding else 0)]
        if self.future_frames and (slab is None or slab.last):
            future = [self._beside(x[:, :, -1:], self.future_frames)]
        x = together([*past, x, *future]) if past or future else x
        # Padded before it is widened: of a first slab of one frame the next one needs padding too.
        return x if slab is None else slab.widen(x, self.past_frames - self.time_stride + 1, self.future_frames)

    def _widened_in_space(self, x: Tensor, slab: Slab) -> Tensor:
        """x with the rows or columns of its neighbours, and padded where the clip begins and ends."""
        side = slab.axis - HEIGHT
        border, kernel, stride = self.border[side], self.conv.kernel_size[1 + side], self.conv.stride[1 + side]
        x = slab.widen(x, border, kernel - stride - border)
        ends = (border if slab.first else 0, border if slab.last else 0)
        if self.space_padding is None or ends == (0, 0):
            return x
        mode = "constant" if self.space_padding is SpacePadding.zeros else self.space_padding.value
        return F.pad(x, (*ends, 0, 0, 0, 0) if slab.axis == WIDTH else (0, 0, *ends, 0, 0), mode=mode)

    def _convolve(self, x: Tensor, slab: Slab | None) -> Tensor:
        """The convolution in the form that runs fastest on a CPU; a conv3d of a flat kernel takes longer.

        `slab` is one in space, whose borders are padded already.
        """
        weight, bias = self.conv.weight, self.conv.bias
        time, height, width = self.conv.kernel_size
        rows, columns = (
            0 if slab is not None and slab.axis == axis else border
            for axis, border in zip((HEIGHT, WIDTH), self.border, strict=True)
        )
        around = (0, rows, columns) if self.space_padding is SpacePadding.zeros else (0, 0, 0)
        if self.space_padding not in (None, SpacePadding.zeros) and (rows or columns):
            x = F.pad(x, (columns, columns, rows, rows, 0, 0), mode=self.space_padding.value)
        if height == width == 1:  # one matrix product over the stacked frames
            count = (x.shape[2] - time) // self.time_stride + 1
            taps = [x[:, :, i : i + (count - 1) * self.time_stride + 1 : self.time_stride] for i in range(time)]
            pixels = [tap.movedim(1, -1) for tap in taps]
            stacked = torch.cat(pixels, dim=-1) if time > 1 else pixels[0]
            return F.linear(stacked, weight[..., 0, 0].transpose(1, 2).flatten(1), bias).movedim(-1, 1)
        if time == 1:  # frames are a batch of images
            frames = x.movedim(1, -1).flatten(0, 1).movedim(-1, 1)  # stays channels last where this copies
            images: Sequence[Tensor] = [frames]
            if self.frame_by_frame:  # and in one memory format, which a single frame else would not have
                images = frames.contiguous(memory_format=torch.channels_last).split(1)
            stride = self.conv.stride[1:]
            out = torch.cat([convolve(part, weight[:, :, 0], bias, stride, around[1:]) for part in images])
            return out.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        return convolve(x, weight, bias, self.conv.stride, around)

    def _beside(self, frame: Tensor, count: int) -> Tensor:
        frames = frame.expand(-1, -1, count, -1, -1)
        return frames if self.time_padding is TimePadding.first else torch.zeros_like(frames)


class CausalSequential(nn.Sequential):
    """Layers one after another, all with the same stream state."""

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, C, T, H, W) -> whatever the last layer returns."""
        for layer in self:
            x = layer(x, state)
        return x


class LengthNorm(nn.Module):
    """Vectors (..., C) scaled to the length sqrt(C), then a gain for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> the same shape; lengths are taken in float32 at least."""
        return F.normalize(_wide(x), dim=-1).to(x.dtype) * (len(self.weight) ** 0.5 * self.weight)


class PixelNorm(nn.Module):
    """Vectors (..., C) divided by their root mean square."""

    epsilon = 1e-8

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> the same shape; the mean is taken in float32 at least."""
        wide = _wide(x)
        return (wide / (wide.square().mean(-1, keepdim=True) + self.epsilon).sqrt()).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least; contiguous, because sums over other strides would add in another order."""
    return (x if x.dtype == torch.float64 else x.float()).contiguous()


class ChannelNorm(nn.Module):
    """A norm over the channels of each pixel by itself."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.norm: nn.Module
        if norm is Norm.length:
            self.norm = LengthNorm(channels)
        elif norm is Norm.pixel:
            self.norm = PixelNorm()
        else:
            self.norm = nn.LayerNorm(channels, eps=1e-6) if norm is Norm.layer else nn.RMSNorm(channels, eps=1e-6)

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class GroupNorm(nn.Module):
    """Normalises groups of channels over the pixels of each frame, or of all frames of the clip."""

    def __init__(self, channels: int, groups: int, over_time: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.over_time = over_time

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        slab = slab_of(state) if self.over_time else slab_in_space(state)
        normalise = self.norm if slab is None else partial(self._over_slabs, slab=slab)
        if self.over_time:
            return normalise(x)
        return normalise(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)

    def _over_slabs(self, x: Tensor, slab: Slab) -> Tensor:
        """(N, C, ...) -> the same shape, with the mean and variance of all slabs.

        Combined from those of each slab, so that nothing large cancels (Chan, Golub and LeVeque 1979).
        """
        groups, channels = self.norm.num_groups, self.norm.num_channels
        wide = x if x.dtype == torch.float64 else x.float()
        grouped = wide.unflatten(1, (groups, -1)).flatten(2)  # (N, groups, numbers)
        variance, mean = torch.var_mean(grouped, dim=2, correction=0)
        count = torch.full_like(mean, grouped.shape[2])
        counts, means, variances = slab.stack(torch.stack([count, mean, variance])).unbind(1)  # (slabs, N, groups)
        shares = counts / counts.sum(0)
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)

        def each_pixel(of_channel: Tensor) -> Tensor:
            return of_channel.view(*of_channel.shape, *[1] * (x.ndim - 2))

        scale = (variance + self.norm.eps).rsqrt().repeat_interleave(channels // groups, dim=1) * self.norm.weight
        shift = self.norm.bias - mean.repeat_interleave(channels // groups, dim=1) * scale
        return torch.addcmul(each_pixel(shift), wide, each_pixel(scale))


@dataclass(frozen=True)
class LayerChoices:
    """What all layers of an encoder, or of a decoder, have in common; and how such a layer is made."""

    convolution: Convolution
    norm: Norm
    norm_groups: int
    time_padding: TimePadding | None
    space_padding: SpacePadding
    causal: bool

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int],
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> CausalConv:
        """A convolution padded as chosen."""
        paddings = (self.time_padding, self.space_padding, self.causal)
        return CausalConv(in_channels, out_channels, kernel, stride, *paddings)

    def conv3x3x3(self, in_channels: int, out_channels: int) -> nn.Module:
        """One convolution over a 3 x 3 x 3 neighbourhood, whole or factorised."""
        if self.convolution is Convolution.full:
            return self.conv(in_channels, out_channels, (3, 3, 3))
        return CausalSequential(
            self.conv(in_channels, out_channels, (1, 3, 3)), self.conv(out_channels, out_channels, (3, 1, 1))
        )

    def normalise(self, channels: int) -> nn.Module:
        """The norm of so many channels."""
        if self.norm in (Norm.group, Norm.group_frame):
            return GroupNorm(channels, self.norm_groups, over_time=self.norm is Norm.group)
        return ChannelNorm(channels, self.norm)


class ResBlock(nn.Module):
    """Pre-activation residual block: norm, SiLU, convolution, twice."""

    def __init__(self, in_channels: int, out_channels: int, choices: LayerChoices) -> None:
        super().__init__()
        self.norm1 = choices.normalise(in_channels)
        self.norm2 = choices.normalise(out_channels)
        self.conv1: nn.Module
        self.conv2: nn.Module
        if choices.convolution is Convolution.alternating:
            self.conv1 = choices.conv(in_channels, out_channels, (1, 3, 3))
            self.conv2 = choices.conv(out_channels, out_channels, (3, 1, 1))
        else:
            self.conv1 = choices.conv3x3x3(in_channels, out_channels)
            self.conv2 = choices.conv3x3x3(out_channels, out_channels)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else CausalConv(in_channels, out_channels, (1, 1, 1))

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, in, T, H, W) -> (B, out, T, H, W)."""
        out = self.conv1(activated(self.norm1(x, state)), state)
        out = self.conv2(activated(self.norm2(out, state)), state)
        return self.shortcut(x) + out


class FrameAttention(nn.Module):
    """Single-head self-attention among the pixels of each frame by itself."""

    def __init__(self, channels: int, choices: LayerChoices) -> None:
        super().__init__()
        self.norm = choices.normalise(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        batch, _, _, height, _ = x.shape
        pixels = rearrange(self.norm(x, state), "b c t h w -> (b t) 1 (h w) c")
        query, seen = self.qkv(pixels).tensor_split([x.shape[1]], dim=-1)
        seen = seen if (slab := slab_in_space(state)) is None else slab.gather(seen, 2)
        out = self.out(F.scaled_dot_product_attention(query, *seen.chunk(2, dim=-1)))
        return x + rearrange(out, "(b t) 1 (h w) c -> b c t h w", b=batch, h=height)


class CausalAttention(FrameAttention):
    """Single-head self-attention of each frame's pixels to those of its own and all earlier frames.

    Frame by frame instead of under one mask: half the products, no mask, and the same bits however a clip is cut.
    A stream keeps the keys and values of all frames that it has seen.
    """

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        height, slab = x.shape[3], slab_of(state)
        frames = rearrange(self.norm(x, state), "b c t h w -> t b 1 (h w) c")
        query, new = torch.stack([self.qkv(frame) for frame in frames]).tensor_split([x.shape[1]], dim=-1)
        new = new if slab is None else slab.gather(new, 0 if slab.axis == TIME else 3)
        pixels, earlier = new.shape[3], 0
        seen = rearrange(new, "t b one n c -> b one (t n) c")
        if isinstance(state, StreamState) and self in state:
            earlier = state[self].shape[2] // pixels
            seen = torch.cat([state[self], seen], dim=2)
        if isinstance(state, StreamState):
            state[self] = seen
        if (in_time := slab_in_time(state)) is not None:
            earlier = in_time.start
        ends = [pixels * (earlier + 1 + i) for i in range(len(frames))]
        out = [
            self.out(F.scaled_dot_product_attention(q, *seen[:, :, :end].chunk(2, dim=-1)))
            for q, end in zip(query, ends, strict=True)
        ]
        return x + rearrange(torch.stack(out), "t b 1 (h w) c -> b c t h w", h=height)


class Output(nn.Module):
    """Norm, SiLU and the last convolution; optionally beside a linear path for the amplitude that the norm removes,
    or beside the input's channels themselves, averaged in groups (HunyuanVideo-1.5).
    """

    def __init__(
        self, in_channels: int, out_channels: int, choices: LayerChoices, linear: bool, grouped: bool = False
    ) -> None:
        super().__init__()
        self.norm = choices.normalise(in_channels)
        self.conv = choices.conv3x3x3(in_channels, out_channels)
        self.linear = CausalConv(in_channels, out_channels, (1, 1, 1)) if linear else None
        self.groups = out_channels if grouped else None

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, in, T, H, W) -> (B, out, T, H, W)."""
        out = self.conv(activated(self.norm(x, state)), state)
        if self.groups is not None:
            out = out + group_means(x, self.groups)
        return out if self.linear is None else self.linear(x, state) + out


class RepeatedInput(nn.Module):
    """A convolution of the latents beside the latents themselves, each channel repeated (HunyuanVideo-1.5)."""

    def __init__(self, in_channels: int, out_channels: int, choices: LayerChoices) -> None:
        super().__init__()
        self.conv = choices.conv3x3x3(in_channels, out_channels)
        self.repeats = out_channels // in_channels

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, in, T, H, W) -> (B, out, T, H, W)."""
        return self.conv(x, state) + x.repeat_interleave(self.repeats, dim=1)

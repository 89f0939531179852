"""Steps between two levels of the VAE: half or twice the frames, the sides, or both.

Frame 0 of a clip has no partner in time: k + 1 latent frames stand for 2k + 1 frames. The kinds of steps differ most
in what they do with it.
"""

from dataclasses import replace
from enum import Enum

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from kinema.models.vae.layers import (
    CausalConv,
    CausalSequential,
    LayerChoices,
    State,
    ends_clip,
    group_means,
    starts_clip,
)
from kinema.models.vae.slabs import HEIGHT, WIDTH


class Halving(Enum):
    """What a step halves on the way to the latents, and doubles on the way back."""

    space = "space"
    time = "time"
    both = "both"

    @property
    def factors(self) -> tuple[int, int]:
        """(frames, sides) of one pixel behind the step."""
        return (1 if self is Halving.space else 2), (1 if self is Halving.time else 2)


class Resampling(Enum):
    """How a step between two levels is computed. Down / up:"""

    separate = "separate"
    """Strided 1 x 3 x 3, then strided 3 x 1 x 1 / 3 x 1 x 1 to 2 C, then 1 x 1 x 1 to 4 C, rearranged."""
    first_alone = "first_alone"
    """The same down, but frame 0 passes the steps in time unchanged / after time, each pixel repeated, then 1 x 3 x 3
    (Wan 2.1)."""
    joint = "joint"
    """One strided 3 x 3 x 3 / frames and pixels repeated, then 3 x 3 x 3 (HunyuanVideo)."""
    packed_repeat = "packed_repeat"
    """3 x 3 x 3 and pixels to channels, beside the mean of the packed pixels / the way back, beside copies; frame 0
    is its own partner (LTX-2; as DC-AE, Chen et al. 2024, section 3.2)."""
    packed_alone = "packed_alone"
    """The same, but frame 0 is packed in space only (HunyuanVideo-1.5)."""

    @property
    def changes_channels(self) -> bool:
        """Whether the step itself goes on to the next level's width."""
        return self in (Resampling.packed_repeat, Resampling.packed_alone)


def down(
    kind: Resampling, halving: Halving, in_channels: int, out_channels: int, choices: LayerChoices
) -> list[nn.Module]:
    """The layers of one step towards the latents."""
    if kind is Resampling.joint:
        return [JointDown(in_channels, halving, choices)]
    if kind.changes_channels:
        return [PackedDown(in_channels, out_channels, halving, kind, choices)]
    alone, (time, space) = kind is Resampling.first_alone, halving.factors
    layers: list[nn.Module] = []
    if space > 1:
        layers += [CornerDown(in_channels) if alone else SpatialDown(in_channels, choices)]
    if time > 1:
        layers += [FirstAloneDown(in_channels, choices) if alone else TemporalDown(in_channels, choices)]
    return layers


def up(
    kind: Resampling, halving: Halving, in_channels: int, out_channels: int, choices: LayerChoices, shortcut: bool
) -> list[nn.Module]:
    """The layers of one step away from the latents; `shortcut` is for packed ones."""
    if kind is Resampling.joint:
        return [JointUp(in_channels, out_channels, halving, choices)]
    if kind.changes_channels:
        return [PackedUp(in_channels, out_channels, halving, kind, choices, shortcut)]
    alone, (time, space) = kind is Resampling.first_alone, halving.factors
    layers: list[nn.Module] = []
    if time > 1:
        layers += [FirstAloneUp(in_channels, choices) if alone else TemporalUp(in_channels, choices)]
    if space > 1:
        layers += [NearestUp(in_channels, out_channels, choices) if alone else SpatialUp(in_channels)]
    return layers


class SpatialDown(nn.Module):
    """Halves height and width with a strided 1 x 3 x 3 convolution, its windows centred on every second pixel."""

    def __init__(self, channels: int, choices: LayerChoices) -> None:
        super().__init__()
        self.conv = choices.conv(channels, channels, (1, 3, 3), stride=(1, 2, 2))

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, H/2, W/2)."""
        return self.conv(x, state)


class CornerDown(nn.Module):
    """Halves height and width with a strided 1 x 3 x 3 convolution, its windows beginning at every second pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv(channels, channels, (1, 3, 3), stride=(1, 2, 2), space_padding=None, frame_by_frame=True)

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, H/2, W/2); zeros below and to the right."""
        right, below = (int(ends_clip(state, axis)) for axis in (WIDTH, HEIGHT))
        return self.conv(F.pad(x, (0, right, 0, below)), state)


class TemporalDown(nn.Module):
    """Halves the frames with a strided 3 x 1 x 1 causal convolution: 2k + 1 frames become k + 1."""

    def __init__(self, channels: int, choices: LayerChoices) -> None:
        super().__init__()
        self.conv = choices.conv(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, C, 2k+1, H, W) -> (B, C, k+1, H, W); later chunks of a stream: 2k frames -> k."""
        return self.conv(x, state)


class FirstAloneDown(TemporalDown):
    """Halves the frames after frame 0, which stays: its convolution sees three frames of the clip, never padding."""

    def __init__(self, channels: int, choices: LayerChoices) -> None:
        super().__init__(channels, replace(choices, time_padding=None))

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, C, 2k+1, H, W) -> (B, C, k+1, H, W); later chunks of a stream: 2k frames -> k."""
        halved = self.conv(x, state)
        return torch.cat([x[:, :, :1], halved], dim=2) if starts_clip(self, state) else halved


class JointDown(nn.Module):
    """Halves frames, sides or both with one strided 3 x 3 x 3 causal convolution."""

    def __init__(self, channels: int, halving: Halving, choices: LayerChoices) -> None:
        super().__init__()
        time, space = halving.factors
        self.conv = choices.conv(channels, channels, (3, 3, 3), stride=(time, space, space))

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, C, T, H, W) -> (B, C, ceil(T/time), H/space, W/space)."""
        return self.conv(x, state)


class SpatialUp(nn.Module):
    """Doubles height and width: a product to 4 C in each pixel, then depth to space."""

    copies = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv(channels, 4 * channels, (1, 1, 1))

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, 2H, 2W)."""
        return depth_to_space(self.conv(x, state), 2)


class NearestUp(nn.Module):
    """Doubles height and width: each pixel four times, then a 1 x 3 x 3 convolution."""

    def __init__(self, in_channels: int, out_channels: int, choices: LayerChoices) -> None:
        super().__init__()
        self.conv = CausalConv(
            in_channels, out_channels, (1, 3, 3), space_padding=choices.space_padding, frame_by_frame=True
        )

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, in, T, H, W) -> (B, out, T, 2H, 2W)."""
        return self.conv(repeat(x, "b c t h w -> b c t (h 2) (w 2)"), state)


class TemporalUp(nn.Module):
    """Doubles the frames: a 3 x 1 x 1 causal convolution to 2 C, then depth to time, less the clip's first.

    The first latent frame stands for one frame and every later one for two, so k + 1 become 2k + 1.
    """

    copies = 2

    def __init__(self, channels: int, choices: LayerChoices) -> None:
        super().__init__()
        self.conv = choices.conv(channels, 2 * channels, (3, 1, 1))

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, C, k+1, H, W) -> (B, C, 2k+1, H, W); later chunks of a stream: k frames -> 2k."""
        first = starts_clip(self, state)
        out = rearrange(self.conv(x, state), "b (r c) t h w -> b c (t r) h w", r=2)
        return out[:, :, 1:] if first else out


class FirstAloneUp(TemporalUp):
    """Doubles the frames after frame 0, which stays and which the convolution of the others does not see."""

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, C, k+1, H, W) -> (B, C, 2k+1, H, W); later chunks of a stream: k frames -> 2k."""
        first, later = x.tensor_split([1 if starts_clip(self, state) else 0], dim=2)
        if later.shape[2] == 0:
            return first
        doubled = rearrange(self.conv(later, state), "b (r c) t h w -> b c (t r) h w", r=2)
        return torch.cat([first, doubled], dim=2)


class JointUp(nn.Module):
    """Doubles frames, sides or both: pixels repeated (frame 0 in space only), then a 3 x 3 x 3 causal convolution."""

    def __init__(self, in_channels: int, out_channels: int, halving: Halving, choices: LayerChoices) -> None:
        super().__init__()
        self.factors = halving.factors
        self.conv = choices.conv(in_channels, out_channels, (3, 3, 3))

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, in, T, H, W) -> (B, out, T time (less time - 1 at the clip's start), H space, W space)."""
        time, space = self.factors
        x = repeat(x, "b c t h w -> b c (t r) (h p) (w q)", r=time, p=space, q=space)
        return self.conv(x[:, :, time - 1 :] if starts_clip(self, state) else x, state)


class PackedDown(nn.Module):
    """A 3 x 3 x 3 convolution whose pixels become channels, beside the means of groups of the packed input."""

    def __init__(
        self, in_channels: int, out_channels: int, halving: Halving, kind: Resampling, choices: LayerChoices
    ) -> None:
        super().__init__()
        self.factors = time, space = halving.factors
        self.out_channels = out_channels
        self.alone = kind is Resampling.packed_alone
        self.conv = choices.conv3x3x3(in_channels, out_channels // (time * space**2))

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, in, T, H, W) -> (B, out, ceil(T/time), H/space, W/space)."""
        first = starts_clip(self, state) and self.factors[0] > 1
        if not self.alone:
            x = torch.cat([x[:, :, :1], x], dim=2) if first else x
            return pack(self.conv(x, state), self.factors) + group_means(pack(x, self.factors), self.out_channels)
        out = self.conv(x, state)
        heads, tails = zip(*(part.tensor_split([1 if first else 0], dim=2) for part in (out, x)), strict=True)
        later = pack_outer(tails[0], self.factors) + group_means(pack_outer(tails[1], self.factors), self.out_channels)
        if not first:
            return later
        in_space = (1, self.factors[1])
        means = group_means(pack_outer(heads[1], in_space), self.out_channels)
        return torch.cat([pack_outer(heads[0], in_space).repeat(1, 2, 1, 1, 1) + means, later], dim=2)


class PackedUp(nn.Module):
    """A 3 x 3 x 3 convolution whose channels become pixels, beside copies of the unpacked input or alone."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        halving: Halving,
        kind: Resampling,
        choices: LayerChoices,
        shortcut: bool,
    ) -> None:
        super().__init__()
        self.factors = time, space = halving.factors
        self.out_channels = out_channels
        self.alone = kind is Resampling.packed_alone
        self.shortcut = shortcut
        self.conv = choices.conv3x3x3(in_channels, out_channels * time * space**2)

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, in, T, H, W) -> (B, out, T time (less time - 1 at the clip's start), H space, W space)."""
        time, space = self.factors
        first = starts_clip(self, state) and time > 1
        out = self.conv(x, state)
        if not self.alone:
            whole = unpack(out, self.factors)
            if self.shortcut:
                copied = unpack(x, self.factors)
                whole = whole + copied.repeat(1, self.out_channels // copied.shape[1], 1, 1, 1)
            return whole[:, :, time - 1 :] if first else whole
        heads, tails = zip(*(part.tensor_split([1 if first else 0], dim=2) for part in (out, x)), strict=True)
        later = unpack_outer(tails[0], self.factors) + self._copies(unpack_outer(tails[1], self.factors))
        if not first:
            return later
        head = unpack_outer(heads[0], (1, space))[:, : self.out_channels]  # the other half stands for no frame
        return torch.cat([head + self._copies(unpack_outer(heads[1], (1, space))), later], dim=2)

    def _copies(self, unpacked: Tensor) -> Tensor:
        return unpacked.repeat_interleave(self.out_channels // unpacked.shape[1], dim=1)


class AveragingStage(CausalSequential):
    """A level and its step down, beside the means of groups of its packed input; zeros before frame 0 (Wan 2.2)."""

    def __init__(self, layers: list[nn.Module], out_channels: int, factors: tuple[int, int]) -> None:
        super().__init__(*layers)
        self.out_channels = out_channels
        self.factors = factors

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, in, T, H, W) -> (B, out, ceil(T/time), H/space, W/space)."""
        alone = starts_clip(self, state) and self.factors[0] > 1
        whole = torch.cat([torch.zeros_like(x[:, :, :1]), x], dim=2) if alone else x
        return super().forward(x, state) + group_means(pack(whole, self.factors), self.out_channels)


class CopyingStage(CausalSequential):
    """A level and its step up, beside copies of its unpacked input (Wan 2.2)."""

    def __init__(self, layers: list[nn.Module], out_channels: int, factors: tuple[int, int]) -> None:
        super().__init__(*layers)
        self.out_channels = out_channels
        self.factors = factors

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        """(B, in, T, H, W) -> (B, out, T time (less time - 1 at the clip's start), H space, W space)."""
        time, space = self.factors
        copies = unpack(x.repeat_interleave(self.out_channels * time * space**2 // x.shape[1], dim=1), self.factors)
        return super().forward(x, state) + (copies[:, :, time - 1 :] if starts_clip(self, state) else copies)


def pack(x: Tensor, factors: tuple[int, int]) -> Tensor:
    """(B, C, T r, H p, W p) -> (B, C r p p, T, H, W): the pixels of one channel stand together."""
    time, space = factors
    return rearrange(x, "b c (t r) (h p) (w q) -> b (c r p q) t h w", r=time, p=space, q=space)


def unpack(x: Tensor, factors: tuple[int, int]) -> Tensor:
    """The inverse of `pack`."""
    time, space = factors
    return rearrange(x, "b (c r p q) t h w -> b c (t r) (h p) (w q)", r=time, p=space, q=space)


def pack_outer(x: Tensor, factors: tuple[int, int]) -> Tensor:
    """(B, C, T r, H p, W p) -> (B, r p p C, T, H, W): the channels of one pixel stand together."""
    time, space = factors
    return rearrange(x, "b c (t r) (h p) (w q) -> b (r p q c) t h w", r=time, p=space, q=space)


def unpack_outer(x: Tensor, factors: tuple[int, int]) -> Tensor:
    """The inverse of `pack_outer`."""
    time, space = factors
    return rearrange(x, "b (r p q c) t h w -> b c (t r) (h p) (w q)", r=time, p=space, q=space)


def space_to_depth(x: Tensor, factor: int) -> Tensor:
    """(B, C, T, H f, W f) -> (B, f f C, T, H, W): each f x f patch becomes one pixel."""
    return pack_outer(x, (1, factor))


def depth_to_space(x: Tensor, factor: int) -> Tensor:
    """(B, f f C, T, H, W) -> (B, C, T, H f, W f): the inverse of `space_to_depth`."""
    return unpack_outer(x, (1, factor))

"""The causal 3D VAE: videos to normalised latents and back, whole or streamed."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kinema.models.vae.initialisation import initialise_decoder, initialise_encoder
from kinema.models.vae.layers import (
    CausalAttention,
    CausalConv,
    CausalSequential,
    Convolution,
    FrameAttention,
    LayerChoices,
    Norm,
    Output,
    RepeatedInput,
    ResBlock,
    SpacePadding,
    State,
    StreamState,
    TimePadding,
)
from kinema.models.vae.posterior import LOGVAR_RANGE, Posterior
from kinema.models.vae.resampling import (
    AveragingStage,
    CopyingStage,
    Halving,
    Resampling,
    depth_to_space,
    down,
    space_to_depth,
    up,
)
from kinema.models.vae.slabs import TIME, Slab


class Attention(Enum):
    """Whom a pixel of the smallest level attends to, where `mid_attention` is on."""

    frame = "frame"
    """The pixels of its own frame."""
    causal = "causal"
    """Those of its own and all earlier frames (HunyuanVideo). A stream then keeps keys and values of all of them."""


@dataclass
class VAEConfig:
    """Shape of the autoencoder. Defaults are sized for small clips on a CPU."""

    latent_channels: int = 8
    spatial_stride: int = 8
    """Pixels along each side of one latent pixel; a power of two, at least `pixel_patch`."""
    temporal_stride: int = 4
    """Frames of one latent frame after the first, which stands alone; a power of two."""
    pixel_patch: int = 4
    """Side of the squares that become one pixel before the first convolution (space to depth); 1 for none."""
    width: int = 64
    """Encoder channels at the first level."""
    decoder_width: int = 64
    """Decoder channels at the last level."""
    width_multipliers: list[int] = field(default_factory=lambda: [1, 2, 2])
    """Channels of each level as a multiple of the width. One level more than halvings: the spatial halvings
    (spatial_stride / pixel_patch) lie between the first levels, the temporal ones between the last."""
    num_res_blocks: int = 1
    """Residual blocks a level, encoder."""
    decoder_res_blocks: int = 1
    """Residual blocks a level, decoder."""
    mid_attention: bool = False
    """Attention at the smallest level, then a residual block. Makes tiled decoding approximate everywhere."""
    convolution: Convolution = Convolution.factorised
    norm: Norm = Norm.layer
    time_padding: TimePadding = TimePadding.first

    # What published autoencoders do differently; `kinema.interop` lists them.
    norm_groups: int = 32
    """Groups of channels, for the two group norms."""
    space_padding: SpacePadding = SpacePadding.zeros
    decoder_space_padding: SpacePadding | None = None
    """null: as the encoder."""
    decoder_causal: bool = True
    """Off: the decoder's convolutions see as many later frames as earlier ones (LTX-2). It cannot be streamed."""
    attention: Attention = Attention.frame
    mid_res_blocks: int = 0
    """Residual blocks before `mid_attention`."""
    down: Resampling = Resampling.separate
    up: Resampling = Resampling.separate
    up_shortcuts: bool = True
    """Off: nothing beside the convolutions of `up=packed_repeat` (LTX-2.3)."""
    stage_shortcuts: bool = False
    """Around each level and its step: means of the packed pixels on the way down, copies on the way up (Wan 2.2)."""
    up_halves_channels: bool = False
    """Steps up in space end with half their channels (Wan 2.1)."""
    halvings: list[Halving] = field(default_factory=list)
    """What each step of the encoder halves, from pixels to latents. Empty: as `width_multipliers` says."""
    decoder_halvings: list[Halving] = field(default_factory=list)
    """What the decoder's steps double, in the same order, from pixels to latents. Empty: as the encoder."""
    decoder_width_multipliers: list[int] = field(default_factory=list)
    """From pixels to latents. Empty: as `width_multipliers`."""
    res_blocks_by_level: list[int] = field(default_factory=list)
    """Instead of `num_res_blocks`: one number for each level, from pixels to latents."""
    decoder_res_blocks_by_level: list[int] = field(default_factory=list)
    """Instead of `decoder_res_blocks`: one number for each level, from pixels to latents."""
    latent_convolution: bool = False
    """1 x 1 x 1 convolutions behind the encoder and before the decoder."""
    latent_shortcut: bool = False
    """Means of groups of channels beside the encoder's last convolution, copies beside the decoder's first."""
    linear_output: bool = True
    """A linear path beside the last convolutions, for the amplitude which the norm removes."""
    shared_logvar: bool = False
    """One log-variance for all channels of a latent pixel (LTX-Video)."""
    clamp_output: bool = False
    """`decode` ends at [-1, 1]. The training pass does not: outside, it would have no gradient."""

    def __post_init__(self) -> None:
        for name in ("latent_channels", "width", "decoder_width", "num_res_blocks", "decoder_res_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"vae.{name}={getattr(self, name)} must be at least 1")
        for name in ("spatial_stride", "temporal_stride", "pixel_patch"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"vae.{name}={value} must be a power of two: 1, 2, 4, 8, ...")
        if self.pixel_patch > self.spatial_stride:
            raise ValueError(
                f"vae.pixel_patch={self.pixel_patch} must be at most "
                f"vae.spatial_stride={self.spatial_stride}, of which it is the first part"
            )
        if len(self.width_multipliers) != self.num_levels or min(self.width_multipliers) < 1:
            raise ValueError(
                f"vae.width_multipliers={self.width_multipliers} needs {self.num_levels} entries of at least "
                f"1: one more than the halvings left by vae.spatial_stride={self.spatial_stride}, "
                f"vae.pixel_patch={self.pixel_patch} and vae.temporal_stride={self.temporal_stride}"
            )
        self._check_halvings("halvings", self.encoder_halvings)
        self._check_halvings("decoder_halvings", self.decoder_halvings_or_encoder)
        self._check_levels()
        self._check_steps()
        self._check_divisible()

    @property
    def num_levels(self) -> int:
        """Levels of resolution of the encoder."""
        return 1 + len(self.encoder_halvings)

    @property
    def encoder_halvings(self) -> list[Halving]:
        """What lies between each two levels of the encoder, from pixels to latents."""
        if self.halvings:
            return self.halvings
        steps = max(self._spatial_halvings, self._temporal_halvings)
        space = [i < self._spatial_halvings for i in range(steps)]
        time = [i >= steps - self._temporal_halvings for i in range(steps)]
        kinds = {(True, True): Halving.both, (True, False): Halving.space, (False, True): Halving.time}
        return [kinds[both] for both in zip(space, time, strict=True)]

    @property
    def decoder_halvings_or_encoder(self) -> list[Halving]:
        """What lies between each two levels of the decoder, from pixels to latents."""
        return self.decoder_halvings or self.encoder_halvings

    def encoder_levels(self) -> list["Level"]:
        """From pixels to latents; each with the step behind it, towards the latents."""
        widths = [self.width * multiplier for multiplier in self.width_multipliers]
        blocks = self.res_blocks_by_level or [self.num_res_blocks] * len(widths)
        return _levels(widths, blocks, [*self.encoder_halvings, None])

    def decoder_levels(self) -> list["Level"]:
        """From latents to pixels; each with the step behind it, towards the pixels."""
        multipliers = self.decoder_width_multipliers or self.width_multipliers
        widths = [self.decoder_width * multiplier for multiplier in multipliers]
        blocks = self.decoder_res_blocks_by_level or [self.decoder_res_blocks] * len(widths)
        return _levels(widths[::-1], blocks[::-1], [*self.decoder_halvings_or_encoder[::-1], None])

    def encoder_choices(self) -> LayerChoices:
        """What the encoder's layers have in common."""
        return LayerChoices(
            self.convolution, self.norm, self.norm_groups, self.time_padding, self.space_padding, causal=True
        )

    def decoder_choices(self) -> LayerChoices:
        """What the decoder's layers have in common."""
        padding = self.decoder_space_padding or self.space_padding
        return replace(self.encoder_choices(), space_padding=padding, causal=self.decoder_causal)

    def encoder_looks_ahead(self) -> str | None:
        """Why a latent frame depends on later frames, or None: then the encoder is causal and can be streamed."""
        if self.norm is Norm.group:
            return "vae.norm=group takes its statistics over all frames of the clip"
        return None

    def decoder_looks_ahead(self) -> str | None:
        """Why a decoded frame depends on later latents, or None: then the decoder is causal and can be streamed."""
        if not self.decoder_causal:
            return "vae.decoder_causal=false lets every convolution see the next frame"
        return self.encoder_looks_ahead()

    def looks_ahead(self) -> dict[str, str]:
        """Why `encoder` or `decoder` is not causal; empty for a VAE that is."""
        reasons = {"encoder": self.encoder_looks_ahead(), "decoder": self.decoder_looks_ahead()}
        return {part: reason for part, reason in reasons.items() if reason is not None}

    def needs_whole_frames(self) -> str | None:
        """Why a tile of a frame has other values all over than the same place in the frame, or None."""
        if self.norm in (Norm.group, Norm.group_frame):
            return f"vae.norm={self.norm.value} takes its statistics over whole frames"
        return None

    @property
    def _spatial_halvings(self) -> int:
        return round(math.log2(self.spatial_stride // self.pixel_patch))

    @property
    def _temporal_halvings(self) -> int:
        return round(math.log2(self.temporal_stride))

    def _check_halvings(self, name: str, halvings: list[Halving]) -> None:
        counts = [sum(halving.factors[axis] > 1 for halving in halvings) for axis in (0, 1)]
        if counts != [self._temporal_halvings, self._spatial_halvings]:
            raise ValueError(
                f"vae.{name}={[halving.value for halving in halvings]} halves time {counts[0]} and space {counts[1]} "
                f"times, but vae.temporal_stride={self.temporal_stride}, vae.spatial_stride={self.spatial_stride} "
                f"and vae.pixel_patch={self.pixel_patch} need {self._temporal_halvings} and {self._spatial_halvings}"
            )

    def _check_levels(self) -> None:
        decoder_levels = 1 + len(self.decoder_halvings_or_encoder)
        for name, count in (
            ("decoder_width_multipliers", decoder_levels),
            ("res_blocks_by_level", self.num_levels),
            ("decoder_res_blocks_by_level", decoder_levels),
        ):
            values = getattr(self, name)
            if values and (len(values) != count or min(values) < 1):
                raise ValueError(f"vae.{name}={values} needs {count} entries of at least 1, or none")
        if not self.decoder_width_multipliers and decoder_levels != self.num_levels:
            raise ValueError(
                f"vae.decoder_halvings gives the decoder {decoder_levels} levels and the encoder has "
                f"{self.num_levels}: set vae.decoder_width_multipliers to {decoder_levels} entries"
            )

    def _check_steps(self) -> None:
        if self.up_halves_channels and self.up not in (Resampling.first_alone, Resampling.joint):
            raise ValueError(
                f"vae.up_halves_channels=true has no place in vae.up={self.up.value}; use first_alone or joint"
            )
        if not self.up_shortcuts and self.up is not Resampling.packed_repeat:
            raise ValueError(f"vae.up_shortcuts=false has no place in vae.up={self.up.value}; use packed_repeat")
        if self.stage_shortcuts and (self.down.changes_channels or self.up.changes_channels):
            raise ValueError(
                f"vae.stage_shortcuts=true beside vae.down={self.down.value}, vae.up={self.up.value}: packed steps "
                "have shortcuts of their own; choose one of the two"
            )
        if self.latent_shortcut and self.shared_logvar:
            raise ValueError("vae.latent_shortcut=true needs vae.shared_logvar=false: it has a mean for each output")

    def _check_divisible(self) -> None:
        """Channels that are split into groups, or repeated, come out even."""
        encoder, decoder = self.encoder_levels(), self.decoder_levels()
        for level in encoder + decoder if self.norm in (Norm.group, Norm.group_frame) else []:
            _divides("norm_groups", self.norm_groups, level.width)
        for level in encoder if self.down.changes_channels else []:
            packed = math.prod((*level.step.factors, level.step.factors[1])) if level.step else 1
            _divides("width_multipliers", level.next_width, level.width * packed)
            _divides("width_multipliers", packed, level.next_width)
        for level in decoder if self.up.changes_channels and self.up_shortcuts else []:
            packed = math.prod((*level.step.factors, level.step.factors[1])) if level.step else 1
            _divides("decoder_width", packed, level.width)
            _divides("decoder_width", level.width, level.next_width * packed)
        if self.latent_shortcut:
            _divides("latent_channels", 2 * self.latent_channels, encoder[-1].width)
            _divides("latent_channels", self.latent_channels, decoder[0].width)


def _divides(name: str, part: int, whole: int) -> None:
    if whole % part:
        raise ValueError(f"vae.{name}: {part} channels or groups must divide {whole}; choose widths that they divide")


class Level(NamedTuple):
    """One resolution: its channels, its residual blocks, and the step behind it to the next level."""

    width: int
    res_blocks: int
    step: Halving | None
    next_width: int


def _levels(widths: list[int], blocks: list[int], steps: Sequence[Halving | None]) -> list[Level]:
    return [Level(*level) for level in zip(widths, blocks, steps, [*widths[1:], widths[-1]], strict=True)]


def _res_blocks(choices: LayerChoices, in_channels: int, out_channels: int, count: int) -> list[nn.Module]:
    widths = [in_channels] + [out_channels] * count
    return [ResBlock(a, b, choices) for a, b in pairwise(widths)]


def _middle(config: VAEConfig, choices: LayerChoices, channels: int) -> list[nn.Module]:
    before = _res_blocks(choices, channels, channels, config.mid_res_blocks)
    if not config.mid_attention:
        return before
    attention = CausalAttention if config.attention is Attention.causal else FrameAttention
    return [*before, attention(channels, choices), *_res_blocks(choices, channels, channels, 1)]


class Encoder(CausalSequential):
    """Pixels (after space to depth) to the latents' mean and log-variance; levels of residual blocks."""

    def __init__(self, config: VAEConfig) -> None:
        choices, levels = config.encoder_choices(), config.encoder_levels()
        previous = levels[0].width
        layers: list[nn.Module] = [choices.conv3x3x3(3 * config.pixel_patch**2, previous)]
        for level in levels:
            stage = _res_blocks(choices, previous, level.width, level.res_blocks)
            previous = level.width
            if level.step:
                previous = level.next_width if config.down.changes_channels else level.width
                stage += down(config.down, level.step, level.width, previous, choices)
            factors = level.step.factors if level.step else (1, 1)
            layers += [AveragingStage(stage, previous, factors)] if config.stage_shortcuts else stage
        super().__init__(*layers, *_middle(config, choices, previous))
        outputs = config.latent_channels + (1 if config.shared_logvar else config.latent_channels)
        self.output = Output(previous, outputs, choices, config.linear_output, grouped=config.latent_shortcut)
        if config.latent_convolution:
            self.latent_convolution = CausalConv(outputs, outputs, (1, 1, 1))


class Decoder(CausalSequential):
    """Latents to pixels (before depth to space): the encoder's levels backwards."""

    def __init__(self, config: VAEConfig) -> None:
        choices, levels, channels = config.decoder_choices(), config.decoder_levels(), config.latent_channels
        previous = levels[0].width
        layers: list[nn.Module] = [CausalConv(channels, channels, (1, 1, 1))] if config.latent_convolution else []
        repeated = RepeatedInput(channels, previous, choices) if config.latent_shortcut else None
        layers += [repeated or choices.conv3x3x3(channels, previous), *_middle(config, choices, previous)]
        for level in levels:
            stage = _res_blocks(choices, previous, level.width, level.res_blocks)
            previous = level.width
            if level.step:
                previous = self._behind(config, level)
                stage += up(config.up, level.step, level.width, previous, choices, config.up_shortcuts)
            if config.stage_shortcuts and level.step:
                stage = [CopyingStage(stage, previous, level.step.factors)]
            layers += stage
        super().__init__(*layers)
        self.output = Output(previous, 3 * config.pixel_patch**2, choices, config.linear_output)

    @staticmethod
    def _behind(config: VAEConfig, level: Level) -> int:
        """Channels behind a level's step."""
        if config.up.changes_channels:
            return level.next_width
        return level.width // 2 if config.up_halves_channels else level.width


class CausalVAE(nn.Module):
    """Causal 3D autoencoder: frame 1 alone, then each `temporal_stride` frames, become one latent frame.

    A latent frame depends on its own and earlier frames only, and a decoded frame on its own and earlier
    latent frames, so a video can be encoded and decoded in chunks of any plan with the same result. Two choices of
    published models break this; `VAEConfig.encoder_looks_ahead` and `.decoder_looks_ahead` say so, and streaming
    is then refused.
    Latents are normalised with the buffers `latent_mean` and `latent_std`, which live with the weights:
    `encode` applies them, `decode` takes them back, and no one else may.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        initialise_encoder(self.encoder, self.encoder.output, config.pixel_patch, config.latent_channels)
        initialise_decoder(self.decoder, self.decoder.output, config.pixel_patch)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    @property
    def geometry_strides(self) -> tuple[int, int]:
        """(temporal, spatial): frames and pixels along a side of one latent pixel."""
        return self.config.temporal_stride, self.config.spatial_stride

    def forward(self, video: Tensor, noise: Tensor, slab: Slab | None = None) -> tuple[Tensor, Posterior]:
        """The training pass: video (B, 3, T, H, W) -> reconstruction of that shape and the posterior.

        noise is standard normal of the latents' shape (B, C, t, h, w). The posterior is the one before
        normalisation, so training does not depend on the latent statistics. With a `slab` all four are the part
        of the clip that `Cut` gives to this worker; so too in `encode` and `decode`.
        """
        posterior = self.encode_unnormalised(video, slab)
        return self._to_pixels(posterior.sample(noise), slab), posterior

    def encode(self, video: Tensor, slab: Slab | None = None) -> Posterior:
        """Video (B, 3, k * temporal_stride + 1, H, W) in [-1, 1] -> normalised posterior (B, C, k+1, ..)."""
        return self._normalise(self.encode_unnormalised(video, slab))

    def decode(self, latents: Tensor, slab: Slab | None = None) -> Tensor:
        """Normalised latents (B, C, k+1, h, w) -> video (B, 3, k * temporal_stride + 1, H, W).

        Not clamped, unless `clamp_output` says so.
        """
        self._check_latents(latents)
        return self._clamp(self._to_pixels(self._denormalise(latents), slab))

    def encode_chunks(self, chunks: Iterable[Tensor], state: StreamState | None = None) -> Iterator[Posterior]:
        """Video in chunks along T -> the posterior of each; together equal to `encode` of the whole.

        The first chunk has k * temporal_stride + 1 frames, later ones k * temporal_stride. Pass a state to go
        on with a stream in a later call. ValueError where the encoder looks ahead.
        """
        _refuse_streaming(self.config.encoder_looks_ahead(), "encode")
        state = StreamState() if state is None else state
        for chunk in chunks:
            self._check_video(chunk, starts_clip=not state)
            yield self._normalise(self._to_posterior(chunk, state))

    def decode_chunks(self, chunks: Iterable[Tensor], state: StreamState | None = None) -> Iterator[Tensor]:
        """Normalised latents in chunks of any length -> the video of each; together equal to `decode`.

        ValueError where the decoder looks ahead.
        """
        _refuse_streaming(self.config.decoder_looks_ahead(), "decode")
        state = StreamState() if state is None else state
        for chunk in chunks:
            self._check_latents(chunk)
            yield self._clamp(self._to_pixels(self._denormalise(chunk), state))

    def encode_unnormalised(self, video: Tensor, slab: Slab | None = None) -> Posterior:
        """As `encode`, before the latent statistics: what they are measured on and the losses work with."""
        self._check_video(video, starts_clip=slab is None or slab.axis != TIME or slab.first)
        return self._to_posterior(video, slab)

    def all_blocks(self) -> list[nn.Module]:
        """The layers that a clip goes through one after the other: residual blocks, attention, and steps of levels."""
        return [block for part in (self.encoder, self.decoder) for layer in part for block in _parts_of(layer)]

    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Sets the normalisation, per channel (C,), measured on latents before normalisation."""
        if mean.shape != self.latent_mean.shape or std.shape != self.latent_std.shape:
            raise ValueError(
                f"latent statistics have shapes {tuple(mean.shape)} and {tuple(std.shape)}, but "
                f"vae.latent_channels={self.config.latent_channels} needs ({self.config.latent_channels},)"
            )
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            raise ValueError(
                f"latent statistics must be finite with std > 0 (0 is a dead latent channel), not mean "
                f"{mean.tolist()}, std {std.tolist()}"
            )
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of a clip's latents; refuses sizes that the strides do not divide."""
        self._check_size(frames, height, width, starts_clip=True)
        time, space = self.geometry_strides
        return self.config.latent_channels, (frames - 1) // time + 1, height // space, width // space

    def flops(self, frames: int, height: int, width: int) -> tuple[float, float]:
        """(encode, decode) operations of one clip of that many pixels; a multiply-add is 2; products only."""
        shape = self.latent_shape(frames, height, width)
        with torch.device("meta"), torch.no_grad():
            encoder, decoder = Encoder(self.config), Decoder(self.config)
            pixels = space_to_depth(torch.zeros(1, 3, frames, height, width), self.config.pixel_patch)
            with FlopCounterMode(display=False) as encode:
                encoder(pixels)
            with FlopCounterMode(display=False) as decode:
                decoder(torch.zeros(1, *shape))
        return float(encode.get_total_flops()), float(decode.get_total_flops())

    def _to_posterior(self, video: Tensor, state: State) -> Posterior:
        # Channels last: the norm over channels then has a fused CPU kernel and convolutions are as fast.
        pixels = space_to_depth(video, self.config.pixel_patch).contiguous(memory_format=torch.channels_last_3d)
        channels = self.config.latent_channels
        mean, logvar = self.encoder(pixels, state).tensor_split([channels], dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE).expand(-1, channels, -1, -1, -1))

    def _to_pixels(self, latents: Tensor, state: State) -> Tensor:
        latents = latents.contiguous(memory_format=torch.channels_last_3d)
        return depth_to_space(self.decoder(latents, state), self.config.pixel_patch)

    def _clamp(self, video: Tensor) -> Tensor:
        return video.clamp(-1, 1) if self.config.clamp_output else video

    def _normalise(self, posterior: Posterior) -> Posterior:
        mean, std = self._statistics()
        return Posterior((posterior.mean - mean) / std, posterior.logvar - 2 * std.log())

    def _denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics()
        return (latents * std + mean).to(latents.dtype)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        return self.latent_mean.view(-1, 1, 1, 1), self.latent_std.view(-1, 1, 1, 1)

    def _check_video(self, video: Tensor, starts_clip: bool) -> None:
        if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
            raise ValueError(
                f"the VAE encodes float videos (B, 3, T, H, W) in [-1, 1], not {video.dtype} {tuple(video.shape)}"
            )
        frames, height, width = video.shape[2:]
        self._check_size(frames, height, width, starts_clip)
        low, high = torch.stack([*torch.aminmax(video)]).tolist()
        if not (low >= -1.001 and high <= 1.001):  # NaN is neither
            raise ValueError(f"the VAE encodes pixels in [-1, 1], these lie in [{low:.3f}, {high:.3f}]")

    def _check_size(self, frames: int, height: int, width: int, starts_clip: bool) -> None:
        time, space = self.geometry_strides
        extra = 1 if starts_clip else 0
        if frames < 1 or (frames - extra) % time:
            below = (frames - extra) // time * time + extra
            legal = " or ".join(str(n) for n in (below, below + time) if n > 0)
            rule = f"k * {time} + 1 frames" if starts_clip else f"k * {time} frames after the first chunk"
            raise ValueError(f"frames={frames}: vae.temporal_stride={time} needs {rule}; use {legal}")
        for name, size in (("height", height), ("width", width)):
            if size < 1 or size % space:
                legal = " or ".join(str(n) for n in (size // space * space, (size // space + 1) * space) if n > 0)
                raise ValueError(f"{name}={size}: vae.spatial_stride={space} must divide it; use {legal}")

    def _check_latents(self, latents: Tensor) -> None:
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels or latents.shape[2] < 1:
            raise ValueError(
                f"the VAE decodes latents (B, C, t, h, w) with C = vae.latent_channels={channels}, t >= 1, "
                f"not {tuple(latents.shape)}"
            )


def _parts_of(layer: nn.Module) -> list[nn.Module]:
    """The layers of a whole level with its shortcut, or the layer itself."""
    return list(layer) if isinstance(layer, AveragingStage | CopyingStage) else [layer]


def _refuse_streaming(reason: str | None, verb: str) -> None:
    if reason is not None:
        raise ValueError(f"this VAE cannot {verb} in chunks: {reason}. Use {verb}() on the whole clip.")

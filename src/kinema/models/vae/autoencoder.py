"""The causal 3D VAE: videos to normalised latents and back, whole or streamed."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kinema.models.vae.initialisation import initialise_decoder, initialise_encoder
from kinema.models.vae.layers import (
    CausalSequential,
    Convolution,
    FrameAttention,
    Norm,
    Output,
    ResBlock,
    SpatialDown,
    SpatialUp,
    StreamState,
    TemporalDown,
    TemporalUp,
    TimePadding,
    conv3x3x3,
    depth_to_space,
    space_to_depth,
)
from kinema.models.vae.posterior import LOGVAR_RANGE, Posterior


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
    """Attention within each frame at the smallest level. Makes tiled decoding approximate everywhere."""
    convolution: Convolution = Convolution.factorised
    norm: Norm = Norm.layer
    time_padding: TimePadding = TimePadding.first

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

    @property
    def num_levels(self) -> int:
        """Levels of resolution."""
        return 1 + max(self._spatial_halvings, self._temporal_halvings)

    @property
    def _spatial_halvings(self) -> int:
        return round(math.log2(self.spatial_stride // self.pixel_patch))

    @property
    def _temporal_halvings(self) -> int:
        return round(math.log2(self.temporal_stride))

    def halvings(self) -> list[tuple[bool, bool]]:
        """Between each two levels, from pixels to latents: (halves space, halves time)."""
        steps = self.num_levels - 1
        return [(i < self._spatial_halvings, i >= steps - self._temporal_halvings) for i in range(steps)]


def _res_blocks(config: VAEConfig, in_channels: int, out_channels: int, count: int) -> list[nn.Module]:
    widths = [in_channels] + [out_channels] * count
    return [ResBlock(a, b, config.convolution, config.norm, config.time_padding) for a, b in pairwise(widths)]


def _middle(config: VAEConfig, channels: int) -> list[nn.Module]:
    if not config.mid_attention:
        return []
    return [FrameAttention(channels, config.norm), *_res_blocks(config, channels, channels, 1)]


class Encoder(CausalSequential):
    """Pixels (after space to depth) to the latents' mean and log-variance; levels of residual blocks."""

    def __init__(self, config: VAEConfig) -> None:
        widths = [config.width * multiplier for multiplier in config.width_multipliers]
        pixel_channels = 3 * config.pixel_patch**2
        layers: list[nn.Module] = [conv3x3x3(pixel_channels, widths[0], config.convolution, config.time_padding)]
        previous = widths[0]
        for width, halving in zip(widths, [*config.halvings(), (False, False)], strict=True):
            layers += _res_blocks(config, previous, width, config.num_res_blocks)
            halves_space, halves_time = halving
            layers += [SpatialDown(width)] if halves_space else []
            layers += [TemporalDown(width, config.time_padding)] if halves_time else []
            previous = width
        super().__init__(*layers, *_middle(config, previous))
        self.output = Output(previous, 2 * config.latent_channels, config.convolution, config.norm, config.time_padding)


class Decoder(CausalSequential):
    """Latents to pixels (before depth to space): the encoder's levels backwards."""

    def __init__(self, config: VAEConfig) -> None:
        widths = [config.decoder_width * multiplier for multiplier in reversed(config.width_multipliers)]
        layers: list[nn.Module] = [
            conv3x3x3(config.latent_channels, widths[0], config.convolution, config.time_padding)
        ]
        layers += _middle(config, widths[0])
        previous = widths[0]
        for width, halving in zip(widths, [(False, False), *reversed(config.halvings())], strict=True):
            halves_space, halves_time = halving
            layers += [TemporalUp(previous, config.time_padding)] if halves_time else []
            layers += [SpatialUp(previous)] if halves_space else []
            layers += _res_blocks(config, previous, width, config.decoder_res_blocks)
            previous = width
        super().__init__(*layers)
        self.output = Output(previous, 3 * config.pixel_patch**2, config.convolution, config.norm, config.time_padding)


class CausalVAE(nn.Module):
    """Causal 3D autoencoder: frame 1 alone, then each `temporal_stride` frames, become one latent frame.

    A latent frame depends on its own and earlier frames only, and a decoded frame on its own and earlier
    latent frames, so a video can be encoded and decoded in chunks of any plan with the same result.
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
        initialise_encoder(self.encoder, self.encoder.output, config.pixel_patch)
        initialise_decoder(self.decoder, self.decoder.output, config.pixel_patch)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    @property
    def geometry_strides(self) -> tuple[int, int]:
        """(temporal, spatial): frames and pixels along a side of one latent pixel."""
        return self.config.temporal_stride, self.config.spatial_stride

    def forward(self, video: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
        """The training pass: video (B, 3, T, H, W) -> reconstruction of that shape and the posterior.

        noise is standard normal of the latents' shape (B, C, t, h, w). The posterior is the one before
        normalisation, so training does not depend on the latent statistics.
        """
        posterior = self.encode_unnormalised(video)
        return self._to_pixels(posterior.sample(noise), None), posterior

    def encode(self, video: Tensor) -> Posterior:
        """Video (B, 3, k * temporal_stride + 1, H, W) in [-1, 1] -> normalised posterior (B, C, k+1, ..)."""
        return self._normalise(self.encode_unnormalised(video))

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, k+1, h, w) -> unclamped video (B, 3, k * temporal_stride + 1, H, W)."""
        self._check_latents(latents)
        return self._to_pixels(self._denormalise(latents), None)

    def encode_chunks(self, chunks: Iterable[Tensor], state: StreamState | None = None) -> Iterator[Posterior]:
        """Video in chunks along T -> the posterior of each; together equal to `encode` of the whole.

        The first chunk has k * temporal_stride + 1 frames, later ones k * temporal_stride. Pass a state to go
        on with a stream in a later call.
        """
        state = StreamState() if state is None else state
        for chunk in chunks:
            self._check_video(chunk, starts_clip=not state)
            yield self._normalise(self._to_posterior(chunk, state))

    def decode_chunks(self, chunks: Iterable[Tensor], state: StreamState | None = None) -> Iterator[Tensor]:
        """Normalised latents in chunks of any length -> the video of each; together equal to `decode`."""
        state = StreamState() if state is None else state
        for chunk in chunks:
            self._check_latents(chunk)
            yield self._to_pixels(self._denormalise(chunk), state)

    def encode_unnormalised(self, video: Tensor) -> Posterior:
        """As `encode`, before the latent statistics: what they are measured on and the losses work with."""
        self._check_video(video, starts_clip=True)
        return self._to_posterior(video, None)

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

    def _to_posterior(self, video: Tensor, state: StreamState | None) -> Posterior:
        # Channels last: the norm over channels then has a fused CPU kernel and convolutions are as fast.
        pixels = space_to_depth(video, self.config.pixel_patch).contiguous(memory_format=torch.channels_last_3d)
        mean, logvar = self.encoder(pixels, state).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE))

    def _to_pixels(self, latents: Tensor, state: StreamState | None) -> Tensor:
        latents = latents.contiguous(memory_format=torch.channels_last_3d)
        return depth_to_space(self.decoder(latents, state), self.config.pixel_patch)

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

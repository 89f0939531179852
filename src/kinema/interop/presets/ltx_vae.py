"""The autoencoder of LTX-2 (Lightricks 2026): a causal encoder, and a decoder that looks ahead."""

import math

from torch import nn

from kinema.interop.keymap import Along, KeyMap, PermutedRows, Rule
from kinema.interop.preset import Preset, Record
from kinema.interop.presets.rules import fixed_choices
from kinema.interop.presets.vae_layers import (
    decoder_names,
    encoder_names,
    multiples,
    refuse_difference,
)
from kinema.models.vae import (
    CausalVAE,
    Convolution,
    Halving,
    Norm,
    Resampling,
    SpacePadding,
    TimePadding,
    VAEConfig,
)

HALVINGS = {"spatial": Halving.space, "temporal": Halving.time, "spatiotemporal": Halving.both}
STEPS = {halving: name for name, halving in HALVINGS.items()}


def vae_config(config: Record) -> VAEConfig:
    """Their config -> ours. ValueError where their class has a choice that ours lacks."""
    steps, decoder_steps = len(config["block_out_channels"]), len(config["decoder_block_out_channels"])
    fixed_choices(config, in_channels=3, out_channels=3, patch_size_t=1, timestep_conditioning=False)
    fixed_choices(config, scaling_factor=1.0, encoder_causal=True)
    fixed_choices(config, down_block_types=["LTX2VideoDownBlock3D"] * steps)
    _fixed_flags(config, steps, spatio_temporal_scaling=True)
    _fixed_flags(config, decoder_steps, decoder_spatio_temporal_scaling=True)
    _fixed_flags(config, decoder_steps + 1, decoder_inject_noise=False)
    width, multipliers = multiples([config["latent_channels"], *config["block_out_channels"]])
    decoder_width, decoder_multipliers = multiples(_decoder_widths(config))
    halvings = [HALVINGS[name] for name in config["downsample_type"]]
    return VAEConfig(
        latent_channels=config["latent_channels"],
        spatial_stride=config["patch_size"] * math.prod(halving.factors[1] for halving in halvings),
        temporal_stride=math.prod(halving.factors[0] for halving in halvings),
        pixel_patch=config["patch_size"],
        width=width,
        decoder_width=decoder_width,
        width_multipliers=multipliers,
        decoder_width_multipliers=decoder_multipliers,
        halvings=halvings,
        decoder_halvings=[HALVINGS[name] for name in config["upsample_type"]][::-1],
        res_blocks_by_level=list(config["layers_per_block"]),
        decoder_res_blocks_by_level=list(config["decoder_layers_per_block"]),
        convolution=Convolution.full,
        norm=Norm.pixel,
        time_padding=TimePadding.first,
        space_padding=SpacePadding(config["encoder_spatial_padding_mode"]),
        decoder_space_padding=SpacePadding(config["decoder_spatial_padding_mode"]),
        decoder_causal=config["decoder_causal"],
        down=Resampling.packed_repeat,
        up=Resampling.packed_repeat,
        up_shortcuts=_one_for_all(config, "upsample_residual"),
        shared_logvar=True,
        linear_output=False,
    )


def describe(module: nn.Module) -> Record:
    """Our VAE -> their config. ValueError names a choice that their class lacks."""
    if not isinstance(module, CausalVAE):
        raise ValueError(f"{type(module).__name__} is not a CausalVAE")
    ours = module.config
    levels, decoder_levels = ours.encoder_levels(), ours.decoder_levels()
    steps, decoder_steps = len(levels) - 1, len(decoder_levels) - 1
    if uneven := [(a.width, a.next_width) for a in decoder_levels if a.width % a.next_width]:
        raise ValueError(
            f"AutoencoderKLLTX2Video has no place for steps up between {uneven} channels, which do not divide"
        )
    config = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": ours.latent_channels,
        "block_out_channels": [level.next_width for level in levels[:-1]],
        "down_block_types": ["LTX2VideoDownBlock3D"] * steps,
        "decoder_block_out_channels": [level.width for level in decoder_levels[:-1]][::-1],
        "layers_per_block": [level.res_blocks for level in levels],
        "decoder_layers_per_block": [level.res_blocks for level in decoder_levels][::-1],
        "spatio_temporal_scaling": [True] * steps,
        "decoder_spatio_temporal_scaling": [True] * decoder_steps,
        "decoder_inject_noise": [False] * (decoder_steps + 1),
        "downsample_type": [STEPS[halving] for halving in ours.encoder_halvings],
        "upsample_type": [STEPS[halving] for halving in ours.decoder_halvings_or_encoder[::-1]],
        "upsample_residual": [ours.up_shortcuts] * decoder_steps,
        "upsample_factor": [level.width // level.next_width for level in decoder_levels[:-1]][::-1],
        "timestep_conditioning": False,
        "patch_size": ours.pixel_patch,
        "patch_size_t": 1,
        "resnet_norm_eps": 1e-6,
        "scaling_factor": 1.0,
        "encoder_causal": True,
        "decoder_causal": ours.decoder_causal,
        "encoder_spatial_padding_mode": ours.space_padding.value,
        "decoder_spatial_padding_mode": (ours.decoder_space_padding or ours.space_padding).value,
        "spatial_compression_ratio": ours.spatial_stride,
        "temporal_compression_ratio": ours.temporal_stride,
    }
    refuse_difference(ours, vae_config(config), "AutoencoderKLLTX2Video")
    return config


def key_map(config: Record) -> KeyMap:
    """Between the names of `AutoencoderKLLTX2Video` and ours; their middles are our smallest levels."""
    last = len(config["block_out_channels"])
    encoder = [("encoder.mid_block" if i == last else f"encoder.down_blocks.{i}") for i in range(last + 1)]
    decoder = ["decoder.mid_block", *(f"decoder.up_blocks.{i}" for i in range(len(config["upsample_type"])))]
    return _key_map(
        config,
        "latents_mean",
        "latents_std",
        ([f"{name}.resnets" for name in encoder], [f"{name}.downsamplers.0" for name in encoder[:-1]]),
        ([f"{name}.resnets" for name in decoder], [f"{name}.upsamplers.0" for name in decoder[1:]]),
    )


def original_key_map(config: Record) -> KeyMap:
    """Between the vendor's own names and ours: levels and steps numbered together."""
    levels, decoder_levels = len(config["block_out_channels"]) + 1, len(config["upsample_type"]) + 1
    down = [f"encoder.down_blocks.{i}" for i in range(2 * levels - 1)]
    up = [f"decoder.up_blocks.{i}" for i in range(2 * decoder_levels - 1)]
    return _key_map(
        config,
        f"{STATISTICS}.mean-of-means",
        f"{STATISTICS}.std-of-means",
        ([f"{name}.res_blocks" for name in down[::2]], down[1::2]),
        ([f"{name}.res_blocks" for name in up[::2]], up[1::2]),
        UNREAD,
    )


STATISTICS = "per_channel_statistics"
UNREAD = tuple(f"{STATISTICS}.{name}" for name in ("channel", "mean-of-stds", "mean-of-stds_over_std-of-means"))
"""Statistics in the vendor's files which nothing uses; diffusers' converter drops them too."""

Names = tuple[list[str], list[str]]
"""Of each level's residual blocks, and of the steps between levels."""


def _key_map(config: Record, mean: str, std: str, down: Names, up: Names, unread: tuple[str, ...] = ()) -> KeyMap:
    ours, patch = vae_config(config), config["patch_size"]
    pixels = PermutedRows((3, patch, patch), (2, 1, 0))
    encoder, decoder = encoder_names(ours), decoder_names(ours)
    rules = [
        Rule(mean, "latent_mean"),
        Rule(std, "latent_std"),
        Rule("encoder.conv_in.conv.weight", f"{encoder.first[0]}.conv.weight", Along(1, pixels)),
        Rule("encoder.conv_in.conv.bias", f"{encoder.first[0]}.conv.bias"),
        Rule("encoder.conv_out.conv.{p}", "encoder.output.conv.conv.{p}"),
        Rule("decoder.conv_in.conv.{p}", f"{decoder.first[0]}.conv.{{p}}"),
        Rule("decoder.conv_out.conv.{p}", "decoder.output.conv.conv.{p}", pixels),
    ]
    for coder, (blocks, steps) in ((encoder, down), (decoder, up)):
        for level, theirs in zip(coder.levels, blocks, strict=True):
            rules += _blocks(theirs, level.blocks)
        for level, theirs in zip(coder.levels[:-1], steps, strict=True):
            rules += _steps(theirs, level.steps)
    return KeyMap(rules, unread=unread)


def _blocks(theirs: str, blocks: list[str]) -> list[Rule]:
    return [
        Rule(f"{theirs}.{j}.{n}.conv.{{p}}", f"{block}.{n}.conv.{{p}}")
        for j, block in enumerate(blocks)
        for n in ("conv1", "conv2")
    ]


def _steps(theirs: str, layers: list[tuple[str, nn.Module]]) -> list[Rule]:
    return [Rule(f"{theirs}.conv.conv.{{p}}", f"{name}.conv.conv.{{p}}") for name, _ in layers]


def _decoder_widths(config: Record) -> list[int]:
    """From pixels to latents; each step up divides its channels by its factor."""
    blocks, factors = config["decoder_block_out_channels"], config["upsample_factor"]
    widths = [*blocks[::-1], blocks[0] // factors[0]]
    for width, factor, following in zip(blocks[::-1], factors[::-1], widths[1:], strict=True):
        if width // factor != following:
            raise ValueError(
                f"decoder_block_out_channels={blocks}, upsample_factor={factors}: a step ends with {width // factor} "
                f"channels and the next begins with {following}; a residual block between is not implemented"
            )
    return widths[::-1]


def _one_for_all(config: Record, name: str) -> bool:
    """A flag that may be given for each, all the same."""
    values = {config[name]} if isinstance(config[name], bool) else set(config[name])
    if len(values) != 1:
        raise ValueError(f"{name}={config[name]}: only the same for all is implemented")
    return bool(values.pop())


def _fixed_flags(config: Record, count: int, **choices: bool) -> None:
    """Flags that may be given once for all."""
    for name, value in choices.items():
        if config[name] not in (value, [value] * count, (value,) * count):
            raise ValueError(f"{name}={config[name]}: only {value} for all {count} is implemented")


LTX2_VAE = Preset(
    name="ltx2_vae",
    reference="AutoencoderKLLTX2Video",
    check=lambda config: None,
    build=lambda config: CausalVAE(vae_config(config)),
    describe=describe,
    key_map=key_map,
    original_key_map=original_key_map,
)

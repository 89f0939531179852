"""The autoencoders of HunyuanVideo (Kong et al. 2024) and HunyuanVideo-1.5."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kinema.interop.keymap import Chain, Fused, Inverse, KeyMap, Layout, Reshaped, Rule, Same
from kinema.interop.preset import Preset, Record
from kinema.interop.presets.rules import fixed_choices, shortest
from kinema.interop.presets.vae_layers import (
    CoderNames,
    decoder_names,
    encoder_names,
    multiples,
    refuse_difference,
)
from kinema.models.vae import (
    Attention,
    CausalVAE,
    Convolution,
    Halving,
    Norm,
    Resampling,
    SpacePadding,
    TimePadding,
    VAEConfig,
)

GAIN = Reshaped((-1, 1, 1, 1), (-1,))


def _vae_config_15(config: Record) -> VAEConfig:
    """HunyuanVideo-1.5: causal; packed steps and attention over all earlier frames."""
    fixed_choices(config, in_channels=3, out_channels=3, downsample_match_channel=True, upsample_match_channel=True)
    space, time = config["spatial_compression_ratio"], config["temporal_compression_ratio"]
    if len(config["block_out_channels"]) != space.bit_length():
        raise ValueError(
            f"block_out_channels={list(config['block_out_channels'])}: spatial_compression_ratio={space} needs "
            f"{space.bit_length()} levels; levels without a step between them are not implemented"
        )
    return VAEConfig(
        latent_channels=config["latent_channels"],
        spatial_stride=space,
        temporal_stride=time,
        norm=Norm.length,
        down=Resampling.packed_alone,
        up=Resampling.packed_alone,
        latent_shortcut=True,
        **_common(config),
    )


def _vae_config(config: Record) -> VAEConfig:
    """HunyuanVideo: NOT causal, because its norms take their statistics over all frames."""
    levels = len(config["block_out_channels"])
    fixed_choices(config, in_channels=3, out_channels=3, act_fn="silu", temporal_compression_ratio=4)
    fixed_choices(config, mid_block_add_attention=True)
    fixed_choices(config, down_block_types=["HunyuanVideoDownBlock3D"] * levels)
    fixed_choices(config, up_block_types=["HunyuanVideoUpBlock3D"] * levels)
    spatial = round(math.log2(config["spatial_compression_ratio"]))
    # Counted from the pixels in the encoder and from the latents in the decoder, in time each time the last steps.
    steps = [(i < spatial, i >= levels - 3) for i in range(levels - 1)]
    return VAEConfig(
        latent_channels=config["latent_channels"],
        spatial_stride=config["spatial_compression_ratio"],
        temporal_stride=4,
        norm=Norm.group,
        norm_groups=config["norm_num_groups"],
        down=Resampling.joint,
        up=Resampling.joint,
        halvings=_halvings(steps),
        decoder_halvings=_halvings(steps[::-1]),
        latent_convolution=True,
        **_common(config),
    )


def _common(config: Record) -> Record:
    width, multipliers = multiples(config["block_out_channels"])
    return {
        "pixel_patch": 1,
        "width": width,
        "decoder_width": width,
        "width_multipliers": multipliers,
        "num_res_blocks": config["layers_per_block"],
        "decoder_res_blocks": config["layers_per_block"] + 1,
        "convolution": Convolution.full,
        "time_padding": TimePadding.first,
        "space_padding": SpacePadding.replicate,
        "mid_res_blocks": 1,
        "mid_attention": True,
        "attention": Attention.causal,
        "linear_output": False,
    }


def _halvings(steps: Sequence[tuple[bool, bool]]) -> list[Halving]:
    kinds = {(True, True): Halving.both, (True, False): Halving.space, (False, True): Halving.time}
    return [kinds[step] for step in steps]


def _build_15(config: Record) -> CausalVAE:
    return _scaled(CausalVAE(_vae_config_15(config)), config)


def _build(config: Record) -> CausalVAE:
    return _scaled(CausalVAE(_vae_config(config)), config)


def _scaled(vae: CausalVAE, config: Record) -> CausalVAE:
    for name, values in _statistics(config).items():
        getattr(vae, name).copy_(values)
    return vae


def _statistics(config: Record) -> dict[str, Tensor]:
    channels, scale = config["latent_channels"], config["scaling_factor"]
    return {
        "latent_mean": torch.zeros(channels, device="cpu"),
        "latent_std": torch.full((channels,), 1 / scale, device="cpu"),
    }


def _describe_15(module: nn.Module) -> Record:
    config = _described(module)
    config |= {"downsample_match_channel": True, "upsample_match_channel": True}
    assert isinstance(module, CausalVAE)
    refuse_difference(module.config, _vae_config_15(config), "AutoencoderKLHunyuanVideo15")
    return config


def _describe(module: nn.Module) -> Record:
    config = _described(module)
    levels = len(config["block_out_channels"])
    assert isinstance(module, CausalVAE)
    config |= {
        "down_block_types": ["HunyuanVideoDownBlock3D"] * levels,
        "up_block_types": ["HunyuanVideoUpBlock3D"] * levels,
        "act_fn": "silu",
        "norm_num_groups": module.config.norm_groups,
        "mid_block_add_attention": True,
    }
    refuse_difference(module.config, _vae_config(config), "AutoencoderKLHunyuanVideo")
    return config


def _described(module: nn.Module) -> Record:
    if not isinstance(module, CausalVAE):
        raise ValueError(f"{type(module).__name__} is not a CausalVAE")
    ours, stds = module.config, module.latent_std
    if module.latent_mean.any() or (stds != stds[0]).any():
        raise ValueError("latent_mean, latent_std: the HunyuanVideo classes have one scale for all channels, no means")
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": ours.latent_channels,
        "block_out_channels": [level.width for level in ours.encoder_levels()],
        "layers_per_block": ours.num_res_blocks,
        "scaling_factor": shortest(1 / stds[0].item()),
        "spatial_compression_ratio": ours.spatial_stride,
        "temporal_compression_ratio": ours.temporal_stride,
    }


def _key_map_15(config: Record) -> KeyMap:
    """Between the names of `AutoencoderKLHunyuanVideo15` and ours."""
    ours = _vae_config_15(config)
    width = config["block_out_channels"][-1]
    product = Reshaped((-1, width, 1, 1, 1), (-1, width))
    rules = [Rule("decoder.conv_in.conv.{p}", f"{decoder_names(ours).first[0]}.conv.conv.{{p}}")]
    for side, coder in (("encoder", encoder_names(ours)), ("decoder", decoder_names(ours))):
        rules += _coder(side, coder, ("{n}.gamma", "{n}.norm.weight", GAIN), "conv_shortcut", "norm_out")
        theirs, attention = f"{side}.mid_block.attentions.0", coder.middle_attention[0]
        rules.append(Rule(f"{theirs}.norm.gamma", f"{attention}.norm.norm.weight", GAIN))
        rules += _query_key_value(theirs, attention, width, product)
        rules.append(Rule(f"{theirs}.proj_out.weight", f"{attention}.out.weight", product))
        rules.append(Rule(f"{theirs}.proj_out.bias", f"{attention}.out.bias"))
    return KeyMap(rules, _statistics(config))


VENDOR_15 = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0.to_": "mid.attn_1.",
    "mid_block.attentions.0": "mid.attn_1",
    "down_blocks": "down",
    "up_blocks": "up",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "resnets": "block",
}
"""A part of a name in `diffusers` -> the same in the vendor's files, in the order in which they are looked for."""


def _original_key_map_15(config: Record) -> KeyMap:
    """Between the vendor's own names and ours. (HunyuanVideo's own are those of its class in `diffusers`.)"""
    reference = _key_map_15(config)
    rules = [replace(rule, theirs=tuple(_vendor_15(name) for name in rule.all_theirs)) for rule in reference.rules]
    return KeyMap(rules, reference.constants)


def _vendor_15(name: str) -> str:
    for theirs, vendors in VENDOR_15.items():
        name = name.replace(theirs, vendors)
    return name


def _key_map(config: Record) -> KeyMap:
    """Between the names of `AutoencoderKLHunyuanVideo` and ours."""
    ours = _vae_config(config)
    width, decoder = config["block_out_channels"][-1], decoder_names(ours)
    rules = [
        Rule("quant_conv.{p}", "encoder.latent_convolution.conv.{p}"),
        Rule("post_quant_conv.{p}", f"{decoder.first[0]}.conv.{{p}}"),
        Rule("decoder.conv_in.conv.{p}", f"{decoder.first[1]}.conv.{{p}}"),
    ]
    for side, coder in (("encoder", encoder_names(ours)), ("decoder", decoder)):
        rules += _coder(side, coder, ("{n}.{{p}}", "{n}.norm.{{p}}", Same()), "conv_shortcut.conv", "conv_norm_out")
        theirs, attention = f"{side}.mid_block.attentions.0", coder.middle_attention[0]
        rules.append(Rule(f"{theirs}.group_norm.{{p}}", f"{attention}.norm.norm.{{p}}"))
        rules += _query_key_value(theirs, attention, width, Same())
        rules.append(Rule(f"{theirs}.to_out.0.{{p}}", f"{attention}.out.{{p}}"))
    return KeyMap(rules, _statistics(config))


def _coder(side: str, coder: CoderNames, norm: tuple[str, str, Layout], shortcut: str, last_norm: str) -> list[Rule]:
    """All but the middle attention, and the decoder's first layers."""
    theirs_norm, ours_norm, layout = norm
    blocks = [(f"{side}.mid_block.resnets.{i}", block) for i, block in enumerate(coder.middle_blocks)]
    rules = [Rule("encoder.conv_in.conv.{p}", f"{coder.first[0]}.conv.{{p}}")] if side == "encoder" else []
    step = "down_blocks.{i}.downsamplers.0" if side == "encoder" else "up_blocks.{i}.upsamplers.0"
    for i, level in enumerate(coder.levels):
        place = step.split(".", maxsplit=1)[0]
        blocks += [(f"{side}.{place}.{i}.resnets.{j}", block) for j, block in enumerate(level.blocks)]
        rules += [
            Rule(f"{side}.{step.format(i=i)}.conv.conv.{{p}}", f"{name}.conv.conv.{{p}}") for name, _ in level.steps
        ]
    norms = [(f"{side}.{last_norm}", f"{side}.output.norm")]
    for theirs, ours in blocks:
        norms += [(f"{theirs}.{n}", f"{ours}.{n}") for n in ("norm1", "norm2")]
        rules += [Rule(f"{theirs}.{n}.conv.{{p}}", f"{ours}.{n}.conv.{{p}}") for n in ("conv1", "conv2")]
        rules.append(Rule(f"{theirs}.{shortcut}.{{p}}", f"{ours}.shortcut.conv.{{p}}"))
    rules += [Rule(theirs_norm.format(n=a), ours_norm.format(n=b), layout) for a, b in norms]
    return [*rules, Rule(f"{side}.conv_out.conv.{{p}}", f"{side}.output.conv.conv.{{p}}")]


def _query_key_value(theirs: str, ours: str, width: int, product: Layout) -> list[Rule]:
    together = Inverse(Fused((width, width, width)))
    parts = ("to_q", "to_k", "to_v")
    return [
        Rule(tuple(f"{theirs}.{n}.weight" for n in parts), f"{ours}.qkv.weight", Chain((product, together))),
        Rule(tuple(f"{theirs}.{n}.bias" for n in parts), f"{ours}.qkv.bias", together),
    ]


HUNYUAN_15_VAE = Preset(
    name="hunyuan_15_vae",
    reference="AutoencoderKLHunyuanVideo15",
    check=lambda config: None,
    build=_build_15,
    describe=_describe_15,
    key_map=_key_map_15,
    original_key_map=_original_key_map_15,
)
HUNYUAN_VAE = Preset(
    name="hunyuan_vae",
    reference="AutoencoderKLHunyuanVideo",
    check=lambda config: None,
    build=_build,
    describe=_describe,
    key_map=_key_map,
)

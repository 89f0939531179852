"""The autoencoders of Wan 2.1 and 2.2 (Wan Team 2025, Wan: Open and Advanced Large-Scale Video Generative Models)."""

from collections.abc import Iterable
from itertools import count

import torch
from torch import Tensor, nn

from kinema.interop.keymap import Along, KeyMap, Layout, PermutedRows, Reshaped, Rule, Same, Unsqueezed
from kinema.interop.preset import Preset, Record
from kinema.interop.presets.rules import fixed_choices, shortest
from kinema.interop.presets.vae_layers import CoderNames, decoder_names, encoder_names, refuse_difference
from kinema.models.vae import CausalVAE, Convolution, Halving, Norm, Resampling, TimePadding, VAEConfig
from kinema.models.vae.resampling import FirstAloneDown, FirstAloneUp

VIDEO_GAIN = Reshaped((-1, 1, 1, 1), (-1,))
IMAGE_GAIN = Reshaped((-1, 1, 1), (-1,))


def vae_config(config: Record) -> VAEConfig:
    """Their config -> ours. ValueError where their class has a choice that ours lacks."""
    colours = 3 * _patch(config) ** 2
    fixed_choices(config, attn_scales=[], in_channels=colours, out_channels=colours)
    fixed_choices({"dim_mult[0]": config["dim_mult"][0]}, **{"dim_mult[0]": 1})
    residual = config["is_residual"]
    temporal = [bool(halves) for halves in config["temperal_downsample"]]
    if len(temporal) != len(config["dim_mult"]) - 1:
        raise ValueError(
            f"temperal_downsample={temporal}: dim_mult={config['dim_mult']} needs one entry less than its own"
        )
    return VAEConfig(
        latent_channels=config["z_dim"],
        spatial_stride=2 ** len(temporal) * _patch(config),
        temporal_stride=2 ** sum(temporal),
        pixel_patch=_patch(config),
        width=config["base_dim"],
        decoder_width=config["decoder_base_dim"] or config["base_dim"],
        width_multipliers=list(config["dim_mult"]),
        num_res_blocks=config["num_res_blocks"],
        decoder_res_blocks=config["num_res_blocks"] + 1,
        halvings=[Halving.both if halves else Halving.space for halves in temporal],
        convolution=Convolution.full,
        norm=Norm.length,
        time_padding=TimePadding.zeros,
        mid_res_blocks=1,
        mid_attention=True,
        down=Resampling.first_alone,
        up=Resampling.first_alone,
        stage_shortcuts=residual,
        up_halves_channels=not residual,
        latent_convolution=True,
        linear_output=False,
        clamp_output=True,
    )


def build(config: Record) -> CausalVAE:
    """Fresh weights, and the latent statistics of the config."""
    vae = CausalVAE(vae_config(config))
    for name, values in _statistics(config).items():
        getattr(vae, name).copy_(values)
    return vae


def describe(module: nn.Module) -> Record:
    """Our VAE -> their config. ValueError names a choice that their class lacks."""
    if not isinstance(module, CausalVAE):
        raise ValueError(f"{type(module).__name__} is not a CausalVAE")
    ours, residual = module.config, module.config.stage_shortcuts
    temporal = [halving is Halving.both for halving in ours.encoder_halvings]
    patch = ours.pixel_patch
    config = {
        "base_dim": ours.width,
        "decoder_base_dim": None if ours.decoder_width == ours.width else ours.decoder_width,
        "z_dim": ours.latent_channels,
        "dim_mult": list(ours.width_multipliers),
        "num_res_blocks": ours.num_res_blocks,
        "attn_scales": [],
        "temperal_downsample": temporal,
        "dropout": 0.0,
        "latents_mean": [shortest(mean) for mean in module.latent_mean.tolist()],
        "latents_std": [shortest(std) for std in module.latent_std.tolist()],
        "is_residual": residual,
        "in_channels": 3 * patch**2,
        "out_channels": 3 * patch**2,
        "patch_size": None if patch == 1 else patch,
        "scale_factor_temporal": ours.temporal_stride,
        "scale_factor_spatial": ours.spatial_stride,
    }
    refuse_difference(ours, vae_config(config), "AutoencoderKLWan")
    return config


def key_map(config: Record) -> KeyMap:
    """Between the names of `AutoencoderKLWan` and ours."""
    residual = config["is_residual"]
    encoder, decoder = encoder_names(vae_config(config)), decoder_names(vae_config(config))
    rules = _ends(config, encoder, decoder, "conv_in", ("norm_out", "conv_out"), ("quant_conv", "post_quant_conv"))
    for side, coder in (("encoder", encoder), ("decoder", decoder)):
        middle = f"{side}.mid_block"
        for i, block in enumerate(coder.middle_blocks):
            rules += _block(f"{middle}.resnets.{i}", block, NAMES)
        rules += _attention(f"{middle}.attentions.0", coder.middle_attention[0], _middle_width(config, side))
    flat = count()
    for i, level in enumerate(encoder.levels):
        for j, block in enumerate(level.blocks):
            theirs = f"encoder.down_blocks.{i}.resnets.{j}" if residual else f"encoder.down_blocks.{next(flat)}"
            rules += _block(theirs, block, NAMES)
        if level.steps:
            step = f"encoder.down_blocks.{i}.downsampler" if residual else f"encoder.down_blocks.{next(flat)}"
            rules += _step(step, level.steps)
    for i, level in enumerate(decoder.levels):
        for j, block in enumerate(level.blocks):
            rules += _block(f"decoder.up_blocks.{i}.resnets.{j}", block, NAMES)
        step = "upsampler" if residual else "upsamplers.0"
        rules += _step(f"decoder.up_blocks.{i}.{step}", level.steps)
    return KeyMap(rules, _statistics(config))


def original_key_map(config: Record) -> KeyMap:
    """Between the vendor's own names and ours: numbered layers, one after the other."""
    residual = config["is_residual"]
    encoder, decoder = encoder_names(vae_config(config)), decoder_names(vae_config(config))
    rules = _ends(config, encoder, decoder, "conv1", ("head.0", "head.2"), ("conv1", "conv2"))
    for side, coder, layers in (("encoder", encoder, "downsamples"), ("decoder", decoder, "upsamples")):
        rules += _block(f"{side}.middle.0", coder.middle_blocks[0], ORIGINAL_NAMES)
        rules += _attention(f"{side}.middle.1", coder.middle_attention[0], _middle_width(config, side))
        rules += _block(f"{side}.middle.2", coder.middle_blocks[1], ORIGINAL_NAMES)
        flat = count()
        for i, level in enumerate(coder.levels):
            parts = count() if residual else flat
            prefix = f"{side}.{layers}.{i}.{layers}" if residual else f"{side}.{layers}"
            for block in level.blocks:
                rules += _block(f"{prefix}.{next(parts)}", block, ORIGINAL_NAMES)
            if level.steps:
                rules += _step(f"{prefix}.{next(parts)}", level.steps)
    return KeyMap(rules, _statistics(config))


NAMES = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "shortcut": "conv_shortcut"}
ORIGINAL_NAMES = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "shortcut": "shortcut",
}


def _block(theirs: str, ours: str, names: dict[str, str]) -> list[Rule]:
    norms = [Rule(f"{theirs}.{names[n]}.gamma", f"{ours}.{n}.norm.weight", VIDEO_GAIN) for n in ("norm1", "norm2")]
    convolutions = [
        Rule(f"{theirs}.{names[n]}.{{p}}", f"{ours}.{n}.conv.{{p}}") for n in ("conv1", "conv2", "shortcut")
    ]
    return norms + convolutions


def _attention(theirs: str, ours: str, width: int) -> list[Rule]:
    product = Reshaped((-1, width, 1, 1), (-1, width))
    return [
        Rule(f"{theirs}.norm.gamma", f"{ours}.norm.norm.weight", IMAGE_GAIN),
        Rule(f"{theirs}.to_qkv.weight", f"{ours}.qkv.weight", product),
        Rule(f"{theirs}.to_qkv.bias", f"{ours}.qkv.bias"),
        Rule(f"{theirs}.proj.weight", f"{ours}.out.weight", product),
        Rule(f"{theirs}.proj.bias", f"{ours}.out.bias"),
    ]


def _step(theirs: str, layers: Iterable[tuple[str, nn.Module]]) -> list[Rule]:
    rules: list[Rule] = []
    for ours, layer in layers:
        in_time = isinstance(layer, FirstAloneDown | FirstAloneUp)
        name, layout = ("time_conv", Same()) if in_time else ("resample.1", Unsqueezed(2))
        rules.append(Rule(f"{theirs}.{name}.weight", f"{ours}.conv.conv.weight", layout))
        rules.append(Rule(f"{theirs}.{name}.bias", f"{ours}.conv.conv.bias"))
    return rules


def _ends(
    config: Record, encoder: CoderNames, decoder: CoderNames, first: str, last: tuple[str, str], latent: tuple[str, str]
) -> list[Rule]:
    """First and last layers of both sides; theirs counts a patch's colours before its columns before its rows."""
    patch = _patch(config)
    pixels: Layout = PermutedRows((3, patch, patch), (2, 1, 0)) if patch > 1 else Same()
    norm, convolution = last
    return [
        Rule(f"encoder.{first}.weight", f"{encoder.first[0]}.conv.weight", Along(1, pixels)),
        Rule(f"encoder.{first}.bias", f"{encoder.first[0]}.conv.bias"),
        Rule(f"encoder.{norm}.gamma", "encoder.output.norm.norm.weight", VIDEO_GAIN),
        Rule(f"encoder.{convolution}.{{p}}", "encoder.output.conv.conv.{p}"),
        Rule(f"{latent[0]}.{{p}}", "encoder.latent_convolution.conv.{p}"),
        Rule(f"{latent[1]}.{{p}}", f"{decoder.first[0]}.conv.{{p}}"),
        Rule(f"decoder.{first}.{{p}}", f"{decoder.first[1]}.conv.{{p}}"),
        Rule(f"decoder.{norm}.gamma", "decoder.output.norm.norm.weight", VIDEO_GAIN),
        Rule(f"decoder.{convolution}.{{p}}", "decoder.output.conv.conv.{p}", pixels),
    ]


def _patch(config: Record) -> int:
    return config["patch_size"] or 1


def _middle_width(config: Record, side: str) -> int:
    width = config["base_dim"] if side == "encoder" else config["decoder_base_dim"] or config["base_dim"]
    return int(width * config["dim_mult"][-1])


def _statistics(config: Record) -> dict[str, Tensor]:
    return {
        "latent_mean": torch.tensor(config["latents_mean"], device="cpu"),
        "latent_std": torch.tensor(config["latents_std"], device="cpu"),
    }


WAN_VAE = Preset(
    name="wan_vae",
    reference="AutoencoderKLWan",
    check=lambda config: fixed_choices(config, is_residual=False),
    build=build,
    describe=describe,
    key_map=key_map,
    original_key_map=original_key_map,
)
WAN_22_VAE = Preset(
    name="wan_22_vae",
    reference="AutoencoderKLWan",
    check=lambda config: fixed_choices(config, is_residual=True),
    build=build,
    describe=describe,
    key_map=key_map,
    original_key_map=original_key_map,
)

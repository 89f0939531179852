"""A causal VAE that begins as an autoencoder of images (`AutoencoderKL` of latent diffusion, Rombach et al. 2022).

Not a preset: there is no way back. Each convolution in space keeps its weights for the newest frame and begins with
zeros for earlier ones, so that a new VAE encodes every frame as the image model does.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.interop.keymap import Fused, Inverse, KeyMap, Layout, Rule, Unsqueezed
from kinema.interop.preset import Record
from kinema.interop.presets.rules import fixed_choices
from kinema.interop.presets.vae_layers import (
    CoderNames,
    decoder_names,
    encoder_names,
    multiples,
)
from kinema.models.vae import CausalVAE, Convolution, Norm, Resampling, VAEConfig
from kinema.models.vae.resampling import FirstAloneDown, FirstAloneUp


def inflate(config: Record, tensors: Mapping[str, Tensor], temporal_stride: int) -> CausalVAE:
    """Config and state dict of an `AutoencoderKL` -> a VAE of videos with that image model in every frame.

    Steps in time begin as the mean of two frames, and as two copies of one. ValueError where the image model has a
    choice that ours lacks, or tensors that do not fit.
    """
    ours = vae_config(config, temporal_stride)
    vae = CausalVAE(ours)
    state = vae.state_dict()
    found = {name: _with_past(tensor, state, name) for name, tensor in _key_map(config, ours).to_ours(tensors).items()}
    steps = [name for name, layer in vae.named_modules() if isinstance(layer, FirstAloneDown | FirstAloneUp)]
    in_time = tuple(f"{name}." for name in steps)
    if missing := [name for name in state if name not in found and not name.startswith(in_time)]:
        raise ValueError(f"the image model lacks the tensors for {', '.join(missing)}")
    vae.load_state_dict(state | found)
    return vae


def vae_config(config: Record, temporal_stride: int) -> VAEConfig:
    """An `AutoencoderKL`'s config -> ours, with that many frames in a latent frame."""
    steps = len(config["block_out_channels"])
    fixed_choices(config, in_channels=3, out_channels=3, act_fn="silu", mid_block_add_attention=True)
    fixed_choices(config, down_block_types=["DownEncoderBlock2D"] * steps, up_block_types=["UpDecoderBlock2D"] * steps)
    if config["use_quant_conv"] != config["use_post_quant_conv"]:
        raise ValueError("use_quant_conv and use_post_quant_conv differ: the causal VAE has both or neither")
    width, multipliers = multiples(config["block_out_channels"])
    return VAEConfig(
        latent_channels=config["latent_channels"],
        spatial_stride=2 ** (steps - 1),
        temporal_stride=temporal_stride,
        pixel_patch=1,
        width=width,
        decoder_width=width,
        width_multipliers=multipliers,
        num_res_blocks=config["layers_per_block"],
        decoder_res_blocks=config["layers_per_block"] + 1,
        convolution=Convolution.full,
        norm=Norm.group_frame,
        norm_groups=config["norm_num_groups"],
        mid_res_blocks=1,
        mid_attention=True,
        down=Resampling.first_alone,
        up=Resampling.first_alone,
        latent_convolution=config["use_quant_conv"],
        linear_output=False,
    )


def _with_past(tensor: Tensor, state: Mapping[str, Tensor], name: str) -> Tensor:
    """A kernel of one frame -> of as many frames as ours, zeros before the newest."""
    if name not in state:
        raise ValueError(f"{name} {tuple(tensor.shape)}: the causal VAE of this config has no such tensor")
    missing = state[name].shape[2] - tensor.shape[2] if tensor.ndim == 5 else 0
    return F.pad(tensor, (0, 0, 0, 0, missing, 0)) if missing else tensor


def _key_map(config: Record, ours: VAEConfig) -> KeyMap:
    """Between their names and ours, our kernels still one frame long."""
    encoder, decoder = encoder_names(ours), decoder_names(ours)
    rules = _convolution("encoder.conv_in", f"{encoder.first[0]}.conv")
    rules += _convolution("decoder.conv_in", f"{decoder.first[-1]}.conv")
    if ours.latent_convolution:
        rules += _convolution("quant_conv", "encoder.latent_convolution.conv")
        rules += _convolution("post_quant_conv", f"{decoder.first[0]}.conv")
    rules += _coder("encoder", encoder, "down_blocks", "downsamplers")
    rules += _coder("decoder", decoder, "up_blocks", "upsamplers")
    shift, scale = config["shift_factor"] or 0.0, config["scaling_factor"]
    channels = config["latent_channels"]
    statistics = {"latent_mean": torch.full((channels,), shift), "latent_std": torch.full((channels,), 1 / scale)}
    return KeyMap(rules, statistics)


def _coder(side: str, coder: CoderNames, levels: str, steps: str) -> list[Rule]:
    middle = f"{side}.mid_block"
    blocks = [(f"{middle}.resnets.{i}", block) for i, block in enumerate(coder.middle_blocks)]
    rules = _attention(f"{middle}.attentions.0", coder.middle_attention[0])
    for i, level in enumerate(coder.levels):
        blocks += [(f"{side}.{levels}.{i}.resnets.{j}", block) for j, block in enumerate(level.blocks)]
        in_space = [name for name, layer in level.steps if not isinstance(layer, FirstAloneDown | FirstAloneUp)]
        for name in in_space:
            rules += _convolution(f"{side}.{levels}.{i}.{steps}.0.conv", f"{name}.conv.conv")
    for theirs, block in blocks:
        rules += [Rule(f"{theirs}.{n}.{{p}}", f"{block}.{n}.norm.{{p}}") for n in ("norm1", "norm2")]
        for n, name in (("conv1", "conv1"), ("conv2", "conv2"), ("shortcut", "conv_shortcut")):
            rules += _convolution(f"{theirs}.{name}", f"{block}.{n}.conv")
    rules.append(Rule(f"{side}.conv_norm_out.{{p}}", f"{side}.output.norm.norm.{{p}}"))
    return rules + _convolution(f"{side}.conv_out", f"{side}.output.conv.conv")


def _convolution(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}.weight", f"{ours}.weight", Unsqueezed(2)), Rule(f"{theirs}.bias", f"{ours}.bias")]


def _attention(theirs: str, ours: str) -> list[Rule]:
    parts = ("to_q", "to_k", "to_v")
    return [
        Rule(f"{theirs}.group_norm.{{p}}", f"{ours}.norm.norm.{{p}}"),
        Rule(tuple(f"{theirs}.{n}.weight" for n in parts), f"{ours}.qkv.weight", TOGETHER),
        Rule(tuple(f"{theirs}.{n}.bias" for n in parts), f"{ours}.qkv.bias", TOGETHER),
        Rule(f"{theirs}.to_out.0.{{p}}", f"{ours}.out.{{p}}"),
    ]


TOGETHER: Layout = Inverse(Fused(()))
"""Only the way in, which needs no sizes."""

"""Where the layers of a VAE stand in its state dict: what the tables of all published VAEs begin from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import nn

from kinema.models.vae import CausalVAE, VAEConfig
from kinema.models.vae.layers import CausalSequential, FrameAttention, ResBlock


@dataclass
class LevelNames:
    """Names of one level's residual blocks, and of the layers of the step behind it."""

    blocks: list[str] = field(default_factory=list)
    steps: list[tuple[str, nn.Module]] = field(default_factory=list)


@dataclass
class CoderNames:
    """Names of an encoder's or a decoder's layers; `first` are those before the middle and the levels."""

    first: list[str]
    middle_blocks: list[str]
    middle_attention: list[str]
    levels: list[LevelNames]


def encoder_names(config: VAEConfig) -> CoderNames:
    """Of `CausalVAE(config).encoder`; the middle stands behind the levels."""
    layers = _layers(_skeleton(config).encoder, "encoder")
    middle = layers[len(layers) - _middle_size(config) :]
    return _names(layers[:1], middle, layers[1 : len(layers) - len(middle)])


def decoder_names(config: VAEConfig) -> CoderNames:
    """Of `CausalVAE(config).decoder`; the middle stands before the levels."""
    layers = _layers(_skeleton(config).decoder, "decoder")
    first = 2 if config.latent_convolution else 1
    levels = first + _middle_size(config)
    return _names(layers[:first], layers[first:levels], layers[levels:])


def multiples(widths: Sequence[int]) -> tuple[int, list[int]]:
    """Widths of levels as one width and its multiples."""
    width = math.gcd(*widths)
    return width, [each // width for each in widths]


def refuse_difference(ours: VAEConfig, theirs: VAEConfig, reference: str) -> None:
    """ValueError when our config has a choice that the reference's class, here in our words, has otherwise."""
    differences = [
        f"vae.{f.name}={getattr(ours, f.name)} (there {getattr(theirs, f.name)})"
        for f in fields(VAEConfig)
        if f.name not in DERIVED and getattr(ours, f.name) != getattr(theirs, f.name)
    ]
    derived = ("encoder_levels", "decoder_levels", "encoder_choices", "decoder_choices")
    differences += [f"its {name}" for name in derived if getattr(ours, name)() != getattr(theirs, name)()]
    if differences:
        raise ValueError(f"{reference} has no place for {', '.join(differences)}")


DERIVED = (
    "halvings",
    "decoder_halvings",
    "decoder_width_multipliers",
    "num_res_blocks",
    "decoder_res_blocks",
    "res_blocks_by_level",
    "decoder_res_blocks_by_level",
    "width",
    "decoder_width",
    "width_multipliers",
    "decoder_space_padding",
    "norm_groups",
)
"""Fields with more than one spelling of the same levels, or which not every model reads: their meaning is compared."""


def _skeleton(config: VAEConfig) -> CausalVAE:
    with torch.device("meta"):
        return CausalVAE(config)


def _middle_size(config: VAEConfig) -> int:
    return config.mid_res_blocks + (2 if config.mid_attention else 0)


def _layers(coder: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    """The numbered layers in order, those of a stage one by one."""
    found: list[tuple[str, nn.Module]] = []
    for name, layer in coder.named_children():
        is_stage = isinstance(layer, CausalSequential) and isinstance(layer[0], ResBlock)
        if is_stage:
            found += _layers(layer, f"{prefix}.{name}")
        elif name.isdigit():
            found.append((f"{prefix}.{name}", layer))
    return found


def _names(
    first: list[tuple[str, nn.Module]], middle: list[tuple[str, nn.Module]], rest: list[tuple[str, nn.Module]]
) -> CoderNames:
    levels = [LevelNames()]
    for name, layer in rest:
        if not isinstance(layer, ResBlock):
            levels[-1].steps.append((name, layer))
            continue
        if levels[-1].steps:
            levels.append(LevelNames())
        levels[-1].blocks.append(name)
    return CoderNames(
        first=[name for name, _ in first],
        middle_blocks=[name for name, layer in middle if isinstance(layer, ResBlock)],
        middle_attention=[name for name, layer in middle if isinstance(layer, FrameAttention)],
        levels=levels,
    )

"""PixArt (Chen et al. 2023, PixArt-alpha; 2024, PixArt-Sigma): an image model, here one of videos of a single frame."""

from typing import cast

from torch import nn

from kinema.interop.keymap import KeyMap, PermutedRows, Reshaped, Rule
from kinema.interop.preset import Preset, Record
from kinema.interop.presets.described import check_described
from kinema.interop.presets.latte import BASE_SAMPLE, EDGES, block_rules
from kinema.interop.presets.rules import channels_out, fixed_choices, require, same_width, width_of
from kinema.models.dit import Activation, CrossNorm, DiT, DiTConfig, HeadModulation, PositionEmbedding, QKNorm, Rope

FIXED = {
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "attention_type": "default",
}
SIZED_SAMPLE = 128
"""The side in latents at which the reference asks for the picture's size, too, unless it is told not to."""


def build(record: Record) -> DiT:
    """PixArtTransformer2DModel's config -> the same model here, over clips of one frame."""
    return DiT(_config(record), record["in_channels"], record["caption_channels"])


def describe(module: nn.Module) -> Record:
    """The inverse of `build`."""
    model = cast(DiT, module)
    config = model.config
    side = config.patch_size[1]
    sample_size, scale = config.position_extent[1] * side, int(config.position_scale[1])
    record = {
        **FIXED,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": model.latent_channels,
        "out_channels": model.latent_channels * (2 if config.learned_variance else 1),
        "num_layers": config.depth,
        "cross_attention_dim": config.width,
        "sample_size": sample_size,
        "patch_size": side,
        "interpolation_scale": None if scale == max(sample_size // BASE_SAMPLE, 1) else scale,
        "use_additional_conditions": False if sample_size == SIZED_SAMPLE else None,
        "caption_channels": model.text_width,
    }
    check_described("PixArtTransformer2DModel", config, _config(record))
    return record


def key_map(record: Record) -> KeyMap:
    """Names in `diffusers`."""
    width, side = width_of(record), record["patch_size"]
    return KeyMap(
        [
            *(Rule(theirs, ours) for theirs, ours in EDGES),
            *block_rules("transformer_blocks.{i}", "blocks.{i}", width, ["attn1", "attn2"]),
            Rule(
                "pos_embed.proj.weight",
                "patch_embedding.weight",
                Reshaped((width, record["in_channels"], side, side), (width, -1)),
            ),
            Rule("scale_shift_table", "head_modulation.table", Reshaped((2, width), (-1,))),
            Rule("proj_out.{p}", "head.{p}", PermutedRows((side, side, channels_out(record)), (2, 0, 1))),
        ]
    )


def _config(record: Record) -> DiTConfig:
    sample_size, side = record["sample_size"], record["patch_size"]
    scale = float(record["interpolation_scale"] or max(sample_size // BASE_SAMPLE, 1))
    return DiTConfig(
        width=width_of(record),
        depth=record["num_layers"],
        num_heads=record["num_attention_heads"],
        patch_size=[1, side, side],
        activation=Activation.gelu_tanh,
        norm_eps=record["norm_eps"],
        cross_norm=CrossNorm.none,
        head_modulation=HeadModulation.table,
        qk_norm=QKNorm.none,
        rope=Rope.none,
        position_embedding=PositionEmbedding.sincos_space,
        position_scale=[1.0, scale, scale],
        position_extent=[0, sample_size // side, sample_size // side],
        text_activation=Activation.gelu_tanh,
        learned_variance=channels_out(record) == 2 * record["in_channels"],
    )


def _check(record: Record) -> None:
    fixed_choices(record, **FIXED)
    require(record["caption_channels"] is not None, record, "caption_channels", "only with captions is it implemented")
    same_width(record)
    given, asks_size = record["in_channels"], record["use_additional_conditions"]
    rule = f"only in_channels, {given}, or twice as many for the variance, is implemented"
    require(channels_out(record) in (given, 2 * given), record, "out_channels", rule)
    sized = record["sample_size"] == SIZED_SAMPLE if asks_size is None else asks_size
    rule = f"only False is implemented, which None does not mean at sample_size={SIZED_SAMPLE}"
    require(not sized, record, "use_additional_conditions", rule)


PIXART = Preset("pixart", "PixArtTransformer2DModel", _check, build, describe, key_map)

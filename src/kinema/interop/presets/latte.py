"""Latte (Ma et al. 2024): whole blocks within frames and whole blocks over time that take turns, as PixArt-alpha's."""

from typing import cast

from torch import nn

from kinema.interop.keymap import KeyMap, PermutedRows, Reshaped, Rule
from kinema.interop.preset import Names, Preset, Record
from kinema.interop.presets.described import check_described
from kinema.interop.presets.rules import channels_out, fixed_choices, require, same_width, width_of
from kinema.models.dit import (
    Activation,
    AttentionPattern,
    CrossNorm,
    DiT,
    DiTConfig,
    HeadModulation,
    PositionEmbedding,
    QKNorm,
    Rope,
)

HEAD_EPSILON = 1e-6  # of the norm before the head, whatever norm_eps says
TRAINED_FRAMES = 16  # what the reference's table in time holds; clips here may have any number
STEPS = 1000
BASE_SAMPLE = 64
"""The side in latents at which the reference begins to divide positions."""
FIXED = {
    "dropout": 0.0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": HEAD_EPSILON,
}

"""Name in `diffusers`, and here."""

EDGES: list[Names] = [
    ("pos_embed.proj.bias", "patch_embedding.bias"),
    ("adaln_single.emb.timestep_embedder.linear_1.{p}", "timestep_embedding.expand.{p}"),
    ("adaln_single.emb.timestep_embedder.linear_2.{p}", "timestep_embedding.project.{p}"),
    ("adaln_single.linear.{p}", "shared_modulation.{p}"),
    ("caption_projection.linear_1.{p}", "text_embedding.0.{p}"),
    ("caption_projection.linear_2.{p}", "text_embedding.2.{p}"),
]
ATTENTION: list[Names] = [
    ("to_q.{p}", "query.{p}"),
    ("to_k.{p}", "key.{p}"),
    ("to_v.{p}", "value.{p}"),
    ("to_out.0.{p}", "project.{p}"),
]
MLP: list[Names] = [("ff.net.0.proj.{p}", "expand.{p}"), ("ff.net.2.{p}", "project.{p}")]


def build(record: Record) -> DiT:
    """LatteTransformer3DModel's config -> the same model here.

    The reference takes timesteps from 0 to 1000 of a noise schedule and predicts the noise, and its variance where it
    has twice as many channels out as in.
    """
    return DiT(_config(record), record["in_channels"], record["caption_channels"])


def describe(module: nn.Module) -> Record:
    """The inverse of `build`."""
    model = cast(DiT, module)
    config = model.config
    side = config.patch_size[1]
    record = {
        **FIXED,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": model.latent_channels,
        "out_channels": model.latent_channels * (2 if config.learned_variance else 1),
        "num_layers": config.depth // 2,
        "cross_attention_dim": config.width,
        "sample_size": config.position_extent[1] * side,
        "patch_size": side,
        "num_embeds_ada_norm": STEPS,
        "caption_channels": model.text_width,
        "video_length": TRAINED_FRAMES,
    }
    check_described("LatteTransformer3DModel", config, _config(record))
    return record


def key_map(record: Record) -> KeyMap:
    """Names in `diffusers`, which are the maker's own."""
    width, side = width_of(record), record["patch_size"]
    rows = PermutedRows((side, side, channels_out(record)), (2, 0, 1))
    kernel = Reshaped((width, record["in_channels"], side, side), (width, -1))
    blocks = [
        rule
        for pair in range(record["num_layers"])
        for rule in [
            *block_rules(f"transformer_blocks.{pair}", f"blocks.{2 * pair}", width, ["attn1", "attn2"]),
            *block_rules(f"temporal_transformer_blocks.{pair}", f"blocks.{2 * pair + 1}", width, ["attn1"]),
        ]
    ]
    return KeyMap(
        [
            *(Rule(theirs, ours) for theirs, ours in EDGES),
            *blocks,
            Rule("pos_embed.proj.weight", "patch_embedding.weight", kernel),
            Rule("scale_shift_table", "head_modulation.table", Reshaped((2, width), (-1,))),
            Rule("proj_out.{p}", "head.{p}", rows),
        ]
    )


def block_rules(theirs: str, ours: str, width: int, attentions: list[str]) -> list[Rule]:
    """A block of PixArt-alpha with these attentions: names in `diffusers` and here."""
    layers = [(name, ATTENTION) for name in attentions] + [("", MLP)]
    return [
        Rule(f"{theirs}.scale_shift_table", f"{ours}.modulation.table", Reshaped((6, width), (-1,))),
        *(
            Rule(f"{theirs}.{layer}.{name}".replace("..", "."), f"{ours}.sublayers.{place}.operation.{mine}")
            for place, (layer, names) in enumerate(layers)
            for name, mine in names
        ),
    ]


def _config(record: Record) -> DiTConfig:
    width, side = width_of(record), record["patch_size"]
    extent, scale = record["sample_size"] // side, float(max(record["sample_size"] // BASE_SAMPLE, 1))
    return DiTConfig(
        width=width,
        depth=2 * record["num_layers"],
        num_heads=record["num_attention_heads"],
        patch_size=[1, side, side],
        attention=AttentionPattern.alternating,
        activation=Activation.gelu_tanh,
        norm_eps=record["norm_eps"],
        cross_norm=CrossNorm.none,
        head_modulation=HeadModulation.table,
        qk_norm=QKNorm.none,
        rope=Rope.none,
        position_embedding=PositionEmbedding.sincos_apart,
        position_scale=[1.0, scale, scale],
        position_extent=[0, extent, extent],
        text_activation=Activation.gelu_tanh,
        learned_variance=channels_out(record) == 2 * record["in_channels"],
    )


def _check(record: Record) -> None:
    fixed_choices(record, **FIXED)
    same_width(record)
    given = record["in_channels"]
    rule = f"only in_channels, {given}, or twice as many for the variance, is implemented"
    require(channels_out(record) in (given, 2 * given), record, "out_channels", rule)


LATTE = Preset("latte", "LatteTransformer3DModel", _check, build, describe, key_map)

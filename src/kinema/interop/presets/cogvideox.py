"""CogVideoX (Yang et al. 2024): caption and video through the same weights in one softmax, modulated apart."""

import math
from typing import cast

from torch import nn

from kinema.interop.keymap import Chain, Fused, Inverse, KeyMap, Layout, Reshaped, Rule, Same
from kinema.interop.preset import Names, Preset, Record
from kinema.interop.presets.described import check_described
from kinema.interop.presets.rules import fixed_choices, require, width_of
from kinema.models.dit import (
    Activation,
    DiT,
    DiTConfig,
    ModulationSource,
    PositionEmbedding,
    QKNorm,
    Rope,
    TextEdge,
    TextEmbedding,
)

COMPRESSION = 4  # frames of pixels in a latent one
TRAINED = {  # what the reference's tables start from; its own clips, captions and frames may have any size
    "sample_width": 90,
    "sample_height": 60,
    "sample_frames": 49,
    "temporal_compression_ratio": COMPRESSION,
    "max_text_seq_length": 226,
}
UNREAD_SCALE = 1.875  # the default, which every release with rotary positions has and none reads
FIXED = {
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "dropout": 0.0,
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "patch_bias": True,
}

"""Name in `diffusers`, and here."""

NAMES: list[Names] = [
    ("patch_embed.text_proj.{p}", "text_embedding.{p}"),
    ("patch_embed.proj.bias", "patch_embedding.bias"),
    ("time_embedding.linear_1.{p}", "timestep_embedding.expand.{p}"),
    ("time_embedding.linear_2.{p}", "timestep_embedding.project.{p}"),
    ("norm_out.linear.{p}", "head_modulation.{p}"),
    ("proj_out.{p}", "head.{p}"),
    ("transformer_blocks.{i}.attn1.to_q.{p}", "blocks.{i}.sublayers.0.operation.streams.video.query.{p}"),
    ("transformer_blocks.{i}.attn1.to_k.{p}", "blocks.{i}.sublayers.0.operation.streams.video.key.{p}"),
    ("transformer_blocks.{i}.attn1.to_v.{p}", "blocks.{i}.sublayers.0.operation.streams.video.value.{p}"),
    ("transformer_blocks.{i}.attn1.to_out.0.{p}", "blocks.{i}.sublayers.0.operation.streams.video.project.{p}"),
    ("transformer_blocks.{i}.attn1.norm_q.{p}", "blocks.{i}.sublayers.0.operation.streams.video.query_norm.{p}"),
    ("transformer_blocks.{i}.attn1.norm_k.{p}", "blocks.{i}.sublayers.0.operation.streams.video.key_norm.{p}"),
    ("transformer_blocks.{i}.ff.net.0.proj.{p}", "blocks.{i}.sublayers.1.operation.expand.{p}"),
    ("transformer_blocks.{i}.ff.net.2.{p}", "blocks.{i}.sublayers.1.operation.project.{p}"),
]
OFS: list[Names] = [
    ("ofs_embedding.linear_1.{p}", "ofs_embedding.expand.{p}"),
    ("ofs_embedding.linear_2.{p}", "ofs_embedding.project.{p}"),
]
NORMS: list[Names] = [
    ("norm_final.{p}", "final_norm.{p}"),
    ("norm_out.norm.{p}", "head_norm.{p}"),
    ("transformer_blocks.{i}.norm1.norm.{p}", "blocks.{i}.sublayers.0.norm.{p}"),
    ("transformer_blocks.{i}.norm2.norm.{p}", "blocks.{i}.sublayers.1.norm.{p}"),
]


def build(record: Record) -> DiT:
    """CogVideoXTransformer3DModel's config -> the same model here.

    The reference takes clips with frames before channels, timesteps from 0 to 1000 of a noise schedule, and, where it
    has rotary positions, their table; it predicts that schedule's velocity.
    """
    return DiT(_config(record), record["out_channels"], record["text_embed_dim"])


def describe(module: nn.Module) -> Record:
    """The inverse of `build`."""
    model = cast(DiT, module)
    config = model.config
    pt, side, _ = config.patch_size
    rotary, learned = config.rope is Rope.axes, config.position_embedding is PositionEmbedding.learned
    record = {
        **FIXED,
        **(_trained_on(config) if learned else TRAINED),
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": model.latent_channels + config.condition_channels,
        "out_channels": model.latent_channels,
        "time_embed_dim": config.timestep_width,
        "ofs_embed_dim": config.ofs_channels or None,
        "text_embed_dim": model.text_width,
        "num_layers": config.depth,
        "attention_bias": True,
        "patch_size": side,
        "patch_size_t": None if pt == 1 else pt,
        "norm_elementwise_affine": config.norm_affine,
        "norm_eps": config.norm_eps,
        "spatial_interpolation_scale": UNREAD_SCALE if rotary else config.position_scale[1],
        "temporal_interpolation_scale": config.position_scale[0],
        "use_rotary_positional_embeddings": rotary,
        "use_learned_positional_embeddings": learned,
    }
    check_described("CogVideoXTransformer3DModel", config, _config(record))
    return record


def key_map(record: Record) -> KeyMap:
    """Names in `diffusers`."""
    width, side = width_of(record), record["patch_size"]
    kernel: Layout = Same()
    if record["patch_size_t"] is None:
        kernel = Reshaped((width, record["in_channels"], side, side), (width, -1))
    names = NAMES + (NORMS if record["norm_elementwise_affine"] else []) + (OFS if record["ofs_embed_dim"] else [])
    learned = [_places(record, width)] if record["use_learned_positional_embeddings"] else []
    both = ("transformer_blocks.{i}.norm1.linear.{p}", "transformer_blocks.{i}.norm2.linear.{p}")
    return KeyMap(
        [
            *(Rule(theirs, ours) for theirs, ours in names),
            *learned,
            Rule("patch_embed.proj.weight", "patch_embedding.weight", kernel),
            Rule(both, "blocks.{i}.modulation.linear.{p}", Inverse(Fused((6 * width, 6 * width)))),
        ]
    )


def _places(record: Record, width: int) -> Rule:
    """Words and tokens in one table."""
    words, tokens = record["max_text_seq_length"], math.prod(_grid(record))
    layout = Chain((Reshaped((1, words + tokens, width), (words + tokens, width)), Fused((words, tokens))))
    return Rule("patch_embed.pos_embedding", ("places.words", "places.tokens"), layout)


def _grid(record: Record) -> list[int]:
    """Frames, rows and columns of tokens of a clip that has learned places."""
    side, frames = record["patch_size"], (record["sample_frames"] - 1) // record["temporal_compression_ratio"] + 1
    return [frames, record["sample_height"] // side, record["sample_width"] // side]


def _trained_on(config: DiTConfig) -> Record:
    """The inverse of `_grid`."""
    frames, height, width = (size * side for size, side in zip(config.position_grid, config.patch_size, strict=True))
    return TRAINED | {
        "sample_width": width,
        "sample_height": height,
        "sample_frames": (frames - 1) * COMPRESSION + 1,
        "max_text_seq_length": config.position_words,
    }


def _config(record: Record) -> DiTConfig:
    head, space = record["attention_head_dim"], record["spatial_interpolation_scale"]
    rotary, side = record["use_rotary_positional_embeddings"], record["patch_size"]
    learned = record["use_learned_positional_embeddings"]
    places = PositionEmbedding.learned if learned else PositionEmbedding.none
    width = record["num_attention_heads"] * head
    return DiTConfig(
        width=width,
        depth=record["num_layers"],
        num_heads=record["num_attention_heads"],
        mlp_ratio=4.0,
        patch_size=[record["patch_size_t"] or 1, side, side],
        condition_channels=record["in_channels"] - record["out_channels"],
        text=TextEdge.shared,
        activation=Activation.gelu_tanh,
        norm_eps=record["norm_eps"],
        norm_affine=record["norm_elementwise_affine"],
        final_norm=True,
        modulation=ModulationSource.linear,
        qk_norm=QKNorm.layer_head,
        rope=Rope.axes if rotary else Rope.none,
        rope_axes=[head // 4, head // 8 * 3, head // 8 * 3],
        position_embedding=places if rotary else PositionEmbedding.sincos_quarters,
        position_grid=_grid(record) if learned else [0, 0, 0],
        position_words=record["max_text_seq_length"] if learned else 0,
        position_scale=[1.0, 1.0, 1.0] if rotary else [record["temporal_interpolation_scale"], space, space],
        timestep_channels=width,
        timestep_width=record["time_embed_dim"],
        ofs_channels=record["ofs_embed_dim"] or 0,
        text_embedding=TextEmbedding.linear,
    )


def _check(record: Record) -> None:
    fixed_choices(record, attention_bias=True, **FIXED)
    width = record["time_embed_dim"]
    rule = f"only None or time_embed_dim, {width}, is implemented"
    require(record["ofs_embed_dim"] in (None, width), record, "ofs_embed_dim", rule)
    if record["use_learned_positional_embeddings"]:
        fixed_choices(record, use_rotary_positional_embeddings=True, patch_size_t=None)


COGVIDEOX = Preset("cogvideox", "CogVideoXTransformer3DModel", _check, build, describe, key_map)

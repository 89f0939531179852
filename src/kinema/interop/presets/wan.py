"""Wan 2.1 and 2.2 (Wan team 2025): text to video, image to video, and the 5B model with a timestep for each frame."""

from typing import cast

from torch import nn

from kinema.interop.keymap import KeyMap, Layout, PermutedRows, Reshaped, Rule, Same
from kinema.interop.preset import Preset, Record
from kinema.interop.presets.described import check_described
from kinema.models.dit import Activation, CrossNorm, DiT, DiTConfig, HeadModulation, QKNorm

TIMESTEPS = 1000.0
"""The reference takes timesteps from 0 to 1000, Kinema's times this; both predict noise - latents."""

Names = tuple[str, str, str]
"""Name in `diffusers`, in the vendor's files, and here."""

EDGES: list[Names] = [
    ("condition_embedder.time_embedder.linear_1.{p}", "time_embedding.0.{p}", "timestep_embedding.expand.{p}"),
    ("condition_embedder.time_embedder.linear_2.{p}", "time_embedding.2.{p}", "timestep_embedding.project.{p}"),
    ("condition_embedder.time_proj.{p}", "time_projection.1.{p}", "shared_modulation.{p}"),
    ("condition_embedder.text_embedder.linear_1.{p}", "text_embedding.0.{p}", "text_embedding.0.{p}"),
    ("condition_embedder.text_embedder.linear_2.{p}", "text_embedding.2.{p}", "text_embedding.2.{p}"),
]
IMAGE: list[Names] = [
    ("condition_embedder.image_embedder.norm1.{p}", "img_emb.proj.0.{p}", "image_embedding.0.{p}"),
    ("condition_embedder.image_embedder.ff.net.0.proj.{p}", "img_emb.proj.1.{p}", "image_embedding.1.{p}"),
    ("condition_embedder.image_embedder.ff.net.2.{p}", "img_emb.proj.3.{p}", "image_embedding.3.{p}"),
    ("condition_embedder.image_embedder.norm2.{p}", "img_emb.proj.4.{p}", "image_embedding.4.{p}"),
]
ATTENTION: list[Names] = [
    ("to_q.{p}", "q.{p}", "query.{p}"),
    ("to_k.{p}", "k.{p}", "key.{p}"),
    ("to_v.{p}", "v.{p}", "value.{p}"),
    ("to_out.0.{p}", "o.{p}", "project.{p}"),
    ("norm_q.weight", "norm_q.weight", "query_norm.weight"),
    ("norm_k.weight", "norm_k.weight", "key_norm.weight"),
]
IMAGE_ATTENTION: list[Names] = [
    ("add_k_proj.{p}", "k_img.{p}", "others.image.key.{p}"),
    ("add_v_proj.{p}", "v_img.{p}", "others.image.value.{p}"),
    ("norm_added_k.weight", "norm_k_img.weight", "others.image.key_norm.weight"),
]
MLP: list[Names] = [
    ("blocks.{i}.ffn.net.0.proj.{p}", "blocks.{i}.ffn.0.{p}", "blocks.{i}.sublayers.2.operation.expand.{p}"),
    ("blocks.{i}.ffn.net.2.{p}", "blocks.{i}.ffn.2.{p}", "blocks.{i}.sublayers.2.operation.project.{p}"),
]
CROSS_NORM: list[Names] = [("blocks.{i}.norm2.{p}", "blocks.{i}.norm3.{p}", "blocks.{i}.sublayers.1.norm.{p}")]


def build(record: Record) -> DiT:
    """WanTransformer3DModel's config -> the same model here."""
    return DiT(_config(record), record["out_channels"], record["text_dim"])


def describe(module: nn.Module) -> Record:
    """The inverse of `build`."""
    model = cast(DiT, module)
    config = model.config
    record = {
        "patch_size": list(config.patch_size),
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": model.latent_channels + config.condition_channels,
        "out_channels": model.latent_channels,
        "text_dim": model.text_width,
        "freq_dim": config.timestep_channels,
        "ffn_dim": config.hidden_width,
        "num_layers": config.depth,
        "cross_attn_norm": config.cross_norm is CrossNorm.affine,
        "qk_norm": "rms_norm_across_heads",
        "eps": config.norm_eps,
        "image_dim": config.image_width or None,
        "added_kv_proj_dim": config.width if config.image_width else None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": config.image_positions or None,
    }
    check_described("WanTransformer3DModel", config, _config(record))
    return record


def key_map(record: Record) -> KeyMap:
    """Names in `diffusers`."""
    return _map(record, 0, ("attn1", "attn2"), "proj_out", "scale_shift_table")


def original_key_map(record: Record) -> KeyMap:
    """Names in the files of Wan-AI's own repository."""
    return _map(record, 1, ("self_attn", "cross_attn"), "head.head", "modulation", head_table="head.modulation")


def _config(record: Record) -> DiTConfig:
    width, head = record["num_attention_heads"] * record["attention_head_dim"], record["attention_head_dim"]
    side = head // 6 * 2
    return DiTConfig(
        width=width,
        depth=record["num_layers"],
        num_heads=record["num_attention_heads"],
        mlp_ratio=record["ffn_dim"] / width,
        patch_size=list(record["patch_size"]),
        condition_channels=record["in_channels"] - record["out_channels"],
        activation=Activation.gelu_tanh,
        norm_eps=record["eps"],
        cross_norm=CrossNorm.affine if record["cross_attn_norm"] else CrossNorm.none,
        head_modulation=HeadModulation.table,
        qk_norm=QKNorm.rms_all,
        qk_norm_eps=record["eps"],
        rope_axes=[head - 2 * side, side, side],
        timestep_channels=record["freq_dim"],
        text_activation=Activation.gelu_tanh,
        image_width=record["image_dim"] or 0,
        image_positions=record["pos_embed_seq_len"] or 0,
    )


def _map(
    record: Record, side: int, attentions: tuple[str, str], head: str, table: str, head_table: str = "scale_shift_table"
) -> KeyMap:
    image, cross_norm = record["image_dim"] is not None, record["cross_attn_norm"]
    names = EDGES + MLP + (IMAGE if image else []) + (CROSS_NORM if cross_norm else [])
    rules = [Rule(name[side], name[2]) for name in names]
    for place, attention in enumerate(attentions):
        for name in ATTENTION + (IMAGE_ATTENTION if image and place == 1 else []):
            rules.append(
                Rule(f"blocks.{{i}}.{attention}.{name[side]}", f"blocks.{{i}}.sublayers.{place}.operation.{name[2]}")
            )

    width = record["num_attention_heads"] * record["attention_head_dim"]
    patch, channels = tuple(record["patch_size"]), record["out_channels"]
    if places := record["pos_embed_seq_len"]:
        theirs = ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos")[side]
        shape = (places, record["image_dim"])
        rules.append(Rule(theirs, "image_positions", Reshaped((1, *shape), shape)))
    kernel: Layout = Reshaped((width, record["in_channels"], *patch), (width, -1))
    rows = PermutedRows((*patch, channels), (3, 0, 1, 2))
    return KeyMap(
        [
            *rules,
            Rule("patch_embedding.weight", "patch_embedding.weight", kernel),
            Rule("patch_embedding.bias", "patch_embedding.bias", Same()),
            Rule(f"blocks.{{i}}.{table}", "blocks.{i}.modulation.table", Reshaped((1, 6, width), (-1,))),
            Rule(head_table, "head_modulation.table", Reshaped((1, 2, width), (-1,))),
            Rule(f"{head}.{{p}}", "head.{p}", rows),
        ]
    )


def _accepts(record: Record) -> bool:
    width = record["num_attention_heads"] * record["attention_head_dim"]
    return (
        record["qk_norm"] == "rms_norm_across_heads"
        and (record["pos_embed_seq_len"] is None or record["image_dim"] is not None)
        and record["added_kv_proj_dim"] == (None if record["image_dim"] is None else width)
    )


WAN = Preset("wan", "WanTransformer3DModel", _accepts, build, describe, key_map, original_key_map)

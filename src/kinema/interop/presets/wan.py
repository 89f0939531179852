"""Wan 2.1 and 2.2 (Wan team 2025): text to video, image to video, and the 5B model with a timestep for each frame.

Wan VACE (Jiang et al. 2025) is Wan with a control tower.
"""

from typing import cast

from torch import nn

from kinema.interop.keymap import KeyMap, PermutedRows, Reshaped, Rule
from kinema.interop.preset import Preset, Record
from kinema.interop.presets.described import check_described
from kinema.interop.presets.rules import fixed_choices, require, width_of
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
    ("ffn.net.0.proj.{p}", "ffn.0.{p}", "sublayers.2.operation.expand.{p}"),
    ("ffn.net.2.{p}", "ffn.2.{p}", "sublayers.2.operation.project.{p}"),
]
CROSS_NORM: list[Names] = [("norm2.{p}", "norm3.{p}", "sublayers.1.norm.{p}")]
CONTROL: list[Names] = [
    ("vace_blocks.0.proj_in.{p}", "vace_blocks.0.before_proj.{p}", "control.enter.{p}"),
    ("vace_blocks.{i}.proj_out.{p}", "vace_blocks.{i}.after_proj.{p}", "control.hints.{i}.{p}"),
]
TOWERS = {"blocks": "blocks", "vace_blocks": "control.blocks"}
"""Blocks in all files, and here."""


def build(record: Record) -> DiT:
    """WanTransformer3DModel's config, or WanVACETransformer3DModel's -> the same model here."""
    return DiT(_config(record), record["out_channels"], record["text_dim"])


def describe(module: nn.Module) -> Record:
    """The inverse of `build`."""
    model = cast(DiT, module)
    record = _record(model)
    check_described("WanTransformer3DModel", model.config, _config(record))
    return record


def describe_vace(module: nn.Module) -> Record:
    """The inverse of `build`, for a model with a control tower."""
    model = cast(DiT, module)
    config = model.config
    if config.control_layers[:1] != [0]:
        raise ValueError(
            f"WanVACETransformer3DModel cannot be model.control_layers={config.control_layers}: its tower adds to the "
            "first block, 0, and maybe to others."
        )
    record = _record(model) | {
        "vace_layers": list(config.control_layers),
        "vace_in_channels": config.control_channels,
    }
    check_described("WanVACETransformer3DModel", config, _config(record))
    return record


def key_map(record: Record) -> KeyMap:
    """Names in `diffusers`."""
    return _map(record, 0, ("attn1", "attn2"), "proj_out", "scale_shift_table")


def original_key_map(record: Record) -> KeyMap:
    """Names in the files of Wan-AI's own repository."""
    return _map(record, 1, ("self_attn", "cross_attn"), "head.head", "modulation", head_table="head.modulation")


def _record(model: DiT) -> Record:
    config = model.config
    return {
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


def _config(record: Record) -> DiTConfig:
    width, head = width_of(record), record["attention_head_dim"]
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
        control_layers=list(record.get("vace_layers", [])),
        control_channels=record.get("vace_in_channels", 0),
    )


def _map(
    record: Record, side: int, attentions: tuple[str, str], head: str, table: str, head_table: str = "scale_shift_table"
) -> KeyMap:
    image, tower = record["image_dim"] is not None, "vace_layers" in record
    rules = [Rule(name[side], name[2]) for name in EDGES + (IMAGE if image else []) + (CONTROL if tower else [])]
    width = width_of(record)
    for theirs, ours in TOWERS.items() if tower else [("blocks", "blocks")]:
        blocks = _block_names(record, side, attentions)
        rules += [Rule(f"{theirs}.{{i}}.{there}", f"{ours}.{{i}}.{here}") for there, here in blocks]
        modulation = Reshaped((1, 6, width), (-1,))
        rules.append(Rule(f"{theirs}.{{i}}.{table}", f"{ours}.{{i}}.modulation.table", modulation))

    patch, channels = tuple(record["patch_size"]), record["out_channels"]
    if places := record["pos_embed_seq_len"]:
        theirs = ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos")[side]
        shape = (places, record["image_dim"])
        rules.append(Rule(theirs, "image_positions", Reshaped((1, *shape), shape)))
    kernels = [("patch_embedding", "patch_embedding", record["in_channels"])]
    kernels += [("vace_patch_embedding", "control.patch_embedding", record["vace_in_channels"])] if tower else []
    for theirs, ours, given in kernels:
        kernel = Reshaped((width, given, *patch), (width, -1))
        rules += [Rule(f"{theirs}.weight", f"{ours}.weight", kernel), Rule(f"{theirs}.bias", f"{ours}.bias")]
    rows = PermutedRows((*patch, channels), (3, 0, 1, 2))
    rules.append(Rule(head_table, "head_modulation.table", Reshaped((1, 2, width), (-1,))))
    return KeyMap([*rules, Rule(f"{head}.{{p}}", "head.{p}", rows)])


def _block_names(record: Record, side: int, attentions: tuple[str, str]) -> list[tuple[str, str]]:
    """Names inside a block, theirs and ours."""
    image = record["image_dim"] is not None
    found = [(name[side], name[2]) for name in MLP + (CROSS_NORM if record["cross_attn_norm"] else [])]
    for place, attention in enumerate(attentions):
        names = ATTENTION + (IMAGE_ATTENTION if image and place == 1 else [])
        found += [(f"{attention}.{name[side]}", f"sublayers.{place}.operation.{name[2]}") for name in names]
    return found


def _check(record: Record) -> None:
    """Of any `qk_norm`: the reference's class always has the same norms and never reads it."""
    width, has_image = width_of(record), record["image_dim"] is not None
    fixed_choices(record, added_kv_proj_dim=width if has_image else None)
    require(has_image or record["pos_embed_seq_len"] is None, record, "pos_embed_seq_len", "it needs an image_dim")


WAN = Preset("wan", "WanTransformer3DModel", _check, build, describe, key_map, original_key_map)
WAN_VACE = Preset("wan_vace", "WanVACETransformer3DModel", _check, build, describe_vace, key_map, original_key_map)

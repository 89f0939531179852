"""HunyuanVideo-1.5 (Tencent 2025): two streams throughout, in which an image and glyphs join the caption."""

from typing import cast

from torch import nn

from kinema.interop.keymap import KeyMap, ReorderedRows, Rule
from kinema.interop.preset import Preset, Record
from kinema.interop.presets.described import check_described
from kinema.interop.presets.hunyuan import (
    ORIGINAL_EDGES,
    REFINER,
    SEGMENTS,
    Names,
    dual_rules,
    kernel,
    original_dual_rules,
    original_refiner_rules,
)
from kinema.interop.presets.rules import fixed_choices, width_of
from kinema.models.dit import Activation, DiT, DiTConfig, ModulationSource, QKNorm, TextEdge, TextEmbedding

GLYPH_HIDDEN = 2048  # of the reference, whatever its config says
UNREAD = {"target_size": 640, "task_type": "i2v"}
"""What pipelines read of the config; the model is the same for every task."""

EDGES: list[Names] = [
    ("x_embedder.proj.bias", "patch_embedding.bias"),
    ("time_embed.timestep_embedder.linear_1.{p}", "timestep_embedding.expand.{p}"),
    ("time_embed.timestep_embedder.linear_2.{p}", "timestep_embedding.project.{p}"),
    ("context_embedder_2.norm.{p}", "glyph_embedding.0.{p}"),
    ("context_embedder_2.linear_1.{p}", "glyph_embedding.1.{p}"),
    ("context_embedder_2.linear_2.{p}", "glyph_embedding.3.{p}"),
    ("context_embedder_2.linear_3.{p}", "glyph_embedding.5.{p}"),
    ("image_embedder.norm_in.{p}", "image_embedding.0.{p}"),
    ("image_embedder.linear_1.{p}", "image_embedding.1.{p}"),
    ("image_embedder.linear_2.{p}", "image_embedding.3.{p}"),
    ("image_embedder.norm_out.{p}", "image_embedding.4.{p}"),
    ("cond_type_embed.weight", "source_types"),
    ("proj_out.{p}", "head.{p}"),
]
ORIGINAL_SOURCES: list[Names] = [
    ("byt5_in.layernorm.{p}", "glyph_embedding.0.{p}"),
    ("byt5_in.fc1.{p}", "glyph_embedding.1.{p}"),
    ("byt5_in.fc2.{p}", "glyph_embedding.3.{p}"),
    ("byt5_in.fc3.{p}", "glyph_embedding.5.{p}"),
    ("vision_in.proj.{i}.{p}", "image_embedding.{i}.{p}"),
    ("cond_type_embedding.weight", "source_types"),
]
ORIGINAL_QKV: list[Names] = [("q", "query"), ("k", "key"), ("v", "value")]


def build(record: Record) -> DiT:
    """HunyuanVideo15Transformer3DModel's config -> the same model here.

    The reference takes timesteps times 1000, masks instead of captions of any length, and an image of zeros where ours
    has none; both predict noise - latents.
    """
    return DiT(_config(record), record["out_channels"], record["text_embed_dim"])


def describe(module: nn.Module) -> Record:
    """The inverse of `build`."""
    model = cast(DiT, module)
    config = model.config
    record = {
        **UNREAD,
        "in_channels": model.latent_channels + config.condition_channels,
        "out_channels": model.latent_channels,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "num_layers": config.depth,
        "num_refiner_layers": config.refiner_depth,
        "mlp_ratio": config.mlp_ratio,
        "patch_size": config.patch_size[1],
        "patch_size_t": config.patch_size[0],
        "qk_norm": "rms_norm",
        "text_embed_dim": model.text_width,
        "text_embed_2_dim": config.glyph_width,
        "image_embed_dim": config.image_width,
        "rope_theta": config.rope_theta,
        "rope_axes_dim": list(config.rope_axes),
        "use_meanflow": False,
    }
    check_described("HunyuanVideo15Transformer3DModel", config, _config(record))
    return record


def key_map(record: Record) -> KeyMap:
    """Names in `diffusers`."""
    rules = [Rule(theirs, ours) for theirs, ours in EDGES]
    rules += [Rule(f"context_embedder.{theirs}", f"text_embedding.{ours}") for theirs, ours in REFINER]
    rules += [Rule("x_embedder.proj.weight", "patch_embedding.weight", kernel(record))]
    rules += [Rule("norm_out.linear.{p}", "head_modulation.{p}", ReorderedRows((1, 0)))]
    return KeyMap(rules + dual_rules(record["num_layers"], width_of(record)))


def original_key_map(record: Record) -> KeyMap:
    """Names in Tencent's own files, where only the captions' own transformer has queries, keys and values in one."""
    rules = [Rule(theirs, ours) for theirs, ours in ORIGINAL_EDGES + ORIGINAL_SOURCES]
    rules += original_refiner_rules(width_of(record))
    rules += [Rule("img_in.proj.weight", "patch_embedding.weight", kernel(record))]
    for block in range(record["num_layers"]):
        rules += original_dual_rules(block, width_of(record))
        for prefix, segment in SEGMENTS:
            there, here = (
                f"double_blocks.{block}.{prefix}_attn_",
                f"blocks.{block}.sublayers.0.operation.streams.{segment}",
            )
            rules += [Rule(f"{there}{theirs}.{{p}}", f"{here}.{ours}.{{p}}") for theirs, ours in ORIGINAL_QKV]
    return KeyMap(rules)


def _config(record: Record) -> DiTConfig:
    return DiTConfig(
        width=width_of(record),
        depth=record["num_layers"],
        num_heads=record["num_attention_heads"],
        mlp_ratio=record["mlp_ratio"],
        patch_size=[record["patch_size_t"], record["patch_size"], record["patch_size"]],
        condition_channels=record["in_channels"] - record["out_channels"],
        text=TextEdge.joint,
        text_to_the_end=True,
        activation=Activation.gelu_tanh,
        modulation=ModulationSource.linear,
        qk_norm=QKNorm.rms_head,
        rope_axes=list(record["rope_axes_dim"]),
        rope_theta=record["rope_theta"],
        text_embedding=TextEmbedding.refiner,
        refiner_depth=record["num_refiner_layers"],
        image_width=record["image_embed_dim"],
        glyph_width=record["text_embed_2_dim"],
        glyph_hidden_width=GLYPH_HIDDEN,
    )


def _check(record: Record) -> None:
    """All but the super-resolution models, which know a second timestep."""
    fixed_choices(record, qk_norm="rms_norm", use_meanflow=False)


HUNYUAN_15 = Preset("hunyuan15", "HunyuanVideo15Transformer3DModel", _check, build, describe, key_map, original_key_map)

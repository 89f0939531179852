"""Mochi 1 (Genmo 2024): video and caption in one softmax at two widths, places with learned frequencies."""

from dataclasses import replace
from typing import cast

from torch import nn

from kinema.interop.keymap import (
    Chain,
    Fused,
    Inverse,
    KeyMap,
    Layout,
    MovedRows,
    PermutedRows,
    ReorderedRows,
    Reshaped,
    Rule,
)
from kinema.interop.preset import Names, Preset, Record
from kinema.interop.presets.described import check_described
from kinema.interop.presets.rules import fixed_choices, require, same_channels, width_of
from kinema.models.dit import (
    Activation,
    DiT,
    DiTConfig,
    ModulationSource,
    NormKind,
    QKNorm,
    Rope,
    TextEdge,
    TextEmbedding,
)

MLP_RATIO = 8 / 3
POOLING_HEADS = 8  # of the reference, whatever its config says
FIXED = {"qk_norm": "rms_norm", "activation_fn": "swiglu"}
UNREAD = {"max_sequence_length": 256}
"""What pipelines pad captions to; the model takes any number of words."""

"""Name in `diffusers` or in Genmo's files, and here."""

EDGES: list[Names] = [
    ("patch_embed.proj.bias", "patch_embedding.bias"),
    ("time_embed.timestep_embedder.linear_1.{p}", "timestep_embedding.expand.{p}"),
    ("time_embed.timestep_embedder.linear_2.{p}", "timestep_embedding.project.{p}"),
    ("time_embed.pooler.to_q.{p}", "pooled_text.query.{p}"),
    ("time_embed.pooler.to_out.{p}", "pooled_text.project.{p}"),
    ("time_embed.caption_proj.{p}", "text_embedding.{p}"),
    ("pos_frequencies", "rope_frequencies"),
]
STREAMS: list[Names] = [
    ("to_q.weight", "video.query.weight"),
    ("to_k.weight", "video.key.weight"),
    ("to_v.weight", "video.value.weight"),
    ("to_out.0.{p}", "video.project.{p}"),
    ("norm_q.weight", "video.query_norm.weight"),
    ("norm_k.weight", "video.key_norm.weight"),
    ("add_q_proj.weight", "text.query.weight"),
    ("add_k_proj.weight", "text.key.weight"),
    ("add_v_proj.weight", "text.value.weight"),
    ("to_add_out.{p}", "text.project.{p}"),
    ("norm_added_q.weight", "text.query_norm.weight"),
    ("norm_added_k.weight", "text.key_norm.weight"),
]
ORIGINAL_EDGES: list[Names] = [
    ("x_embedder.proj.bias", "patch_embedding.bias"),
    ("t_embedder.mlp.0.{p}", "timestep_embedding.expand.{p}"),
    ("t_embedder.mlp.2.{p}", "timestep_embedding.project.{p}"),
    ("t5_y_embedder.to_q.{p}", "pooled_text.query.{p}"),
    ("t5_y_embedder.to_out.{p}", "pooled_text.project.{p}"),
    ("t5_yproj.{p}", "text_embedding.{p}"),
    ("pos_frequencies", "rope_frequencies"),
    ("final_layer.mod.{p}", "head_modulation.{p}"),
]
ORIGINAL_STREAMS: list[Names] = [
    ("q_norm_x.weight", "video.query_norm.weight"),
    ("k_norm_x.weight", "video.key_norm.weight"),
    ("proj_x.{p}", "video.project.{p}"),
    ("q_norm_y.weight", "text.query_norm.weight"),
    ("k_norm_y.weight", "text.key_norm.weight"),
    ("proj_y.{p}", "text.project.{p}"),
]
POOLED = ("pooled_text.key.{p}", "pooled_text.value.{p}")
SEGMENTS = (("x", "video"), ("y", "text"))
"""In Genmo's files, and here."""


def build(record: Record) -> DiT:
    """MochiTransformer3DModel's config -> the same model here.

    The reference counts time from noise, 0, to data, 1000, takes masks instead of captions of any length, and predicts
    latents - noise.
    """
    return DiT(_config(record), record["in_channels"], record["text_embed_dim"])


def describe(module: nn.Module) -> Record:
    """The inverse of `build`; where frequencies began to learn is nothing that the reference knows."""
    model = cast(DiT, module)
    config = model.config
    record = {
        **FIXED,
        **UNREAD,
        "patch_size": config.patch_size[1],
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "num_layers": config.depth,
        "pooled_projection_dim": config.caption_width,
        "in_channels": model.latent_channels,
        "out_channels": None,
        "text_embed_dim": model.text_width,
        "time_embed_dim": config.timestep_channels,
    }
    check_described("MochiTransformer3DModel", config, replace(_config(record), rope_theta=config.rope_theta))
    return record


def key_map(record: Record) -> KeyMap:
    """Names in `diffusers`."""
    pooled = record["text_embed_dim"]
    rules = [Rule(theirs, ours) for theirs, ours in EDGES]
    rules += [
        Rule("patch_embed.proj.weight", "patch_embedding.weight", _kernel(record)),
        Rule("time_embed.pooler.to_kv.{p}", POOLED, Fused((pooled, pooled))),
        Rule("norm_out.linear.{p}", "head_modulation.{p}", ReorderedRows((1, 0))),
        Rule("proj_out.{p}", "head.{p}", _pixels(record)),
    ]
    for block in range(record["num_layers"]):
        there, here = f"transformer_blocks.{block}", f"blocks.{block}"
        streams = f"{here}.sublayers.0.operation.streams"
        rules += [Rule(f"{there}.attn1.{theirs}", f"{streams}.{ours}") for theirs, ours in STREAMS]
        last = "_1" if block == record["num_layers"] - 1 else ""
        slots = (f"{there}.norm1.linear.{{p}}", f"{there}.norm1_context.linear{last}.{{p}}")
        rules.append(Rule(slots, f"{here}.modulation.linear.{{p}}", _slots(record, block)))
        for number, (mlp, width) in enumerate(zip(("ff", "ff_context"), _widths(record), strict=True), start=1):
            operation = f"{here}.sublayers.{number}.operation"
            both = (f"{operation}.expand.weight", f"{operation}.gate.weight")
            hidden = _hidden(width)
            rules.append(Rule(f"{there}.{mlp}.net.0.proj.weight", both, Fused((hidden, hidden))))
            rules.append(Rule(f"{there}.{mlp}.net.2.weight", f"{operation}.project.weight"))
    return KeyMap(rules)


def original_key_map(record: Record) -> KeyMap:
    """Names in Genmo's own files, where queries, keys and values are one tensor."""
    inner, pooled = _widths(record)[0], record["text_embed_dim"]
    rules = [Rule(theirs, ours) for theirs, ours in ORIGINAL_EDGES]
    rules += [
        Rule("x_embedder.proj.weight", "patch_embedding.weight", _kernel(record)),
        Rule("t5_y_embedder.to_kv.{p}", POOLED, Fused((pooled, pooled))),
        Rule("final_layer.linear.{p}", "head.{p}", _pixels(record)),
    ]
    for block in range(record["num_layers"]):
        there, here = f"blocks.{block}", f"blocks.{block}"
        streams = f"{here}.sublayers.0.operation.streams"
        rules += [Rule(f"{there}.attn.{theirs}", f"{streams}.{ours}") for theirs, ours in ORIGINAL_STREAMS]
        slots = (f"{there}.mod_x.{{p}}", f"{there}.mod_y.{{p}}")
        rules.append(Rule(slots, f"{here}.modulation.linear.{{p}}", _slots(record, block)))
        for number, ((theirs, ours), width) in enumerate(zip(SEGMENTS, _widths(record), strict=True), start=1):
            qkv = tuple(f"{streams}.{ours}.{name}.weight" for name in ("query", "key", "value"))
            rules.append(Rule(f"{there}.attn.qkv_{theirs}.weight", qkv, Fused((inner,) * 3)))
            operation = f"{here}.sublayers.{number}.operation"
            both = (f"{operation}.gate.weight", f"{operation}.expand.weight")
            hidden = _hidden(width)
            rules.append(Rule(f"{there}.mlp_{theirs}.w1.weight", both, Fused((hidden, hidden))))
            rules.append(Rule(f"{there}.mlp_{theirs}.w2.weight", f"{operation}.project.weight"))
    return KeyMap(rules)


def _kernel(record: Record) -> Layout:
    """A convolution over patches as a linear layer."""
    side, (width, _) = record["patch_size"], _widths(record)
    return Reshaped((width, record["in_channels"], side, side), (width, -1))


def _pixels(record: Record) -> Layout:
    side = record["patch_size"]
    return PermutedRows((side, side, record["in_channels"]), (2, 0, 1))


def _slots(record: Record, block: int) -> Layout:
    """Theirs: scale and gate of attention and MLP, of the video and then of the caption; ours: attention of both first.

    The last block reads the caption alone, with a scale.
    """
    video, text = (2 * width for width in _widths(record))
    if block < record["num_layers"] - 1:
        return Chain((Inverse(Fused((2 * video, 2 * text))), MovedRows((video, video, text, text), (0, 2, 1, 3))))
    scale = text // 2
    return Chain((Inverse(Fused((2 * video, scale))), MovedRows((video, video, scale), (0, 2, 1))))


def _widths(record: Record) -> tuple[int, int]:
    """Of the video and of captions."""
    return width_of(record), record["pooled_projection_dim"]


def _hidden(width: int) -> int:
    """Channels inside an MLP of the reference."""
    return 8 * width // 3


def _config(record: Record) -> DiTConfig:
    side, head = record["patch_size"], record["attention_head_dim"]
    return DiTConfig(
        width=record["num_attention_heads"] * head,
        depth=record["num_layers"],
        num_heads=record["num_attention_heads"],
        mlp_ratio=MLP_RATIO,
        patch_size=[1, side, side],
        text=TextEdge.joint,
        text_channels=record["pooled_projection_dim"],
        text_queries_to_the_end=True,
        text_embedding=TextEmbedding.linear,
        activation=Activation.swiglu,
        mlp_bias=False,
        qkv_bias=False,
        norm=NormKind.rms,
        sandwich_norm=True,
        modulation=ModulationSource.linear,
        modulation_shift=False,
        tanh_gates=True,
        qk_norm=QKNorm.rms_head,
        qk_norm_eps=1e-5,
        rope=Rope.learned,
        rope_side=192.0,
        timestep_channels=record["time_embed_dim"],
        pooled_text=True,
        pooled_text_heads=POOLING_HEADS,
        reversed_time=True,
    )


def _check(record: Record) -> None:
    """The reference rounds the width of its MLPs down, we to the nearest: widths at which that is the same."""
    fixed_choices(record, **FIXED)
    same_channels(record)
    fits = all(_hidden(width) == round(width * MLP_RATIO) for width in _widths(record))
    rule = "8/3 of this width and of pooled_projection_dim must round up and down to the same"
    require(fits, record, "attention_head_dim", rule)


MOCHI = Preset("mochi", "MochiTransformer3DModel", _check, build, describe, key_map, original_key_map)

"""HunyuanVideo (Kong et al. 2024): two streams in one softmax, then single streams; captions through a refiner."""

from collections.abc import Sequence
from typing import cast

from torch import nn

from kinema.interop.keymap import Chain, Fused, Inverse, KeyMap, Layout, ReorderedRows, Reshaped, Rule
from kinema.interop.preset import Names, Preset, Record
from kinema.interop.presets.described import check_described
from kinema.interop.presets.rules import fixed_choices, require, width_of
from kinema.models.dit import Activation, DiT, DiTConfig, ModulationSource, QKNorm, TextEdge, TextEmbedding

"""Name in `diffusers` or in Tencent's files, and here."""

EDGES: list[Names] = [
    ("x_embedder.proj.bias", "patch_embedding.bias"),
    ("time_text_embed.timestep_embedder.linear_1.{p}", "timestep_embedding.expand.{p}"),
    ("time_text_embed.timestep_embedder.linear_2.{p}", "timestep_embedding.project.{p}"),
    ("time_text_embed.text_embedder.linear_1.{p}", "pooled_embedding.expand.{p}"),
    ("time_text_embed.text_embedder.linear_2.{p}", "pooled_embedding.project.{p}"),
    ("proj_out.{p}", "head.{p}"),
]
GUIDANCE: list[Names] = [
    ("time_text_embed.guidance_embedder.linear_1.{p}", "guidance_embedding.expand.{p}"),
    ("time_text_embed.guidance_embedder.linear_2.{p}", "guidance_embedding.project.{p}"),
]
REFINER: list[Names] = [
    ("proj_in.{p}", "embed.{p}"),
    ("time_text_embed.timestep_embedder.linear_1.{p}", "timestep_embedding.expand.{p}"),
    ("time_text_embed.timestep_embedder.linear_2.{p}", "timestep_embedding.project.{p}"),
    ("time_text_embed.text_embedder.linear_1.{p}", "pooled_embedding.expand.{p}"),
    ("time_text_embed.text_embedder.linear_2.{p}", "pooled_embedding.project.{p}"),
    ("token_refiner.refiner_blocks.{i}.norm1.{p}", "blocks.{i}.sublayers.0.norm.{p}"),
    ("token_refiner.refiner_blocks.{i}.attn.to_q.{p}", "blocks.{i}.sublayers.0.operation.query.{p}"),
    ("token_refiner.refiner_blocks.{i}.attn.to_k.{p}", "blocks.{i}.sublayers.0.operation.key.{p}"),
    ("token_refiner.refiner_blocks.{i}.attn.to_v.{p}", "blocks.{i}.sublayers.0.operation.value.{p}"),
    ("token_refiner.refiner_blocks.{i}.attn.to_out.0.{p}", "blocks.{i}.sublayers.0.operation.project.{p}"),
    ("token_refiner.refiner_blocks.{i}.norm2.{p}", "blocks.{i}.sublayers.1.norm.{p}"),
    ("token_refiner.refiner_blocks.{i}.ff.net.0.proj.{p}", "blocks.{i}.sublayers.1.operation.expand.{p}"),
    ("token_refiner.refiner_blocks.{i}.ff.net.2.{p}", "blocks.{i}.sublayers.1.operation.project.{p}"),
    ("token_refiner.refiner_blocks.{i}.norm_out.linear.{p}", "blocks.{i}.modulation.linear.{p}"),
]
DUAL: list[Names] = [
    ("attn.to_q.{p}", "sublayers.0.operation.streams.video.query.{p}"),
    ("attn.to_k.{p}", "sublayers.0.operation.streams.video.key.{p}"),
    ("attn.to_v.{p}", "sublayers.0.operation.streams.video.value.{p}"),
    ("attn.to_out.0.{p}", "sublayers.0.operation.streams.video.project.{p}"),
    ("attn.norm_q.weight", "sublayers.0.operation.streams.video.query_norm.weight"),
    ("attn.norm_k.weight", "sublayers.0.operation.streams.video.key_norm.weight"),
    ("attn.add_q_proj.{p}", "sublayers.0.operation.streams.text.query.{p}"),
    ("attn.add_k_proj.{p}", "sublayers.0.operation.streams.text.key.{p}"),
    ("attn.add_v_proj.{p}", "sublayers.0.operation.streams.text.value.{p}"),
    ("attn.to_add_out.{p}", "sublayers.0.operation.streams.text.project.{p}"),
    ("attn.norm_added_q.weight", "sublayers.0.operation.streams.text.query_norm.weight"),
    ("attn.norm_added_k.weight", "sublayers.0.operation.streams.text.key_norm.weight"),
    ("ff.net.0.proj.{p}", "sublayers.1.operation.expand.{p}"),
    ("ff.net.2.{p}", "sublayers.1.operation.project.{p}"),
    ("ff_context.net.0.proj.{p}", "sublayers.2.operation.expand.{p}"),
    ("ff_context.net.2.{p}", "sublayers.2.operation.project.{p}"),
]
SINGLE: list[Names] = [
    ("attn.to_q.{p}", "query.{p}"),
    ("attn.to_k.{p}", "key.{p}"),
    ("attn.to_v.{p}", "value.{p}"),
    ("attn.norm_q.weight", "query_norm.weight"),
    ("attn.norm_k.weight", "key_norm.weight"),
    ("proj_mlp.{p}", "expand.{p}"),
    ("proj_out.{p}", "project.{p}"),
]
ORIGINAL_EDGES: list[Names] = [
    ("img_in.proj.bias", "patch_embedding.bias"),
    ("time_in.mlp.0.{p}", "timestep_embedding.expand.{p}"),
    ("time_in.mlp.2.{p}", "timestep_embedding.project.{p}"),
    ("final_layer.adaLN_modulation.1.{p}", "head_modulation.{p}"),
    ("final_layer.linear.{p}", "head.{p}"),
]
ORIGINAL_POOLED: list[Names] = [
    ("vector_in.in_layer.{p}", "pooled_embedding.expand.{p}"),
    ("vector_in.out_layer.{p}", "pooled_embedding.project.{p}"),
]
ORIGINAL_GUIDANCE: list[Names] = [
    ("guidance_in.mlp.0.{p}", "guidance_embedding.expand.{p}"),
    ("guidance_in.mlp.2.{p}", "guidance_embedding.project.{p}"),
]
ORIGINAL_REFINER: list[Names] = [
    ("input_embedder.{p}", "embed.{p}"),
    ("t_embedder.mlp.0.{p}", "timestep_embedding.expand.{p}"),
    ("t_embedder.mlp.2.{p}", "timestep_embedding.project.{p}"),
    ("c_embedder.linear_1.{p}", "pooled_embedding.expand.{p}"),
    ("c_embedder.linear_2.{p}", "pooled_embedding.project.{p}"),
    ("individual_token_refiner.blocks.{i}.norm1.{p}", "blocks.{i}.sublayers.0.norm.{p}"),
    ("individual_token_refiner.blocks.{i}.self_attn_proj.{p}", "blocks.{i}.sublayers.0.operation.project.{p}"),
    ("individual_token_refiner.blocks.{i}.norm2.{p}", "blocks.{i}.sublayers.1.norm.{p}"),
    ("individual_token_refiner.blocks.{i}.mlp.fc1.{p}", "blocks.{i}.sublayers.1.operation.expand.{p}"),
    ("individual_token_refiner.blocks.{i}.mlp.fc2.{p}", "blocks.{i}.sublayers.1.operation.project.{p}"),
    ("individual_token_refiner.blocks.{i}.adaLN_modulation.1.{p}", "blocks.{i}.modulation.linear.{p}"),
]
ORIGINAL_STREAM: list[Names] = [
    ("attn_q_norm.weight", "query_norm.weight"),
    ("attn_k_norm.weight", "key_norm.weight"),
    ("attn_proj.{p}", "project.{p}"),
]
ORIGINAL_SINGLE: list[Names] = [
    ("q_norm.weight", "query_norm.weight"),
    ("k_norm.weight", "key_norm.weight"),
    ("linear2.{p}", "project.{p}"),
]
QKV = ("query.{p}", "key.{p}", "value.{p}")
SEGMENTS = (("img", "video"), ("txt", "text"))
"""In Tencent's files, and here."""
DUAL_SLOTS = (0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11)
"""Theirs: attention and MLP of the video, then of the caption; ours: attention of both, MLP of each."""


def build(record: Record) -> DiT:
    """HunyuanVideoTransformer3DModel's config -> the same model here.

    The reference takes timesteps and guidance times 1000; both predict noise - latents.
    """
    return DiT(_config(record), record["out_channels"], record["text_embed_dim"])


def describe(module: nn.Module) -> Record:
    """The inverse of `build`."""
    model = cast(DiT, module)
    config = model.config
    record = {
        "in_channels": model.latent_channels + config.condition_channels,
        "out_channels": model.latent_channels,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "num_layers": config.depth - config.single_depth,
        "num_single_layers": config.single_depth,
        "num_refiner_layers": config.refiner_depth,
        "mlp_ratio": config.mlp_ratio,
        "patch_size": config.patch_size[1],
        "patch_size_t": config.patch_size[0],
        "qk_norm": "rms_norm",
        "guidance_embeds": config.guidance,
        "text_embed_dim": model.text_width,
        "pooled_projection_dim": config.pooled_width,
        "rope_theta": config.rope_theta,
        "rope_axes_dim": list(config.rope_axes),
        "image_condition_type": _image_condition(config),
    }
    check_described("HunyuanVideoTransformer3DModel", config, _config(record))
    return record


def key_map(record: Record) -> KeyMap:
    """Names in `diffusers`."""
    width, dual = width_of(record), record["num_layers"]
    rules = [Rule(theirs, ours) for theirs, ours in EDGES + (GUIDANCE if record["guidance_embeds"] else [])]
    rules += [Rule(f"context_embedder.{theirs}", f"text_embedding.{ours}") for theirs, ours in REFINER]
    rules += [Rule("x_embedder.proj.weight", "patch_embedding.weight", kernel(record))]
    rules += [Rule("norm_out.linear.{p}", "head_modulation.{p}", ReorderedRows((1, 0)))]
    rules += dual_rules(dual, width)
    for block in range(record["num_single_layers"]):
        there, here = f"single_transformer_blocks.{block}", f"blocks.{dual + block}"
        rules += [Rule(f"{there}.{theirs}", f"{here}.sublayers.0.operation.{ours}") for theirs, ours in SINGLE]
        rules.append(Rule(f"{there}.norm.linear.{{p}}", f"{here}.modulation.linear.{{p}}"))
    return KeyMap(rules)


def original_key_map(record: Record) -> KeyMap:
    """Names in Tencent's own files, where queries, keys and values are one tensor."""
    width, dual = width_of(record), record["num_layers"]
    qkv, hidden = Fused((width,) * 3), round(width * record["mlp_ratio"])
    edges = ORIGINAL_EDGES + ORIGINAL_POOLED + (ORIGINAL_GUIDANCE if record["guidance_embeds"] else [])
    rules = [Rule(theirs, ours) for theirs, ours in edges] + original_refiner_rules(width)
    rules += [Rule("img_in.proj.weight", "patch_embedding.weight", kernel(record))]
    for block in range(dual):
        rules += original_dual_rules(block, width)
        for prefix, segment in SEGMENTS:
            stream = f"blocks.{block}.sublayers.0.operation.streams.{segment}"
            rules.append(Rule(f"double_blocks.{block}.{prefix}_attn_qkv.{{p}}", _inside(stream, QKV), qkv))
    for block in range(record["num_single_layers"]):
        there, here = f"single_blocks.{block}", f"blocks.{dual + block}"
        operation = f"{here}.sublayers.0.operation"
        rules += [Rule(f"{there}.{theirs}", f"{operation}.{ours}") for theirs, ours in ORIGINAL_SINGLE]
        first = _inside(operation, (*QKV, "expand.{p}"))
        rules.append(Rule(f"{there}.linear1.{{p}}", first, Fused((width, width, width, hidden))))
        rules.append(Rule(f"{there}.modulation.linear.{{p}}", f"{here}.modulation.linear.{{p}}"))
    return KeyMap(rules)


def dual_rules(blocks: int, width: int) -> list[Rule]:
    """The blocks of two streams in `diffusers`, by number: those of one stream follow them here."""
    rules = []
    for block in range(blocks):
        there, here = f"transformer_blocks.{block}", f"blocks.{block}"
        rules += [Rule(f"{there}.{theirs}", f"{here}.{ours}") for theirs, ours in DUAL]
        both = (f"{there}.norm1.linear.{{p}}", f"{there}.norm1_context.linear.{{p}}")
        rules.append(Rule(both, f"{here}.modulation.linear.{{p}}", _slots(width)))
    return rules


def original_dual_rules(block: int, width: int) -> list[Rule]:
    """A block of two streams in Tencent's files, but for its queries, keys and values."""
    there, here, rules = f"double_blocks.{block}", f"blocks.{block}", list[Rule]()
    for number, (prefix, segment) in enumerate(SEGMENTS):
        stream, mlp = f"{here}.sublayers.0.operation.streams.{segment}", f"{here}.sublayers.{number + 1}.operation"
        rules += [Rule(f"{there}.{prefix}_{theirs}", f"{stream}.{ours}") for theirs, ours in ORIGINAL_STREAM]
        rules.append(Rule(f"{there}.{prefix}_mlp.fc1.{{p}}", f"{mlp}.expand.{{p}}"))
        rules.append(Rule(f"{there}.{prefix}_mlp.fc2.{{p}}", f"{mlp}.project.{{p}}"))
    both = (f"{there}.img_mod.linear.{{p}}", f"{there}.txt_mod.linear.{{p}}")
    return [*rules, Rule(both, f"{here}.modulation.linear.{{p}}", _slots(width))]


def original_refiner_rules(width: int) -> list[Rule]:
    """The captions' own transformer in Tencent's files."""
    rules = [Rule(f"txt_in.{theirs}", f"text_embedding.{ours}") for theirs, ours in ORIGINAL_REFINER]
    inside = _inside("text_embedding.blocks.{i}.sublayers.0.operation", QKV)
    fused = Fused((width,) * 3)
    return [*rules, Rule("txt_in.individual_token_refiner.blocks.{i}.self_attn_qkv.{p}", inside, fused)]


def kernel(record: Record) -> Layout:
    """A convolution over patches as a linear layer."""
    patch = (record["patch_size_t"], record["patch_size"], record["patch_size"])
    return Reshaped((width_of(record), record["in_channels"], *patch), (width_of(record), -1))


def _slots(width: int) -> Layout:
    return Chain((Inverse(Fused((6 * width, 6 * width))), ReorderedRows(DUAL_SLOTS)))


def _inside(module: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names)


def _config(record: Record) -> DiTConfig:
    return DiTConfig(
        width=width_of(record),
        depth=record["num_layers"] + record["num_single_layers"],
        single_depth=record["num_single_layers"],
        num_heads=record["num_attention_heads"],
        mlp_ratio=record["mlp_ratio"],
        patch_size=[record["patch_size_t"], record["patch_size"], record["patch_size"]],
        condition_channels=record["in_channels"] - record["out_channels"],
        text=TextEdge.joint,
        activation=Activation.gelu_tanh,
        modulation=ModulationSource.linear,
        qk_norm=QKNorm.rms_head,
        rope_axes=list(record["rope_axes_dim"]),
        rope_theta=record["rope_theta"],
        guidance=record["guidance_embeds"],
        pooled_width=record["pooled_projection_dim"],
        text_embedding=TextEmbedding.refiner,
        refiner_depth=record["num_refiner_layers"],
        first_frame_given=record["image_condition_type"] == "token_replace",
    )


def _image_condition(config: DiTConfig) -> str | None:
    if config.first_frame_given:
        return "token_replace"
    return "latent_concat" if config.condition_channels else None


def _check(record: Record) -> None:
    fixed_choices(record, qk_norm="rms_norm")
    require(record["num_single_layers"] > 0, record, "num_single_layers", "only 1 or more is implemented")
    given = record["in_channels"] - record["out_channels"]
    choices = ["latent_concat"] if given else [None, "token_replace"]
    rule = f"with {given} channels more in than out it can be {' or '.join(map(str, choices))}"
    require(record["image_condition_type"] in choices, record, "image_condition_type", rule)


HUNYUAN = Preset("hunyuan", "HunyuanVideoTransformer3DModel", _check, build, describe, key_map, original_key_map)

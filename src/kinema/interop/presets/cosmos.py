"""Cosmos 1, Cosmos-Predict 2 and 2.5 (NVIDIA 2025): modulation of low rank, captions of a width of their own."""

from typing import cast

from torch import nn

from kinema.interop.keymap import KeyMap, PermutedRows, Rule
from kinema.interop.preset import Names, Preset, Record
from kinema.interop.presets.described import check_described
from kinema.interop.presets.rules import fixed_choices, require, width_of
from kinema.models.dit import (
    DiT,
    DiTConfig,
    HeadModulation,
    ModulationSource,
    PositionEmbedding,
    TextEmbedding,
)

BASE_FPS = 24.0
QK_EPSILON = 1e-5
"""Of the norms of queries and keys; the others have 1e-6."""
FIXED = {
    "controlnet_block_every_n": None,
    "img_context_dim_in": None,
    "img_context_num_tokens": 256,
    "img_context_dim_out": 2048,
}
TRAINED = [128, 240, 240]
"""Latent frames, rows and columns of the largest clip of every release; only learned places read them."""

"""Name in `diffusers`, and here."""

EDGES: list[Names] = [
    ("patch_embed.proj.weight", "patch_embedding.weight"),
    ("time_embed.t_embedder.linear_1.weight", "timestep_embedding.expand.weight"),
    ("time_embed.t_embedder.linear_2.weight", "shared_modulation.weight"),
    ("time_embed.norm.weight", "timestep_embedding.norm.weight"),
    ("norm_out.linear_1.weight", "head_modulation.down.0.weight"),
    ("norm_out.linear_2.weight", "head_modulation.up.0.weight"),
]
BLOCK: list[Names] = [
    ("attn1.to_v.weight", "sublayers.0.operation.value.weight"),
    ("attn1.to_out.0.weight", "sublayers.0.operation.project.weight"),
    ("attn2.to_q.weight", "sublayers.1.operation.query.weight"),
    ("attn2.to_k.weight", "sublayers.1.operation.key.weight"),
    ("attn2.to_v.weight", "sublayers.1.operation.value.weight"),
    ("attn2.to_out.0.weight", "sublayers.1.operation.project.weight"),
    ("attn2.norm_q.weight", "sublayers.1.operation.query_norm.weight"),
    ("attn2.norm_k.weight", "sublayers.1.operation.key_norm.weight"),
    ("ff.net.0.proj.weight", "sublayers.2.operation.expand.weight"),
    ("ff.net.2.weight", "sublayers.2.operation.project.weight"),
]
PLACES: list[Names] = [
    ("learnable_pos_embed.pos_emb_t", "places.axes.0"),
    ("learnable_pos_embed.pos_emb_h", "places.axes.1"),
    ("learnable_pos_embed.pos_emb_w", "places.axes.2"),
]


def build(record: Record) -> DiT:
    """CosmosTransformer3DModel's config -> the same model here.

    Predict 2 and 2.5 take timesteps from 0 to 1 and predict noise - latents, as here. Channels in beyond those out are
    a mask of the given frames (`extras.channels`); the padding mask is zero.
    """
    text = record["crossattn_proj_in_channels" if record["use_crossattn_projection"] else "text_embed_dim"]
    return DiT(_config(record), record["out_channels"], text)


def describe(module: nn.Module) -> Record:
    """The inverse of `build`."""
    model = cast(DiT, module)
    config = model.config
    learned = config.position_embedding is PositionEmbedding.learned_axes
    projected = config.text_embedding is TextEmbedding.activated
    grid = zip(config.position_grid, config.patch_size, strict=True)
    record = {
        **FIXED,
        "in_channels": model.latent_channels + config.condition_channels,
        "out_channels": model.latent_channels,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "num_layers": config.depth,
        "mlp_ratio": config.mlp_ratio,
        "text_embed_dim": config.text_channels,
        "adaln_lora_dim": config.modulation_rank,
        "max_size": [size * patch for size, patch in grid] if learned else TRAINED,
        "patch_size": list(config.patch_size),
        "rope_scale": list(config.rope_scale),
        "concat_padding_mask": config.padding_channel,
        "extra_pos_embed_type": "learnable" if learned else None,
        "use_crossattn_projection": projected,
        "crossattn_proj_in_channels": model.text_width if projected else 1024,
        "encoder_hidden_states_channels": config.text_channels if projected else 1024,
    }
    check_described("CosmosTransformer3DModel", config, _config(record))
    return record


def key_map(record: Record) -> KeyMap:
    """Names in `diffusers`, whose rotary pairs lie half a head apart."""
    heads, head, patch = record["num_attention_heads"], record["attention_head_dim"], tuple(record["patch_size"])
    pairs, pair = PermutedRows((heads, 2, head // 2), (0, 2, 1)), PermutedRows((2, head // 2), (1, 0))
    rows = PermutedRows((patch[1], patch[2], patch[0], record["out_channels"]), (3, 2, 0, 1))
    names = EDGES + (PLACES if record["extra_pos_embed_type"] else [])
    if record["use_crossattn_projection"]:
        names = [*names, ("crossattn_proj.0.{p}", "text_embedding.0.{p}")]
    block, first = "transformer_blocks.{i}", "blocks.{i}.sublayers.0.operation"
    return KeyMap(
        [
            *(Rule(theirs, ours) for theirs, ours in names),
            *(Rule(f"{block}.{theirs}", f"blocks.{{i}}.{ours}") for theirs, ours in BLOCK),
            *(
                Rule(f"{block}.norm{place + 1}.{theirs}.weight", f"blocks.{{i}}.modulation.{ours}.{place}.weight")
                for place in range(3)
                for theirs, ours in (("linear_1", "down"), ("linear_2", "up"))
            ),
            Rule(f"{block}.attn1.to_q.weight", f"{first}.query.weight", pairs),
            Rule(f"{block}.attn1.to_k.weight", f"{first}.key.weight", pairs),
            Rule(f"{block}.attn1.norm_q.weight", f"{first}.query_norm.weight", pair),
            Rule(f"{block}.attn1.norm_k.weight", f"{first}.key_norm.weight", pair),
            Rule("proj_out.weight", "head.weight", rows),
        ]
    )


def _config(record: Record) -> DiTConfig:
    width, head = width_of(record), record["attention_head_dim"]
    side, learned = head // 6 * 2, record["extra_pos_embed_type"] == "learnable"
    sizes = zip(record["max_size"], record["patch_size"], strict=True)
    return DiTConfig(
        width=width,
        depth=record["num_layers"],
        num_heads=record["num_attention_heads"],
        mlp_ratio=record["mlp_ratio"],
        patch_size=list(record["patch_size"]),
        condition_channels=record["in_channels"] - record["out_channels"],
        padding_channel=record["concat_padding_mask"],
        bias=False,
        edge_bias=False,
        modulation=ModulationSource.lora,
        modulation_rank=record["adaln_lora_dim"],
        head_modulation=HeadModulation.lora,
        qk_norm_eps=QK_EPSILON,
        rope_axes=[head - 2 * side, side, side],
        rope_scale=list(record["rope_scale"]),
        rope_fps=BASE_FPS,
        position_embedding=PositionEmbedding.learned_axes if learned else PositionEmbedding.none,
        position_grid=[size // patch for size, patch in sizes] if learned else [0, 0, 0],
        timestep_channels=width,
        timestep_scale=1.0,
        timestep_norm=True,
        text_embedding=TextEmbedding.activated if record["use_crossattn_projection"] else TextEmbedding.none,
        text_channels=record["text_embed_dim"],
    )


def _check(record: Record) -> None:
    fixed_choices(record, controlnet_block_every_n=None)
    require(not record["img_context_dim_in"], record, "img_context_dim_in", "only None is implemented")
    known = record["extra_pos_embed_type"] in (None, "learnable")
    require(known, record, "extra_pos_embed_type", "only None or learnable is implemented")
    if record["use_crossattn_projection"]:
        fixed_choices(record, encoder_hidden_states_channels=record["text_embed_dim"])


COSMOS = Preset("cosmos", "CosmosTransformer3DModel", _check, build, describe, key_map)

"""Kandinsky 5 (Arkhipkin et al. 2025): captions through blocks of their own, then self, cross and MLP in each block."""

from typing import cast

from torch import nn

from kinema.interop.keymap import Along, KeyMap, PermutedRows, Rule
from kinema.interop.preset import Names, Preset, Record
from kinema.interop.presets.described import check_described
from kinema.interop.presets.rules import fixed_choices, require
from kinema.models.dit import DiT, DiTConfig, ModulationSource, TextEmbedding

NORM_EPSILON = 1e-5
QK_EPSILON = 2.0**-23
"""What torch adds where nobody says: the distance of 1 to the next float32."""
FIXED = {
    "attention_type": "regular",
    "attention_causal": None,
    "attention_local": None,
    "attention_glob": None,
    "attention_window": None,
    "attention_P": None,
    "attention_wT": None,
    "attention_wW": None,
    "attention_wH": None,
    "attention_add_sta": None,
    "attention_method": None,
}

"""Name in `diffusers`, and here."""

EDGES: list[Names] = [
    ("time_embeddings.in_layer.{p}", "timestep_embedding.expand.{p}"),
    ("time_embeddings.out_layer.{p}", "timestep_embedding.project.{p}"),
    ("pooled_text_embeddings.in_layer.{p}", "pooled_embedding.project.{p}"),
    ("pooled_text_embeddings.norm.{p}", "pooled_embedding.norm.{p}"),
    ("text_embeddings.in_layer.{p}", "text_embedding.embed.{p}"),
    ("text_embeddings.norm.{p}", "text_embedding.norm.{p}"),
    ("visual_embeddings.in_layer.bias", "patch_embedding.bias"),
    ("out_layer.modulation.out_layer.{p}", "head_modulation.{p}"),
    ("out_layer.out_layer.{p}", "head.{p}"),
    ("text_transformer_blocks.{i}.text_modulation.out_layer.{p}", "text_embedding.blocks.{i}.modulation.linear.{p}"),
    ("visual_transformer_blocks.{i}.visual_modulation.out_layer.{p}", "blocks.{i}.modulation.linear.{p}"),
]
ATTENTION: list[Names] = [
    ("to_query.{p}", "query.{p}"),
    ("to_key.{p}", "key.{p}"),
    ("to_value.{p}", "value.{p}"),
    ("query_norm.weight", "query_norm.weight"),
    ("key_norm.weight", "key_norm.weight"),
    ("out_layer.{p}", "project.{p}"),
]
MLP: list[Names] = [("in_layer.weight", "expand.weight"), ("out_layer.weight", "project.weight")]
TEXT_BLOCK = {"self_attention": ATTENTION, "feed_forward": MLP}
VISUAL_BLOCK = {"self_attention": ATTENTION, "cross_attention": ATTENTION, "feed_forward": MLP}


def build(record: Record) -> DiT:
    """Kandinsky5Transformer3DModel's config -> the same model here.

    The reference takes channels last, timesteps from 0 to 1000, and positions; it rounds queries and keys to bfloat16
    behind their turn, even in a float32 model. It can divide positions by a number of the caller's: here that is 1.
    """
    return DiT(_config(record), record["out_visual_dim"], record["in_text_dim"])


def describe(module: nn.Module) -> Record:
    """The inverse of `build`."""
    model = cast(DiT, module)
    config = model.config
    record = {
        **FIXED,
        "in_visual_dim": model.latent_channels,
        "in_text_dim": model.text_width,
        "in_text_dim2": config.pooled_width,
        "time_dim": config.timestep_width,
        "out_visual_dim": model.latent_channels,
        "patch_size": list(config.patch_size),
        "model_dim": config.width,
        "ff_dim": config.hidden_width,
        "num_text_blocks": config.refiner_depth,
        "num_visual_blocks": config.depth,
        "axes_dims": list(config.rope_axes),
        "visual_cond": config.condition_channels > 0,
    }
    check_described("Kandinsky5Transformer3DModel", config, _config(record))
    return record


def key_map(record: Record) -> KeyMap:
    """Names in `diffusers`."""
    channels = record["in_visual_dim"] * 2 + 1 if record["visual_cond"] else record["in_visual_dim"]
    columns = Along(1, PermutedRows((*record["patch_size"], channels), (3, 0, 1, 2)))
    towers = {
        ("text_transformer_blocks", "text_embedding.blocks"): TEXT_BLOCK,
        ("visual_transformer_blocks", "blocks"): VISUAL_BLOCK,
    }
    blocks = [
        Rule(f"{theirs}.{{i}}.{layer}.{name}", f"{ours}.{{i}}.sublayers.{place}.operation.{mine}")
        for (theirs, ours), layers in towers.items()
        for place, (layer, names) in enumerate(layers.items())
        for name, mine in names
    ]
    patches = Rule("visual_embeddings.in_layer.weight", "patch_embedding.weight", columns)
    return KeyMap([*(Rule(theirs, ours) for theirs, ours in EDGES), *blocks, patches])


def _config(record: Record) -> DiTConfig:
    width = record["model_dim"]
    return DiTConfig(
        width=width,
        depth=record["num_visual_blocks"],
        num_heads=width // sum(record["axes_dims"]),
        mlp_ratio=record["ff_dim"] / width,
        patch_size=list(record["patch_size"]),
        condition_channels=record["in_visual_dim"] + 1 if record["visual_cond"] else 0,
        mlp_bias=False,
        norm_eps=NORM_EPSILON,
        modulation=ModulationSource.linear,
        qk_norm_eps=QK_EPSILON,
        rope_axes=list(record["axes_dims"]),
        timestep_channels=width,
        timestep_width=record["time_dim"],
        pooled_width=record["in_text_dim2"],
        pooled_norm=True,
        text_embedding=TextEmbedding.tower,
        refiner_depth=record["num_text_blocks"],
    )


def _check(record: Record) -> None:
    fixed_choices(record, out_visual_dim=record["in_visual_dim"], **FIXED)
    head = sum(record["axes_dims"])
    require(record["model_dim"] % head == 0, record, "model_dim", f"it must be heads of sum(axes_dims), {head}")


KANDINSKY = Preset("kandinsky", "Kandinsky5Transformer3DModel", _check, build, describe, key_map)

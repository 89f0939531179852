"""LTX-Video (HaCohen et al. 2024): adaLN-single with root-mean-square norms and fractional rotary positions."""

from typing import cast

from torch import nn

from kinema.interop.keymap import KeyMap, Reshaped, Rule
from kinema.interop.preset import Names, Preset, Record
from kinema.interop.presets.described import check_described
from kinema.interop.presets.rules import fixed_choices, same_channels, same_width, width_of
from kinema.models.dit import Activation, CrossNorm, DiT, DiTConfig, HeadModulation, NormKind, QKNorm, Rope

HEAD_EPSILON = 1e-6  # of the reference's last norm, whatever its config says
QK_EPSILON = 1e-5

"""Name in `diffusers`, and here; the vendor's files differ as `ORIGINAL` says."""

NAMES: list[Names] = [
    ("proj_in.{p}", "patch_embedding.{p}"),
    ("proj_out.{p}", "head.{p}"),
    ("time_embed.emb.timestep_embedder.linear_1.{p}", "timestep_embedding.expand.{p}"),
    ("time_embed.emb.timestep_embedder.linear_2.{p}", "timestep_embedding.project.{p}"),
    ("time_embed.linear.{p}", "shared_modulation.{p}"),
    ("caption_projection.linear_1.{p}", "text_embedding.0.{p}"),
    ("caption_projection.linear_2.{p}", "text_embedding.2.{p}"),
    ("transformer_blocks.{i}.ff.net.0.proj.{p}", "blocks.{i}.sublayers.2.operation.expand.{p}"),
    ("transformer_blocks.{i}.ff.net.2.{p}", "blocks.{i}.sublayers.2.operation.project.{p}"),
]
ATTENTION: list[Names] = [
    ("to_q.{p}", "query.{p}"),
    ("to_k.{p}", "key.{p}"),
    ("to_v.{p}", "value.{p}"),
    ("to_out.0.{p}", "project.{p}"),
    ("norm_q.weight", "query_norm.weight"),
    ("norm_k.weight", "key_norm.weight"),
]
ORIGINAL = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm", "norm_k": "k_norm"}


def build(record: Record) -> DiT:
    """LTXVideoTransformer3DModel's config -> the same model here.

    The reference takes packed tokens and timesteps from 0 to 1000; both predict noise - latents.
    """
    patch = record["patch_size_t"] * record["patch_size"] ** 2
    return DiT(_config(record), record["in_channels"] // patch, record["caption_channels"])


def describe(module: nn.Module) -> Record:
    """The inverse of `build`."""
    model = cast(DiT, module)
    config = model.config
    channels = model.latent_channels * config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    record = {
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": config.patch_size[1],
        "patch_size_t": config.patch_size[0],
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "cross_attention_dim": config.width,
        "num_layers": config.depth,
        "activation_fn": "gelu-approximate",
        "qk_norm": "rms_norm_across_heads",
        "norm_elementwise_affine": False,
        "norm_eps": config.norm_eps,
        "caption_channels": model.text_width,
        "attention_bias": True,
        "attention_out_bias": True,
    }
    check_described("LTXVideoTransformer3DModel", config, _config(record))
    return record


def key_map(record: Record) -> KeyMap:
    """Names in `diffusers`."""
    return KeyMap(_rules(record))


def original_key_map(record: Record) -> KeyMap:
    """Names in Lightricks' own files, without the prefix `model.diffusion_model.` that some have."""
    return KeyMap([rule.renamed(ORIGINAL) for rule in _rules(record)])


def _config(record: Record) -> DiTConfig:
    return DiTConfig(
        width=width_of(record),
        depth=record["num_layers"],
        num_heads=record["num_attention_heads"],
        mlp_ratio=4.0,
        patch_size=[record["patch_size_t"], record["patch_size"], record["patch_size"]],
        activation=Activation.gelu_tanh,
        norm=NormKind.rms,
        norm_eps=record["norm_eps"],
        cross_norm=CrossNorm.none,
        head_modulation=HeadModulation.table,
        qk_norm=QKNorm.rms_all,
        qk_norm_eps=QK_EPSILON,
        rope=Rope.fractional,
        text_activation=Activation.gelu_tanh,
    )


def _rules(record: Record) -> list[Rule]:
    width = width_of(record)
    attention = [
        Rule(f"transformer_blocks.{{i}}.attn{place + 1}.{theirs}", f"blocks.{{i}}.sublayers.{place}.operation.{ours}")
        for place in range(2)
        for theirs, ours in ATTENTION
    ]
    return [
        *(Rule(theirs, ours) for theirs, ours in NAMES),
        *attention,
        Rule("transformer_blocks.{i}.scale_shift_table", "blocks.{i}.modulation.table", Reshaped((6, width), (-1,))),
        Rule("scale_shift_table", "head_modulation.table", Reshaped((2, width), (-1,))),
    ]


def _check(record: Record) -> None:
    fixed_choices(record, qk_norm="rms_norm_across_heads", activation_fn="gelu-approximate", norm_eps=HEAD_EPSILON)
    fixed_choices(record, norm_elementwise_affine=False, attention_bias=True, attention_out_bias=True)
    same_channels(record)
    same_width(record)


LTX = Preset("ltx", "LTXVideoTransformer3DModel", _check, build, describe, key_map, original_key_map)

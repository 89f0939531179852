"""MiniMax-H3 (MiniMax 2026): captions, sound and video in one packed sequence, through the same weights."""

from typing import cast

from torch import nn

from kinema.interop.keymap import Fused, KeyMap, PairedHeads, PermutedRows, Rule
from kinema.interop.preset import Names, Preset, Record
from kinema.interop.presets.described import check_described
from kinema.interop.presets.rules import fixed_choices, require
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

SPANS = [5 / 3 * frames for frames in (1, 4, 4, 4, 4)]
"""Steps of the clock that latent frames take: those of 17 frames at 24 a second, where a latent of sound takes one."""

EDGES: list[Names] = [
    ("proj_in.{p}", "patch_embedding.{p}"),
    ("audio_proj_in.{p}", "audio_embedding.{p}"),
    ("context_embedder.{p}", "text_embedding.embed.{p}"),
    ("token_refiner.final_norm.weight", "text_embedding.norm.weight"),
    ("time_embedder.linear_1.{p}", "timestep_embedding.expand.{p}"),
    ("time_embedder.linear_2.{p}", "timestep_embedding.project.{p}"),
    ("norm_out.norm.weight", "head_norm.weight"),
    ("norm_out.linear.{p}", "head_modulation.{p}"),
]
TURNED: list[Names] = [("to_q.weight", "query.weight"), ("to_k.weight", "key.weight")]
TURNED_NORMS: list[Names] = [("norm_q.weight", "query_norm.weight"), ("norm_k.weight", "key_norm.weight")]


def build(record: Record) -> DiT:
    """MiniMaxH3Transformer3DModel's config -> the same model here.

    The reference takes 1 - t, rows of patches with their places, and predicts latents - noise.
    """
    return DiT(_config(record), record["in_channels"], record["text_dim"])


def describe(module: nn.Module) -> Record:
    """The inverse of `build`."""
    model = cast(DiT, module)
    config = model.config
    record = {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "hidden_size": config.width,
        "num_layers": config.depth,
        "num_refiner_layers": config.refiner_depth,
        "ffn_dim": config.hidden_width,
        "in_channels": model.latent_channels,
        "audio_in_channels": config.audio_channels,
        "patch_size": tuple(config.patch_size),
        "text_dim": model.text_width,
        "freq_dim": config.timestep_channels,
        "time_embed_hidden_dim": config.timestep_hidden_width,
        "time_embed_dim": config.timestep_width,
        "rope_freq_dim": config.rope_axes[0] // 2,
        "rope_theta": config.rope_theta,
        "norm_eps": config.norm_eps,
        "qk_norm_eps": config.qk_norm_eps,
        "final_norm_eps": config.norm_eps,
    }
    check_described("MiniMaxH3Transformer3DModel", config, _config(record))
    return record


def key_map(record: Record) -> KeyMap:
    """Names in `diffusers`."""
    width = record["hidden_size"]
    rules = [Rule(theirs, ours) for theirs, ours in EDGES]
    rules += [Rule("proj_out.{p}", "head.{p}"), Rule("audio_proj_out.{p}", "audio_head.{p}")]
    for block in range(record["num_layers"]):
        there, here = f"transformer_blocks.{block}", f"blocks.{block}"
        modulation = PermutedRows((3, 2, 3 * width), (1, 0, 2))  # by modality, then sublayer; ours by sublayer first
        rules += [Rule(f"{there}.adaln_proj.linear.{{p}}", f"{here}.modulation.linear.{{p}}", modulation)]
        attention = f"{here}.sublayers.0.operation.streams.video"
        rules += _attention(f"{there}.attn", attention, record, turned=True)
        rules += _rest(there, f"{here}.sublayers.0", f"{here}.sublayers.1", record)
    for block in range(record["num_refiner_layers"]):
        there = f"token_refiner.refiner_blocks.{block}"
        first, second = (f"text_embedding.sublayers.{2 * block + place}" for place in (0, 1))
        rules += _attention(f"{there}.attn", f"{first}.operation", record, turned=False)
        rules += _rest(there, first, second, record)
    return KeyMap(rules)


def _attention(there: str, here: str, record: Record, *, turned: bool) -> list[Rule]:
    channels = 6 * record["rope_freq_dim"] if turned else 0
    heads, one = PairedHeads(record["num_attention_heads"], channels), PairedHeads(1, channels)
    rules = [Rule(f"{there}.{theirs}", f"{here}.{ours}", heads) for theirs, ours in TURNED]
    rules += [Rule(f"{there}.{theirs}", f"{here}.{ours}", one) for theirs, ours in TURNED_NORMS]
    rules += [Rule(f"{there}.to_v.weight", f"{here}.value.weight")]
    return [*rules, Rule(f"{there}.to_out.0.weight", f"{here}.project.weight")]


def _rest(there: str, first: str, second: str, record: Record) -> list[Rule]:
    hidden = record["ffn_dim"]
    both = (f"{second}.operation.expand.weight", f"{second}.operation.gate.weight")
    return [
        Rule(f"{there}.norm1.weight", f"{first}.norm.weight"),
        Rule(f"{there}.norm2.weight", f"{second}.norm.weight"),
        Rule(f"{there}.ff.net.0.proj.weight", both, Fused((hidden, hidden))),
        Rule(f"{there}.ff.net.2.weight", f"{second}.operation.project.weight"),
    ]


def _config(record: Record) -> DiTConfig:
    turning = 2 * record["rope_freq_dim"]
    return DiTConfig(
        width=record["hidden_size"],
        depth=record["num_layers"],
        num_heads=record["num_attention_heads"],
        head_channels=record["attention_head_dim"],
        mlp_ratio=record["ffn_dim"] / record["hidden_size"],
        patch_size=list(record["patch_size"]),
        text=TextEdge.shared,
        activation=Activation.swiglu,
        bias=False,
        norm=NormKind.rms,
        norm_eps=record["norm_eps"],
        norm_affine=True,
        head_norm=NormKind.rms,
        modulation=ModulationSource.linear,
        qk_norm=QKNorm.rms_head,
        qk_norm_eps=record["qk_norm_eps"],
        rope=Rope.packed,
        rope_axes=[turning] * 3,
        rope_still=record["attention_head_dim"] - 3 * turning,
        rope_spans=SPANS,
        rope_side=32.0,
        rope_theta=record["rope_theta"],
        timestep_channels=record["freq_dim"],
        timestep_width=record["time_embed_dim"],
        timestep_hidden_width=record["time_embed_hidden_dim"],
        timestep_scale=1.0,
        reversed_time=True,
        text_embedding=TextEmbedding.encoder,
        refiner_depth=record["num_refiner_layers"],
        audio_channels=record["audio_in_channels"],
    )


def _check(record: Record) -> None:
    """One epsilon for all norms of tokens, and patches of one frame, which the clock counts."""
    fixed_choices(record, final_norm_eps=record["norm_eps"])
    require(record["patch_size"][0] == 1, record, "patch_size", "only patches of 1 frame are implemented")


MINIMAX_H3 = Preset("minimax_h3", "MiniMaxH3Transformer3DModel", _check, build, describe, key_map)

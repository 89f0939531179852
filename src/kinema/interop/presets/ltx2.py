"""LTX-2.0 and 2.3 (HaCohen et al. 2026): a video and its sound in two towers that look at each other in every block."""

from typing import cast

from torch import nn

from kinema.interop.keymap import Chain, KeyMap, Layout, PermutedRows, ReorderedRows, Reshaped, Rule, Same
from kinema.interop.preset import Names, Preset, Record
from kinema.interop.presets.described import check_described
from kinema.interop.presets.rules import fixed_choices, require, same_channels, same_width, width_of
from kinema.models.dit import (
    Activation,
    CrossNorm,
    DiT,
    DiTConfig,
    HeadModulation,
    NormKind,
    QKNorm,
    Rope,
    StreamConfig,
    TextEmbedding,
)

WHOLE = 3  # shift, scale and gate
FPS = 24.0  # the reference's own, where nobody says another
FIXED = {
    "patch_size": 1,
    "patch_size_t": 1,
    "audio_patch_size": 1,
    "audio_patch_size_t": 1,
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "attention_bias": True,
    "attention_out_bias": True,
    "rope_double_precision": True,
    "causal_offset": 1,
    "timestep_scale_multiplier": 1000,
    "cross_attn_timestep_scale_multiplier": 1000,
    "ff_bias": True,
    "audio_ff_bias": True,
    "use_prompt_adaln_single": True,
    "use_keyframes_abs_pos_embedding": False,
}

"""Name in `diffusers`, and here; the vendor's files differ as `ORIGINAL` says."""

STREAM: list[Names] = [
    ("proj_in.{p}", "patch_embedding.{p}"),
    ("proj_out.{p}", "head.{p}"),
    ("time_embed.emb.timestep_embedder.linear_1.{p}", "timestep_embedding.expand.{p}"),
    ("time_embed.emb.timestep_embedder.linear_2.{p}", "timestep_embedding.project.{p}"),
    ("prompt_adaln.emb.timestep_embedder.linear_1.{p}", "caption_condition.embedding.expand.{p}"),
    ("prompt_adaln.emb.timestep_embedder.linear_2.{p}", "caption_condition.embedding.project.{p}"),
    ("prompt_adaln.linear.{p}", "caption_condition.linear.{p}"),
    ("caption_projection.linear_1.{p}", "text_embedding.0.{p}"),
    ("caption_projection.linear_2.{p}", "text_embedding.2.{p}"),
]
MLP: list[Names] = [
    ("ff.net.0.proj.{p}", "sublayers.2.operation.expand.{p}"),
    ("ff.net.2.{p}", "sublayers.2.operation.project.{p}"),
]
ATTENTION: list[Names] = [
    ("to_v.{p}", "value.{p}"),
    ("to_out.0.{p}", "project.{p}"),
    ("to_gate_logits.{p}", "gates.{p}"),
]
TURNED: list[Names] = [
    ("to_q.{p}", "query.{p}"),
    ("to_k.{p}", "key.{p}"),
    ("norm_q.weight", "query_norm.weight"),
    ("norm_k.weight", "key_norm.weight"),
]
EMBEDDER: list[Names] = [
    ("emb.timestep_embedder.linear_1.{p}", "expand.{p}"),
    ("emb.timestep_embedder.linear_2.{p}", "project.{p}"),
]
EXCHANGES = {"audio_to_video_attn": "hear", "video_to_audio_attn": "see"}
ASKS_FIRST, ASKS_LAST = (1, 0, 3, 2), (3, 2, 1, 0)
"""Theirs: scale and shift where the sound answers, then where the video does; ours: to ask, then to answer."""
ORIGINAL = {
    "proj_in": "patchify_proj",
    "audio_proj_in": "audio_patchify_proj",
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}


def build(record: Record) -> DiT:
    """LTX2VideoTransformer3DModel's config -> the same model here.

    The reference takes packed tokens and timesteps from 0 to 1000 for each stream; both predict noise - latents.
    """
    config, captions = _config(record), record["caption_channels"]
    return DiT(config, record["in_channels"], captions if record["use_prompt_embeddings"] else config.width)


def describe(module: nn.Module) -> Record:
    """The inverse of `build`, with the layout of rotary channels that the releases have, where that can be."""
    model = cast(DiT, module)
    config, audio = model.config, model.config.audio
    if audio is None:
        raise ValueError("LTX2VideoTransformer3DModel cannot be model.audio=None: it has two streams.")
    has_projection = config.text_embedding is TextEmbedding.mlp
    record = {
        **FIXED,
        "in_channels": model.latent_channels,
        "out_channels": model.latent_channels,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "cross_attention_dim": config.width,
        "vae_scale_factors": [int(unit) for unit in config.rope_units],
        "pos_embed_max_pos": int(config.rope_extent[0]),
        "base_height": int(config.rope_extent[1]),
        "base_width": int(config.rope_extent[2]),
        "audio_in_channels": audio.channels,
        "audio_out_channels": audio.channels,
        "audio_num_attention_heads": audio.num_heads,
        "audio_attention_head_dim": audio.width // audio.num_heads,
        "audio_cross_attention_dim": audio.width,
        "audio_scale_factor": audio.stride,
        "audio_pos_embed_max_pos": int(audio.extent),
        "audio_sampling_rate": round(audio.fps * HOP),
        "audio_hop_length": HOP,
        "num_layers": config.depth,
        "caption_channels": model.text_width if has_projection else GEMMA_WIDTH,
        "use_prompt_embeddings": has_projection,
        **dict.fromkeys(("gated_attn", "audio_gated_attn"), config.head_gates),
        **dict.fromkeys(("cross_attn_mod", "audio_cross_attn_mod", "perturbed_attn"), config.modulated_captions),
        "rope_theta": config.rope_theta,
        "rope_type": "split" if config.num_heads == audio.num_heads else "interleaved",
    }
    check_described("LTX2VideoTransformer3DModel", config, _config(record))
    return record


GEMMA_WIDTH = 3840  # of LTX-2's text encoder, whose connectors bring LTX-2.3's captions to the width of each stream
HOP = 160  # samples between frames of the spectrogram; the model knows only their rate


def key_map(record: Record) -> KeyMap:
    """Names in `diffusers`."""
    return KeyMap(_rules(record))


def original_key_map(record: Record) -> KeyMap:
    """Names in Lightricks' own files, without the prefix `model.diffusion_model.`."""
    return KeyMap([rule.renamed(ORIGINAL) for rule in _rules(record)])


def _rules(record: Record) -> list[Rule]:
    heads = record["num_attention_heads"], record["audio_num_attention_heads"]
    widths = width_of(record), width_of(record, "audio_")
    rules = []
    for prefix, tower, width, count in zip(("", "audio_"), ("", "audio."), widths, heads, strict=True):
        there, here = f"transformer_blocks.{{i}}.{prefix}", f"{tower}blocks.{{i}}"
        rules += [Rule(prefix + theirs, tower + ours) for theirs, ours in STREAM]
        rules += [Rule(there + theirs, f"{here}.{ours}") for theirs, ours in MLP]
        rules += _attention(f"{there}attn1", f"{here}.sublayers.0.operation", _turned(record, width, count))
        rules += _attention(f"{there}attn2", f"{here}.sublayers.1.operation", Same())
        rules += _modulation(record, prefix, tower, width)
        rules.append(Rule(f"{prefix}scale_shift_table", f"{tower}head_modulation.table", Reshaped((2, width), (-1,))))
    return rules + _exchange_rules(record, widths[1])


def _modulation(record: Record, prefix: str, tower: str, width: int) -> list[Rule]:
    """What modulates the reading of the caption stands last there, and here between the others."""
    there, here = f"transformer_blocks.{{i}}.{prefix}", f"{tower}blocks.{{i}}"
    sublayers, order = (3, (0, 2, 1)) if record["cross_attn_mod"] else (2, (0, 1))
    table = Chain((Reshaped((WHOLE * sublayers, width), (-1,)), ReorderedRows(order)))
    return [
        Rule(f"{prefix}time_embed.linear.{{p}}", f"{tower}shared_modulation.{{p}}", ReorderedRows(order)),
        Rule(f"{there}scale_shift_table", f"{here}.modulation.table", table),
        Rule(f"{there}prompt_scale_shift_table", f"{here}.sublayers.1.operation.answer_table"),
    ]


def _exchange_rules(record: Record, width: int) -> list[Rule]:
    rules = []
    for theirs, ours in EXCHANGES.items():
        turned = _turned(record, width, record["audio_num_attention_heads"])
        rules += _attention(f"transformer_blocks.{{i}}.{theirs}", f"exchanges.{{i}}.{ours}.operation", turned)
    for stream, asks, gate in (("video", ASKS_FIRST, "a2v"), ("audio", ASKS_LAST, "v2a")):
        here = f"exchange_conditions.{stream}"
        most, last = f"av_cross_attn_{stream}_scale_shift", f"av_cross_attn_{stream}_{gate}_gate"
        rules += [Rule(f"{most}.{theirs}", f"{here}.embedding.{ours}") for theirs, ours in EMBEDDER]
        rules += [Rule(f"{last}.{theirs}", f"{here}.gate_embedding.{ours}") for theirs, ours in EMBEDDER]
        rules.append(Rule(f"{most}.linear.{{p}}", f"{here}.linear.{{p}}", ReorderedRows(asks)))
        rules.append(Rule(f"{last}.linear.{{p}}", f"{here}.gate.{{p}}"))
        table = ReorderedRows((*asks[:2], 4, *asks[2:]))
        theirs = f"transformer_blocks.{{i}}.{stream}_a2v_cross_attn_scale_shift_table"
        rules.append(Rule(theirs, f"exchanges.{{i}}.{stream}_table", table))
    return rules


def _attention(there: str, here: str, turned: Layout) -> list[Rule]:
    return [Rule(f"{there}.{theirs}", f"{here}.{ours}") for theirs, ours in ATTENTION] + [
        Rule(f"{there}.{theirs}", f"{here}.{ours}", turned) for theirs, ours in TURNED
    ]


def _turned(record: Record, width: int, heads: int) -> Layout:
    """Channels that turn together lie side by side here; in `split` files half a head apart."""
    if record["rope_type"] == "interleaved":
        return Same()
    return PermutedRows((heads, 2, width // heads // 2), (0, 2, 1))


def _config(record: Record) -> DiTConfig:
    return DiTConfig(
        width=width_of(record),
        depth=record["num_layers"],
        num_heads=record["num_attention_heads"],
        mlp_ratio=4.0,
        patch_size=[1, 1, 1],
        activation=Activation.gelu_tanh,
        norm=NormKind.rms,
        norm_eps=record["norm_eps"],
        cross_norm=CrossNorm.modulated if record["cross_attn_mod"] else CrossNorm.plain,
        modulated_captions=record["cross_attn_mod"],
        head_modulation=HeadModulation.table,
        qk_norm=QKNorm.rms_all,
        qk_norm_eps=record["norm_eps"],
        head_gates=record["gated_attn"],
        rope=Rope.seconds,
        rope_theta=record["rope_theta"],
        rope_extent=[float(record[key]) for key in ("pos_embed_max_pos", "base_height", "base_width")],
        rope_units=[float(factor) for factor in record["vae_scale_factors"]],
        rope_fps=FPS,
        text_embedding=TextEmbedding.mlp if record["use_prompt_embeddings"] else TextEmbedding.none,
        text_activation=Activation.gelu_tanh,
        audio=StreamConfig(
            channels=record["audio_in_channels"],
            width=width_of(record, "audio_"),
            num_heads=record["audio_num_attention_heads"],
            extent=float(record["audio_pos_embed_max_pos"]),
            stride=record["audio_scale_factor"],
            fps=record["audio_sampling_rate"] / record["audio_hop_length"],
            text_width=0 if record["use_prompt_embeddings"] else record["audio_cross_attention_dim"],
            crossed=record["cross_attn_mod"],
        ),
    )


def _check(record: Record) -> None:
    """LTX-2.0 and 2.3.

    The exchange turns both streams by their own heads, which must be as many where channels lie apart.
    """
    fixed_choices(record, **FIXED)
    for key in ("gated_attn", "cross_attn_mod"):
        fixed_choices(record, **{f"audio_{key}": record[key]})
    for prefix in ("", "audio_"):
        same_channels(record, prefix)
        same_width(record, prefix)
    heads = record["num_attention_heads"]
    rule = f"rope_type=split needs num_attention_heads, {heads}; or write rope_type=interleaved"
    fits = record["rope_type"] == "interleaved" or record["audio_num_attention_heads"] == heads
    require(fits, record, "audio_num_attention_heads", rule)


LTX2 = Preset("ltx2", "LTX2VideoTransformer3DModel", _check, build, describe, key_map, original_key_map)

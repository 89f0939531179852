"""Configs of files that come without one, told from the shapes of their tensors."""

from collections.abc import Callable, Mapping
from pathlib import Path

from kinema.interop.preset import Record
from kinema.interop.reading import Shape

Shapes = Mapping[str, Shape]
BESIDE = "Put the config.json of the diffusers folder beside it."
WAN_HEAD_WIDTH = 128
WAN_WIDTHS = (1536, 3072, 5120)
"""Every released Wan has one of these widths and heads of that width; a shape alone cannot tell."""


def infer_config(path: Path, shapes: Shapes, vendor: Record | None) -> tuple[str, Record]:
    """The reference's class and config; `vendor` is the maker's own config.json where there is one."""
    for mark, read in KNOWN.items():
        if mark in shapes:
            try:
                return read(shapes, vendor or {})
            except (LookupError, ZeroDivisionError):
                missing = [name for name in NEEDED[read] if name not in shapes]
                what = f"lacks {', '.join(missing)}" if missing else "has tensors of shapes that no release has"
                raise ValueError(f"{path} {what}: its config cannot be told. {BESIDE}") from None
            except ValueError as error:
                raise ValueError(f"{path}: {error} {BESIDE}") from None
    raise ValueError(
        f"{path} comes without a config.json of diffusers, and its tensors ({', '.join(list(shapes)[:3])}, ...) are of "
        f"no model whose config can be told from shapes: those with {' or '.join(KNOWN)}. "
        f"{BESIDE}"
    )


def assumed(shapes: Shapes, vendor: Record | None) -> str | None:
    """What a config told from shapes takes for granted, for people; None where that is known."""
    width = shapes["patch_embedding.weight"][0] if "blocks.0.self_attn.q.weight" in shapes else WAN_WIDTHS[0]
    if "num_heads" in (vendor or {}) or width in WAN_WIDTHS:
        return None
    return (
        f"ASSUMED {width // WAN_HEAD_WIDTH} heads, {WAN_HEAD_WIDTH} channels each, for a Wan of width {width}: no "
        f'tensor tells. For other heads put a config.json with {{"num_heads": ...}}, or that of diffusers, beside it.'
    )


def wan_heads(width: int, vendor: Record) -> int:
    """Number of heads: what is said, else by the width of a head in the releases."""
    if "num_heads" not in vendor and width % WAN_HEAD_WIDTH:
        raise ValueError(f"this Wan is {width} wide, no multiple of {WAN_HEAD_WIDTH}: no tensor tells its heads.")
    heads = vendor.get("num_heads", width // WAN_HEAD_WIDTH)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"num_heads={heads} does not divide the width {width}.")
    return heads


def count_blocks(shapes: Shapes, stem: str) -> int:
    """Number of blocks called `stem.0.`, `stem.1.`, ..."""
    depth = len(stem.split("."))
    numbers = {name.split(".")[depth] for name in shapes if name.startswith(f"{stem}.")}
    return len({number for number in numbers if number.isdigit()})


def wan_original(shapes: Shapes, vendor: Record) -> tuple[str, Record]:
    """Wan 2.1 and 2.2 in the vendor's names: transformers for text, for a first frame, and with a control tower."""
    width, in_channels, *patch = shapes["patch_embedding.weight"]
    out_channels = shapes["head.head.weight"][0] // (patch[0] * patch[1] * patch[2])
    config: Record = {
        "patch_size": patch,
        "num_attention_heads": wan_heads(width, vendor),
        "in_channels": in_channels,
        "out_channels": out_channels,
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "num_layers": count_blocks(shapes, "blocks"),
        "cross_attn_norm": "blocks.0.norm3.weight" in shapes,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.self_attn.norm_q.weight" in shapes else None,
        "eps": vendor.get("eps", 1e-6),
        "rope_max_seq_len": 1024,
    }
    config["attention_head_dim"] = width // config["num_attention_heads"]
    has_image = "blocks.0.cross_attn.k_img.weight" in shapes
    config["image_dim"] = shapes["img_emb.proj.0.weight"][0] if has_image else None
    config["added_kv_proj_dim"] = width if has_image else None
    config["pos_embed_seq_len"] = shapes["img_emb.emb_pos"][1] if "img_emb.emb_pos" in shapes else None
    if "vace_patch_embedding.weight" not in shapes:
        return "WanTransformer3DModel", config
    every = config["num_layers"] // count_blocks(shapes, "vace_blocks")
    config["vace_layers"] = vendor.get("vace_layers", list(range(0, config["num_layers"], every)))
    config["vace_in_channels"] = shapes["vace_patch_embedding.weight"][1]
    return "WanVACETransformer3DModel", config


def wan_vae_original(shapes: Shapes, vendor: Record) -> tuple[str, Record]:
    """The VAE of Wan 2.1 in the vendor's names; its latent statistics are those of the only release."""
    width, latent_channels = shapes["encoder.conv1.weight"][0], shapes["conv2.weight"][0]
    if (width, latent_channels) != (96, 16):
        raise ValueError(
            f"this VAE has {width} channels and {latent_channels} latent channels, Wan 2.1's has 96 and 16: latent "
            "statistics of others are in no tensor."
        )
    return "AutoencoderKLWan", {"base_dim": width, "z_dim": latent_channels}


KNOWN: dict[str, Callable[[Shapes, Record], tuple[str, Record]]] = {
    "blocks.0.self_attn.q.weight": wan_original,
    "decoder.upsamples.0.residual.0.gamma": wan_vae_original,
}
"""Tensor that only this naming has -> the reader of its shapes."""

NEEDED: dict[Callable[[Shapes, Record], tuple[str, Record]], tuple[str, ...]] = {
    wan_original: (
        "patch_embedding.weight",
        "head.head.weight",
        "text_embedding.0.weight",
        "time_embedding.0.weight",
        "blocks.0.ffn.0.weight",
    ),
    wan_vae_original: ("encoder.conv1.weight", "conv2.weight"),
}
"""The tensors that tell the config."""

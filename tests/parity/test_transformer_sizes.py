"""Transformers of sizes that nobody published: saved by `diffusers`, loaded here, the same numbers and back again."""

import json
import random

import diffusers
import pytest
import torch
from safetensors.torch import load_file

import kinema
from kinema.interop.recognising import preset_of
from tests.parity.test_dit_presets import (
    COG,
    COSMOS,
    HUNYUAN,
    HUNYUAN_15,
    KANDINSKY,
    LATTE,
    LTX,
    LTX2,
    MOCHI,
    PIXART,
    WAN,
    Case,
    reference,
)

SEEDS = range(2)


def heads(draw, least=14):
    """Heads, and a head's channels that three axes of rotary positions divide."""
    return {"num_attention_heads": draw.choice([2, 3]), "attention_head_dim": draw.choice([least, least + 8])}


def width(found, prefix=""):
    return found[f"{prefix}num_attention_heads"] * found[f"{prefix}attention_head_dim"]


def channels(draw):
    count = draw.choice([3, 5])
    return {"in_channels": count, "out_channels": count, "num_layers": draw.choice([1, 3])}


def wan(draw):
    qk_norm = draw.choice([None, "rms_norm_across_heads"])
    return WAN | heads(draw, 20) | channels(draw) | {"ffn_dim": draw.choice([27, 50]), "qk_norm": qk_norm}


def cogvideox(draw):
    sizes = {"sample_width": 14, "sample_height": 10, "sample_frames": 9, "max_text_seq_length": draw.choice([5, 9])}
    rotary = draw.random() < 0.5
    own = {"use_rotary_positional_embeddings": rotary, "attention_head_dim": 32}
    return COG | heads(draw) | channels(draw) | sizes | own


def hunyuan(draw):
    own = {"mlp_ratio": draw.choice([2.0, 2.5]), "num_single_layers": draw.choice([1, 2])}
    return HUNYUAN | heads(draw) | channels(draw) | own | {"rope_axes_dim": None}


def hunyuan15(draw):
    sizes = HUNYUAN_15 | heads(draw) | {"mlp_ratio": draw.choice([1.5, 3.0]), "num_layers": draw.choice([1, 3])}
    return sizes | {"rope_axes_dim": None}


def ltx(draw):
    sizes = LTX | heads(draw, 20) | channels(draw)
    return sizes | {"cross_attention_dim": width(sizes)}


def ltx2(draw):
    sizes = LTX2 | heads(draw, 20) | channels(draw) | {"rope_type": "interleaved"}
    sizes["audio_num_attention_heads"] = draw.choice([2, 3])
    return sizes | {"cross_attention_dim": width(sizes), "audio_cross_attention_dim": width(sizes, "audio_")}


def latte(draw):
    sizes = LATTE | heads(draw, 16) | {"video_length": draw.choice([4, 5]), "sample_size": draw.choice([12, 8])}
    return sizes | {"cross_attention_dim": width(sizes)}


def cosmos(draw):
    size = [draw.choice([8, 12]), 20, 24]
    return COSMOS | heads(draw, 22) | channels(draw) | {"max_size": size, "mlp_ratio": draw.choice([2.0, 3.0])}


def kandinsky(draw):
    return KANDINSKY | {"model_dim": draw.choice([48, 64]), "ff_dim": draw.choice([50, 90])}


def pixart(draw):
    sizes = PIXART | heads(draw, 16)
    sizes |= {"in_channels": 5, "out_channels": draw.choice([5, 10]), "sample_size": draw.choice([8, 12])}
    return sizes | {"cross_attention_dim": width(sizes)}


def mochi(draw):
    return MOCHI | {"num_layers": draw.choice([1, 3]), "max_sequence_length": draw.choice([9, 12])}


DRAWS = [wan, cogvideox, hunyuan, hunyuan15, ltx, ltx2, latte, cosmos, kandinsky, pixart, mochi]


def drawn(family, seed):
    sizes = family(random.Random(f"{family.__name__} {seed}"))
    if sizes.get("rope_axes_dim", ()) is None:
        sizes["rope_axes_dim"] = (sizes["attention_head_dim"] - 8, 4, 4)
    return sizes


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", DRAWS, ids=lambda family: family.__name__)
def test_any_size_is_loaded_and_goes_back(family, seed, tmp_path):
    """`export` compares the numbers itself: ours against those that `diffusers` makes of what was written."""
    torch.set_num_threads(1)
    theirs = reference(Case(family.__name__, drawn(family, seed)), seed)
    theirs.save_pretrained(tmp_path / "theirs")
    kinema.export(kinema.load(tmp_path / "theirs"), tmp_path / "ours")

    before, after = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert config_of(tmp_path / "ours") == {
        k: v for k, v in config_of(tmp_path / "theirs").items() if k != "_name_or_path"
    }


def test_what_changed_since_loading_is_not_written_as_it_was(tmp_path):
    settings = {"latent_channels": 2, "block_out_channels": (4,) * 4, "layers_per_block": 1, "norm_num_groups": 2}
    diffusers.AutoencoderKLHunyuanVideo(**settings, scaling_factor=0.6).save_pretrained(tmp_path / "theirs")
    module = kinema.load(tmp_path / "theirs")
    module.latent_std.mul_(2)
    kinema.export(module, tmp_path / "ours")
    assert config_of(tmp_path / "ours")["scaling_factor"] == 0.3  # and not its noise of float32


@pytest.mark.parametrize(
    ("family", "broken", "said"),
    [
        (hunyuan, {"qk_norm": None}, "qk_norm=None: only rms_norm is implemented"),
        (hunyuan, {"num_single_layers": 0}, "num_single_layers=0: only 1 or more"),
        (hunyuan, {"image_condition_type": "latent_concat"}, "image_condition_type=latent_concat: with 0 channels"),
        (ltx, {"out_channels": 99}, "out_channels=99: only None or in_channels, "),
        (ltx2, {"rope_type": "split", "audio_num_attention_heads": 7}, "audio_cross_attention_dim="),
        (cogvideox, {"ofs_embed_dim": 3}, "ofs_embed_dim=3: only None or time_embed_dim, 14"),
        (kandinsky, {"model_dim": 50}, "model_dim=50: it must be heads of sum"),
        (cosmos, {"extra_pos_embed_type": "sincos"}, "extra_pos_embed_type=sincos: only None or learnable"),
        (latte, {"out_channels": 5}, "out_channels=5: only in_channels, 4, or twice"),
        (pixart, {"use_additional_conditions": True}, "use_additional_conditions=True: only False"),
        (mochi, {"attention_head_dim": 8}, "attention_head_dim=8: 8/3 of this width"),
        (wan, {"pos_embed_seq_len": 6}, "pos_embed_seq_len=6: it needs an image_dim"),
    ],
)
def test_a_refusal_says_which_key_and_why(family, broken, said):
    theirs = reference(Case(family.__name__, drawn(family, 0)))
    with pytest.raises(ValueError, match="no preset takes this") as error:
        preset_of(type(theirs).__name__, dict(theirs.config) | broken)
    assert f"{family.__name__}: " in str(error.value)
    assert said in str(error.value)

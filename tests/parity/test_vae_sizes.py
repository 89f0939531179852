"""Autoencoders of sizes that nobody published: saved by `diffusers`, loaded here, the same numbers and back again."""

import copy
import random

import diffusers
import pytest
import torch

import kinema
from kinema.interop.presets import PRESETS
from tests.parity.test_vae_presets import difference, randomise, their_latents, their_video

SEEDS = range(3)


def in_time(draw, steps):
    """Which steps halve time: at most two, since the reference reads four frames at a time."""
    chosen = draw.sample(range(steps), draw.choice([0, 1, 2]) if steps > 1 else 1)
    return [step in chosen for step in range(steps)]


def wan(draw):
    levels = draw.choice([2, 3, 4])
    z_dim = draw.choice([2, 3, 6])
    return {
        "base_dim": draw.choice([4, 6, 8]),
        "z_dim": z_dim,
        "dim_mult": [1, *(draw.choice([1, 2, 3, 4]) for _ in range(levels - 1))],
        "num_res_blocks": draw.choice([1, 2]),
        "temperal_downsample": in_time(draw, levels - 1),
        "latents_mean": [draw.uniform(-1, 1) for _ in range(z_dim)],
        "latents_std": [draw.uniform(0.5, 2) for _ in range(z_dim)],
    }


def wan_22(draw):
    patch = draw.choice([2, 4])
    levels = draw.choice([3, 4])
    return wan(draw) | {
        "is_residual": True,
        "base_dim": 8,
        "decoder_base_dim": draw.choice([8, 16]),
        "dim_mult": [1, 2, 4, 4] if levels == 4 else [1, 2, 2],  # a level without a step keeps its channels
        "temperal_downsample": in_time(draw, levels - 1),
        "patch_size": patch,
        "in_channels": 3 * patch**2,
        "out_channels": 3 * patch**2,
    }


def hunyuan_15(draw):
    space, time = draw.choice([(8, 4), (4, 2), (4, 4), (8, 2)])
    levels = space.bit_length()
    width = draw.choice([4, 8])
    return {
        "latent_channels": draw.choice([2, 4]),
        "block_out_channels": [width * 2 ** min(i, 2) for i in range(levels)],
        "layers_per_block": draw.choice([1, 2]),
        "spatial_compression_ratio": space,
        "temporal_compression_ratio": time,
        "scaling_factor": draw.uniform(0.3, 1.5),
    }


def hunyuan(draw):
    levels = draw.choice([4, 5])
    return {
        "latent_channels": draw.choice([2, 4]),
        "down_block_types": ["HunyuanVideoDownBlock3D"] * levels,
        "up_block_types": ["HunyuanVideoUpBlock3D"] * levels,
        "block_out_channels": [draw.choice([4, 8, 12]) for _ in range(levels)],
        "layers_per_block": draw.choice([1, 2]),
        "norm_num_groups": draw.choice([2, 4]),
        "spatial_compression_ratio": draw.choice([4, 8]),
        "scaling_factor": draw.uniform(0.3, 1.5),
    }


def ltx2(draw):
    steps = draw.choice([2, 3])
    kinds = draw.choices(["spatial", "temporal", "spatiotemporal"], k=steps)
    up = draw.sample(kinds, steps)
    space = 2 * 2 ** sum(kind != "temporal" for kind in kinds)
    return {
        "latent_channels": 8,
        "block_out_channels": [16, 32, 64][:steps],
        "decoder_block_out_channels": [16, 32, 64][:steps],
        "down_block_types": ["LTX2VideoDownBlock3D"] * steps,
        "layers_per_block": draw.choices([1, 2], k=steps + 1),
        "decoder_layers_per_block": draw.choices([1, 2], k=steps + 1),
        "spatio_temporal_scaling": [True] * steps,
        "decoder_spatio_temporal_scaling": [True] * steps,
        "decoder_inject_noise": [False] * (steps + 1),
        "downsample_type": kinds,
        "upsample_type": up,
        "upsample_residual": [draw.random() < 0.5] * steps,
        "upsample_factor": [2] * steps,
        "patch_size": 2,
        "decoder_causal": draw.random() < 0.5,
        "encoder_spatial_padding_mode": draw.choice(["zeros", "reflect"]),
        "decoder_spatial_padding_mode": draw.choice(["zeros", "reflect"]),
        "spatial_compression_ratio": space,
        "temporal_compression_ratio": 2 ** sum(kind != "spatial" for kind in kinds),
    }


DRAWS = {"wan_vae": wan, "wan_22_vae": wan_22, "hunyuan_15_vae": hunyuan_15, "hunyuan_vae": hunyuan, "ltx2_vae": ltx2}
BY_NAME = {preset.name: preset for preset in PRESETS}


@torch.no_grad()
def check_numbers(reference, ours):
    """In float64, where weights of any scale leave rounding far below a mistake."""
    generator, stride = torch.Generator().manual_seed(1), max(ours.config.temporal_stride, 4)
    side = ours.config.spatial_stride
    video = torch.rand(1, 3, 2 * stride + 1, 3 * side, 4 * side, generator=generator, dtype=torch.float64) * 2 - 1
    mean, logvar = their_latents(reference, ours, video)
    found = ours.encode(video)
    assert difference(found.mean, mean) <= 1e-6
    assert difference(found.logvar, logvar) <= 1e-6
    assert difference(ours.decode(mean), their_video(reference, ours, mean)) <= 1e-6


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", DRAWS)
def test_any_size_is_loaded_and_goes_back(name, seed, tmp_path):
    torch.set_num_threads(1)
    settings = DRAWS[name](random.Random(f"{name} {seed}"))
    reference = getattr(diffusers, BY_NAME[name].reference)(**settings)
    randomise(reference)
    reference.eval().save_pretrained(tmp_path / "theirs")
    ours = kinema.load(tmp_path / "theirs")
    check_numbers(copy.deepcopy(reference).double(), copy.deepcopy(ours).double())

    kinema.export(ours, tmp_path / "ours")
    again = type(reference).from_pretrained(tmp_path / "ours").state_dict()
    assert again.keys() == reference.state_dict().keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in reference.state_dict().items())

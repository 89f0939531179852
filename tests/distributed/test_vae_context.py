"""The VAE cut over several ranks computes what one rank computes: outputs and every gradient."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kinema.distributed.halo import SlabAxis
from kinema.models.vae import (
    Attention,
    CausalVAE,
    Convolution,
    Halving,
    Norm,
    Resampling,
    SpacePadding,
    TimePadding,
    VAEConfig,
)
from kinema.training.context_parallel import ContextParallel
from tests.ranks import run_ranks

FULL = {"latent_channels": 4, "width": 4, "decoder_width": 4, "convolution": Convolution.full, "linear_output": False}
WAN = FULL | {
    "norm": Norm.length,
    "time_padding": TimePadding.zeros,
    "mid_res_blocks": 1,
    "mid_attention": True,
    "down": Resampling.first_alone,
    "up": Resampling.first_alone,
    "latent_convolution": True,
    "clamp_output": True,
}
HUNYUAN = FULL | {
    "pixel_patch": 1,
    "space_padding": SpacePadding.replicate,
    "attention": Attention.causal,
    "mid_attention": True,
    "mid_res_blocks": 1,
}
LTX2 = FULL | {
    "spatial_stride": 16,
    "norm": Norm.pixel,
    "decoder_causal": False,
    "down": Resampling.packed_repeat,
    "up": Resampling.packed_repeat,
    "shared_logvar": True,
}
SPACE_BOTH_BOTH = [Halving.space, Halving.both, Halving.both]

CONFIGS: dict[str, dict[str, Any]] = {
    "causal_tiny": {"latent_channels": 4, "width": 8, "decoder_width": 8, "convolution": Convolution.alternating},
    "frame_norm": {"latent_channels": 4, "width": 8, "decoder_width": 8, "norm": Norm.group_frame, "norm_groups": 4},
    "wan": WAN | {"pixel_patch": 1, "width_multipliers": [1, 2, 2, 2], "up_halves_channels": True},
    "wan_22": WAN
    | {"pixel_patch": 2, "spatial_stride": 8, "stage_shortcuts": True, "halvings": [Halving.both, Halving.both]},
    "hunyuan_15": HUNYUAN
    | {"norm": Norm.length, "width_multipliers": [1, 2, 2, 4], "latent_shortcut": True}
    | {"down": Resampling.packed_alone, "up": Resampling.packed_alone},
    "hunyuan": HUNYUAN
    | {"norm": Norm.group, "norm_groups": 2, "width_multipliers": [1, 2, 2, 2], "latent_convolution": True}
    | {"down": Resampling.joint, "up": Resampling.joint}
    | {"halvings": SPACE_BOTH_BOTH, "decoder_halvings": SPACE_BOTH_BOTH[::-1]},
    "ltx_2": LTX2
    | {"width_multipliers": [1, 2, 4], "halvings": [Halving.both, Halving.both]}
    | {"decoder_space_padding": SpacePadding.reflect},
    "ltx_23": LTX2
    | {"width_multipliers": [1, 2, 2, 4], "up_shortcuts": False}
    | {"halvings": [Halving.space, Halving.time, Halving.both]}
    | {"decoder_halvings": [Halving.time, Halving.both, Halving.space]},
}
"""The choices of the published autoencoders at a few thousand parameters."""

Case = tuple[str, SlabAxis, tuple[int, int, int]]
"""A preset, the side along which the clip is cut, and its latent frames, rows and columns."""

UNEVEN = [(SlabAxis.time, (5, 2, 2)), (SlabAxis.height, (2, 3, 2)), (SlabAxis.width, (1, 2, 3))]
ON_TWO: list[Case] = [(name, axis, size) for name in CONFIGS for axis, size in UNEVEN]
ON_FOUR: list[Case] = [  # the last is too small for four
    ("hunyuan", SlabAxis.time, (9, 2, 2)),
    ("hunyuan_15", SlabAxis.width, (2, 2, 5)),
    ("ltx_2", SlabAxis.height, (2, 3, 2)),
]
SOAK: list[Case] = [
    (name, axis, size)
    for name in CONFIGS
    for axis in SlabAxis
    for size in [(1, 2, 2), (2, 2, 5), (4, 7, 2), (5, 3, 2), (9, 2, 3)]
]


def made(config: dict[str, Any]) -> CausalVAE:
    """In float64; every parameter and buffer random and not trivial."""
    torch.manual_seed(0)
    vae = CausalVAE(VAEConfig(**config)).double()
    with torch.no_grad():
        for tensor in vae.parameters():
            wide = tensor.ndim > 1
            tensor.normal_(0.0 if wide else 1.0, tensor[0].numel() ** -0.5 if wide else 0.1)
        vae.latent_mean.normal_()
        vae.latent_std.uniform_(0.5, 2)
    return vae


def clip_of(vae: CausalVAE, latent_size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """A video, and noise of the size of its latents."""
    (time, space), (t, h, w) = vae.geometry_strides, latent_size
    generator = torch.Generator().manual_seed(1)
    video = torch.rand(2, 3, 1 + (t - 1) * time, h * space, w * space, generator=generator, dtype=torch.float64)
    return video * 2 - 1, torch.randn(2, vae.config.latent_channels, t, h, w, generator=generator, dtype=torch.float64)


def training_pass(vae: CausalVAE, parallel: ContextParallel, latent_size: tuple[int, int, int]) -> dict[str, Tensor]:
    """The outputs for one clip, and the gradients of every parameter and of the inputs."""
    video, noise = (x.requires_grad_() for x in clip_of(vae, latent_size))
    vae.zero_grad()
    reconstruction, posterior = parallel.reconstruct(vae, video, noise)
    outputs = {"reconstruction": reconstruction, "mean": posterior.mean, "logvar": posterior.logvar}
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs.values()]
    torch.stack([(x * y).mean() for x, y in zip(outputs.values(), upstream, strict=True)]).sum().backward()
    inputs = {"d video": video, "d noise": noise, **{f"d {name}": x for name, x in vae.named_parameters()}}
    # An image does not pass every layer.
    gradients = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in inputs.items()}
    return {name: x.detach() for name, x in outputs.items()} | gradients


def summed(found: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """With gradients summed over ranks, as the engine does."""
    for name, tensor in found.items():
        if name.startswith("d "):
            dist.all_reduce(tensor, group=group)
    return found


def compare(cases: list[Case], group: dist.ProcessGroup) -> dict[str, tuple[float, str]]:
    """The largest relative difference of each case from one rank, and what it is of; on the first rank."""
    worst = {}
    for name, axis, size in cases:
        vae = made(CONFIGS[name])
        actual = summed(training_pass(vae, ContextParallel(group, vae.geometry_strides, axis), size), group)
        if dist.get_rank(group) == 0:
            expected = training_pass(vae, ContextParallel(None, vae.geometry_strides, axis), size)
            worst[f"{name} {axis.value} {size}"] = largest_difference(actual, expected)
    return worst


def largest_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Relative to the largest number of a tensor; gradients that are next to nothing, to those of all parameters."""
    floor = 1e-3 * max(float(x.abs().max()) for name, x in expected.items() if name.startswith("d "))
    found = []
    for name, x in expected.items():
        scale = max(float(x.abs().max()), floor if name.startswith("d ") else 0.0)
        found.append((float((actual[name] - x).abs().max()) / scale, name))
    return max(found)


def on_four_ranks() -> dict[str, Any]:
    """All that needs ranks, on the same ones: first as two pairs, then as four."""
    pair, pairs = dist.new_subgroups(2)
    assert pair is not None
    return {
        "two": compare(ON_TWO[pairs.index(pair) :: 2], pair),
        "four": compare(ON_FOUR, dist.group.WORLD),
    }


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    first, _, third, _ = run_ranks(on_four_ranks, 4)
    return first | {"two": first["two"] | third["two"]}


def check(worst: dict[str, tuple[float, str]], cases: list[Case]) -> None:
    assert len(worst) == len(cases)
    bad = {case: found for case, found in worst.items() if not found[0] <= 1e-12}
    assert not bad, bad


def test_every_preset_on_two_ranks_is_that_of_one(measured):
    check(measured["two"], ON_TWO)


def test_four_ranks_and_clips_too_small_for_them(measured):
    check(measured["four"], ON_FOUR)


def soak() -> dict[str, tuple[float, str]]:
    return compare(SOAK, dist.group.WORLD)


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_size_on_several_ranks_is_that_of_one(ranks):
    check(run_ranks(soak, ranks, timeout_seconds=3600)[0], SOAK)

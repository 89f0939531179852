"""The VAE cut over several ranks computes what one rank computes: outputs and every gradient."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kinema.distributed.activations import ActivationCheckpointing, keep_less
from kinema.distributed.engine import Engine, Precision
from kinema.distributed.halo import SlabAxis
from kinema.models.vae import (
    Attention,
    CausalVAE,
    Convolution,
    Halving,
    Norm,
    Posterior,
    Resampling,
    SpacePadding,
    TimePadding,
    VAEConfig,
)
from kinema.models.vae.layers import CausalConv
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


@torch.no_grad()
def compare_encoding(group: dist.ProcessGroup) -> dict[str, tuple[float, float]]:
    """`encode` and `decode` in float32, without gradients: how far they are from float64, cut and on one rank."""
    found = {}
    for name, axis, size in ON_FOUR:
        vae = made(CONFIGS[name])
        inputs = clip_of(vae, size)
        exact = encoded_and_decoded(vae, ContextParallel(None, vae.geometry_strides), *inputs)
        errors = []
        for of in (group, None):
            parallel = ContextParallel(of, vae.geometry_strides, axis)
            rounded = encoded_and_decoded(vae.float(), parallel, *(x.float() for x in inputs))
            errors.append(max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(rounded, exact, strict=True)))
        found[name] = (errors[0], errors[1])
    return found


def encoded_and_decoded(vae: CausalVAE, parallel: ContextParallel, video: Tensor, latents: Tensor) -> list[Tensor]:
    return [*parallel.encode(vae, video), parallel.decode(vae, latents)]


def halo_bytes(vae: CausalVAE, axis: SlabAxis, size: tuple[int, int, int], group: dist.ProcessGroup) -> list[int]:
    """Bytes that cross the border of two ranks in the forward pass: sent by both, and by the formula."""
    dim = {SlabAxis.time: 2, SlabAxis.height: 3, SlabAxis.width: 4}[axis]
    sent, formula = [0], [0]
    exchange = dist.all_to_all_single

    def counted(incoming: Tensor, outgoing: Tensor, *arguments: Any, **named: Any) -> Any:
        sent[0] += outgoing.nbytes
        return exchange(incoming, outgoing, *arguments, **named)

    def note(layer: Any, inputs: Any) -> None:
        across = layer.conv.kernel_size[dim - 2] - layer.conv.stride[dim - 2]
        formula[0] += across * inputs[0].nbytes // inputs[0].shape[dim]

    hooks = [layer.register_forward_pre_hook(note) for layer in vae.modules() if isinstance(layer, CausalConv)]
    dist.all_to_all_single = counted
    try:
        with torch.no_grad():
            ContextParallel(group, vae.geometry_strides, axis).reconstruct(vae, *clip_of(vae, size))
    finally:
        dist.all_to_all_single = exchange
    for hook in hooks:
        hook.remove()
    total = torch.tensor(sent)
    dist.all_reduce(total, group=group)
    return [int(total), formula[0]]


def kept_bytes(vae: CausalVAE, parallel: ContextParallel, size: tuple[int, int, int]) -> int:
    """Bytes of the tensors that the training pass keeps for its backward, each storage once; without the weights."""
    kept = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = parallel.reconstruct(vae, *clip_of(vae, size))
    assert outputs
    return sum(kept.values()) - sum(kept.get(p.data_ptr(), 0) for p in vae.parameters())


def memory(group: dist.ProcessGroup) -> float:
    """What a rank keeps with its half of a clip, as a share of what one rank keeps."""
    vae, size = made(CONFIGS["wan"]), (2, 8, 4)
    parallel, alone = (ContextParallel(g, vae.geometry_strides, SlabAxis.height) for g in (group, None))
    return kept_bytes(vae, parallel, size) / kept_bytes(vae, alone, size)


CHECKPOINTING = {
    0: ActivationCheckpointing.none,
    1: ActivationCheckpointing.attention,
    2: ActivationCheckpointing.full,
    3: ActivationCheckpointing.selective,
}
"""By ZeRO stage: halos and statistics that a backward asks for again; at 3, what DeepSpeed's linear would spoil."""


def steps_of(zero_stage: int, group: dist.ProcessGroup) -> tuple[float, float]:
    """Two steps through the engine on all ranks against one process: largest differences of weights and norm."""
    size, rate = (2, 5, 2), 1e-2
    reference = made(CONFIGS["hunyuan"]).float()
    vae = copy.deepcopy(reference)
    keep_less(vae.all_blocks(), CHECKPOINTING[zero_stage])
    video, noise = (x.float() for x in clip_of(reference, size))
    optimizer = torch.optim.AdamW(reference.parameters(), lr=rate, eps=1e-3)
    engine = Engine(
        vae, torch.optim.AdamW(vae.parameters(), lr=rate, eps=1e-3), zero_stage=zero_stage,
        precision=Precision.float32, accumulation=1, gradient_clipping=0.0,
    )  # fmt: skip
    parallel = ContextParallel(group, reference.geometry_strides)

    def loss_of(reconstruction: Tensor, posterior: Posterior) -> Tensor:
        return (reconstruction - video).square().mean() + 0.1 * posterior.kl().mean()

    for _ in range(2):
        engine.backward(loss_of(*parallel.reconstruct(engine, video, noise)))
        engine.step(rate)
        optimizer.zero_grad()
        loss_of(*reference(video, noise)).backward()
        optimizer.step()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()]))
    weights = dict(reference.named_parameters())
    differences = [float((full - weights[name].detach()).abs().max() / rate) for name, full in engine.gather()]
    return max(differences), abs(engine.grad_norm() / norm - 1)


def on_four_ranks() -> dict[str, Any]:
    """All that needs ranks, on the same ones: first as two pairs, then as four."""
    pair, pairs = dist.new_subgroups(2)
    assert pair is not None
    bytes_of = {
        f"{name} {axis.value}": halo_bytes(made(CONFIGS[name]), axis, size, pair)
        for name in ("causal_tiny", "ltx_23")
        for axis, size in UNEVEN
    }
    return {
        "two": compare(ON_TWO[pairs.index(pair) :: 2], pair),
        "bytes": bytes_of,
        "memory": memory(pair),
        "four": compare(ON_FOUR, dist.group.WORLD),
        "encoding": compare_encoding(dist.group.WORLD),
        "engine": {stage: steps_of(stage, dist.group.WORLD) for stage in (0, 1, 2, 3)},
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


def test_encoding_and_decoding_on_four_ranks_rounds_as_one_rank_does(measured):
    assert measured["encoding"].keys() == {name for name, _, _ in ON_FOUR}
    for name, (cut, alone) in measured["encoding"].items():
        assert cut <= max(1e-5, 2 * alone), (name, cut, alone)


def test_through_the_engine_at_every_zero_stage(measured):
    """With another kind of activation checkpointing each; float32 weights in units of the learning rate."""
    for stage, (weights, norm) in measured["engine"].items():
        assert weights <= 1e-2, (stage, weights)
        assert norm <= 3e-5, (stage, norm)  # one rank's own group norm rounds by 2e-5


def test_a_border_costs_kernel_less_stride_pixels_of_each_convolution(measured):
    for case, (sent, formula) in measured["bytes"].items():
        assert sent == pytest.approx(formula, rel=0.01), case
        assert sent > 0


def test_a_rank_of_two_keeps_about_half_for_the_backward(measured):
    assert measured["memory"] < 0.6


def soak() -> dict[str, tuple[float, str]]:
    return compare(SOAK, dist.group.WORLD)


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_size_on_several_ranks_is_that_of_one(ranks):
    check(run_ranks(soak, ranks, timeout_seconds=3600)[0], SOAK)

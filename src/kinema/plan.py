"""`kinema plan`: what a training command would take on every rank, before any weight is made."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kinema.config import Config, compose_training
from kinema.data.geometry import ClipShape, Geometry
from kinema.distributed.activations import ActivationCheckpointing
from kinema.distributed.deepspeed_config import OptimizerOffload, ParameterOffload, plan_traffic
from kinema.distributed.engine import Precision
from kinema.distributed.footprint import GIB, Activations, Sharding, States, activations, optimizer_bytes, states
from kinema.given import Given, given_by, lanes_of_rank
from kinema.interop.comparing import Sample
from kinema.models.dit import DiT, make_denoiser
from kinema.models.dit.segments import Grid
from kinema.models.vae import CausalVAE
from kinema.models.vae.resampling import space_to_depth
from kinema.training.dit_task import DiTTaskConfig

FASTEST_FIRST = list(ActivationCheckpointing)
"""From the kind that computes least again; the first that fits is recommended."""


@dataclass(frozen=True)
class Job:
    """What is planned: how the model is made and called with one pack, and what that costs."""

    make: Callable[[], nn.Module]
    forward: Callable[[nn.Module], Tensor]
    pack: str
    """The pack in words."""
    flops: float
    """Of the forward of one pack."""
    attention_flops: float
    """The part of it that grows with the square of a clip's tokens."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="words of the training command")
    parser.add_argument("--ranks", type=int, default=1, help="processes, each with a device")
    parser.add_argument("--device-gib", type=float, default=80.0, help="memory of a device")
    parser.add_argument("--peak-tflops", type=float, help="of a device, in the precision of the run; gives seconds")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("FRAMES", "HEIGHT", "WIDTH"),
                        help="of the clips of a pack; the largest of data.shapes")  # fmt: skip
    parser.add_argument("--clips", type=int, help="in a pack; as many as the data.* words bring to a lane")
    parser.add_argument("--strides", type=int, nargs=2, help="of the VAE (task=dit), in time and space; as vae.path")
    for name, what in {"latent_channels": "VAE", "text_width": "text encoder", "text_tokens": "caption"}.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, help=f"of the {what} (task=dit); as the words and their files say")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 1 if no kind of activation checkpointing fits."""
    config = composed(arguments.words)
    degree = config.parallel.sequence_degree
    lanes_of_rank(config, arguments.ranks)  # raises where the run would not start
    typed = {one.name: getattr(arguments, one.name) for one in fields(Given)}
    assumed: list[str] = []
    job = job_of(config, given_by(config, {name: value for name, value in typed.items() if value is not None}, assumed))
    with FakeTensorMode():
        model = made(config, job)
    held, weights = states_of(config, model, arguments.ranks), sum(p.numel() for p in model.parameters())
    parallel = config.parallel
    print(f"{weights / 1e6:,.2f} M parameters, {job.pack}; {arguments.ranks} rank(s), {parallel.line()}")
    print(held.line())
    print(f"\n{'activations':>12}{'kept GiB':>10}{'peak GiB':>10}{'with states':>13}{'computed again':>16}")
    chosen = None
    for kind, found in kinds(config, job).items():
        together = held.total + found.peak / degree
        again = computed_again(kind, job, parallel.checkpointed_every)
        print(f"{kind.value:>12}{found.kept / degree / GIB:>10.2f}{found.peak / degree / GIB:>10.2f}"
              f"{together / GIB:>13.2f}{again:>15.0%}")  # fmt: skip
        if chosen is None and together <= arguments.device_gib * GIB:
            chosen = kind
    print(f"\n{flops_line(config, job, arguments)}")
    for what in assumed:
        print(f"ASSUMED {what}")
    if chosen is None:
        print(f"NO KIND FITS {arguments.device_gib:g} GiB: shard more (parallel.zero_stage, --ranks), raise "
              "parallel.sequence_degree, or shorten the pack (data.max_pack_tokens)")  # fmt: skip
        return 1
    print(f"READY parallel.activation_checkpointing={chosen.value} fits {arguments.device_gib:g} GiB")
    return 0


def composed(words: list[str]) -> Config:
    """The configuration as the training command with these words composes it; a VAE need not be there."""
    told = any(word.startswith(("task=", "vae", "experiment=")) for word in words)
    return compose_training(words if told else [*words, "vae.path=nowhere"])


def job_of(config: Config, given: Given) -> Job:
    """One pack of this run."""
    return dit_job(config, given) if isinstance(config.task, DiTTaskConfig) else vae_job(config, given)


def dit_job(config: Config, given: Given) -> Job:
    """A pack of clips of one shape."""
    if config.model.audio or config.model.audio_channels:
        raise ValueError("kinema plan knows no sound yet: plan the video alone, without model.audio.")
    geometry = Geometry(given.strides[0], given.strides[1], tuple(config.model.patch_size))
    shape = geometry.check(given.shape, "--shape") if given.shape else ClipShape(*config.data.shapes[0])
    grid = geometry.token_grid(geometry.check(shape))
    clips = given.clips or max(1, config.data.max_pack_tokens // prod(grid))
    with torch.device("meta"):
        model = make_denoiser(config.model, given.latent_channels, given.text_width)
    once, twice = (model.flops((times * grid[0], *grid[1:]), given.text_tokens) for times in (1, 2))
    captions = model.flops((0, *grid[1:]), given.text_tokens)
    return Job(
        make=partial(make_denoiser, config.model, given.latent_channels, given.text_width),
        forward=partial(_denoise, config, grid, given.text_tokens, clips),
        pack=f"a pack of {clips} clip(s) of {list(shape)}: {clips * prod(grid):,} tokens",
        flops=clips * once,
        attention_flops=clips * (twice - 2 * once + captions) / 2,
    )


def _denoise(config: Config, grid: Grid, words: int, clips: int, model: nn.Module) -> Tensor:
    one = model if isinstance(model, DiT) else model.high
    assert isinstance(one, DiT)
    sample = replace(Sample.of(one, words, tokens=grid), guidance=None, ofs=None)
    guidance = [1.0, 1.0] if one.config.guidance else None
    ofs = [1.0, 1.0] if one.config.ofs_channels else None
    extras = replace(sample.extras(), guidance=guidance, ofs=ofs).take([0] * clips)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.parallel.precision is not Precision.float32):
        found = one([sample.latents[0]] * clips, sample.timesteps[:1].repeat(clips), [sample.text[0]] * clips, extras)
    return torch.stack([clip.float().square().mean() for clip in found]).sum()


def vae_job(config: Config, given: Given) -> Job:
    """A batch of clips of one shape; what the loss computes beside the autoencoder is not counted."""
    shape = given.shape or config.task.crop or config.data.shapes[0]
    clips = given.clips or 1
    encode, decode = CausalVAE(config.vae).flops(*shape)
    return Job(
        make=partial(CausalVAE, config.vae),
        forward=partial(_reconstruct, config, shape, clips),
        pack=f"a batch of {clips} clip(s) of {list(shape)}",
        flops=clips * (encode + decode),
        attention_flops=0.0,
    )


def _reconstruct(config: Config, shape: Sequence[int], clips: int, model: nn.Module) -> Tensor:
    assert isinstance(model, CausalVAE)
    last = torch.channels_last_3d
    with torch.autocast("cpu", torch.bfloat16, enabled=config.parallel.precision is not Precision.float32):
        video = space_to_depth(torch.zeros(clips, 3, *shape), config.vae.pixel_patch).contiguous(memory_format=last)
        latents = model.encoder(video)[:, : config.vae.latent_channels]
        return model.decoder(latents.contiguous(memory_format=last)).float().square().mean()


def states_of(config: Config, model: nn.Module, ranks: int) -> States:
    """Bytes on one rank of a model whose trained parameters are chosen."""
    state_bytes = optimizer_bytes(config.optim.build(model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    traffic = plan_traffic(model, config.parallel.traffic, "cuda")
    offload = config.parallel.offload
    sharding = Sharding(
        config.parallel.zero_stage,
        ranks,
        traffic.bucket,
        traffic.whole,
        optimizer_on_host=offload.optimizer is not OptimizerOffload.none,
        weights_on_host=offload.parameters is not ParameterOffload.none,
    )
    return states(trained, frozen, state_bytes, 1 + len(config.ema.power), sharding)


def made(config: Config, job: Job) -> nn.Module:
    """The model with its trained parameters chosen."""
    with torch.device("meta"):  # adapters are moved to where their layers lie, which fake tensors cannot be
        model = job.make()
        config.finetune.prepare(model)
    for module in model.modules():
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            here = torch.empty_like(value, device="cpu")
            setattr(module, name, nn.Parameter(here, value.requires_grad) if isinstance(value, nn.Parameter) else here)
    return model


def kinds(
    config: Config, job: Job, wanted: Sequence[ActivationCheckpointing] = FASTEST_FIRST
) -> dict[ActivationCheckpointing, Activations]:
    """Activations of one pack with each of these kinds."""
    none, every, full = (ActivationCheckpointing(kind) for kind in ("none", "every", "full"))
    make, found = partial(made, config, job), dict[ActivationCheckpointing, Activations]()
    for kind in FASTEST_FIRST:
        if kind is not every and (kind in wanted or (every in wanted and kind in (none, full))):
            found[kind] = activations(make, job.forward, _blocks, kind)
    if every in wanted:
        with FakeTensorMode():
            count = len(_blocks(make()))
        share = ceil(count / config.parallel.checkpointed_every) / count
        between = zip(found[none], found[full], strict=True)
        found[every] = Activations(*(a + share * (b - a) for a, b in between))
    return {kind: found[kind] for kind in wanted}


def _blocks(model: Any) -> list[nn.Module]:
    return list(model.all_blocks())


def computed_again(kind: ActivationCheckpointing, job: Job, every: int) -> float:
    """Operations of products that the backward repeats, as a share of those of the forward."""
    linear = 1 - job.attention_flops / job.flops
    shares = {ActivationCheckpointing.full: 1.0, ActivationCheckpointing.every: 1 / every}
    return {**shares, ActivationCheckpointing.attention: linear}.get(kind, 0.0)


def flops_line(config: Config, job: Job, arguments: argparse.Namespace) -> str:
    """Operations of a step, how utilisation is counted, and with a peak how long a step takes at least."""
    packs = config.data.lanes
    step = 3 * job.flops * packs
    line = (
        f"a step of {packs} such packs: {step / 1e12:,.2f} TFLOP (forward and twice that backward; nothing that is "
        "computed again, no padding, no optimiser, no frozen encoder)\n"
        "MFU = those / (seconds of a step x ranks x peak of a device)"
    )
    if arguments.peak_tflops is None:
        return line
    return f"{line}: {step / 1e12 / arguments.peak_tflops / arguments.ranks:,.2f} s at 100 %"

"""Sequence parallelism changes nothing but where tokens lie: real ranks against one, for every preset."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.sequence import sent_bytes
from kinema.data.geometry import ClipShape
from kinema.data.packs.pack import Pack
from kinema.distributed.activations import ActivationCheckpointing, keep_less
from kinema.distributed.engine import Engine, Precision
from kinema.distributed.mesh import Mesh, make_mesh
from kinema.distributed.process import Process
from kinema.distributed.sequence import Ulysses
from kinema.models.dit import DiTConfig
from kinema.training.shared_packs import read_once
from tests.distributed.sequence_cases import GRIDS, WORDS, Inputs, configs, model
from tests.ranks import run_ranks
from tests.unit.test_compile import traced

pytestmark = pytest.mark.distributed

JOINT, CROSS, SOUND = "factorised, and joint", "windows", "ltx 2.3"
STEPS, LANES = 2, 2


@pytest.fixture(name="found", scope="module", params=[2, pytest.param(4, marks=pytest.mark.soak)])
def found_on_ranks(request):
    """What every rank found, all of it in one start; with 4 ranks, heads are fewer than ranks."""
    return run_ranks(everything, request.param, configs(), timeout_seconds=600)


def test_every_preset_says_and_learns_the_same_as_on_one_rank(found):
    for rank in found:
        assert {name: values for name, values in rank["presets"].items() if max(values) > 1e-12} == {}


def test_a_pack_of_fewer_tokens_than_ranks_is_the_same(found):
    """Ranks without a token still compute with every layer, or others would wait for their gradients."""
    for rank in found:
        assert {name: values for name, values in rank["less"].items() if max(values) > 1e-12} == {}


def test_no_clip_has_a_derivative_by_another(found):
    """Summed over the ranks, by latents, captions and timesteps of the others: exactly 0, and not by its own."""
    for rank in found:
        for name, (own, others) in rank["clips"].items():
            assert own > 0, name
            assert others == 0, name


def test_blocks_computed_again_give_the_same_bits(found):
    assert [rank["recomputed"] for rank in found] == [[]] * len(found)


def test_the_exchanges_send_as_many_bytes_as_the_formula_says(found):
    for rank in found:
        for name, (sent, formula) in rank["bytes"].items():
            assert sent == pytest.approx(formula, rel=0.01), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_is_the_same_at_every_zero_stage(found, stage):
    for rank in found:
        norms, moves = rank["engine"][stage]
        assert norms < 2e-5
        assert moves < 5e-3  # of float32 against float64


def test_the_first_rank_reads_for_its_group_and_its_errors_are_everybodys(found):
    for rank in found:
        assert rank["read"] == (True, "the disk is gone")


def test_the_degree_must_divide_the_ranks(found):
    for rank in found:
        assert f"parallel.sequence_degree=3 must divide the number of ranks, {len(found)}" in rank["refused"]


def everything(cases: dict[str, DiTConfig]) -> dict[str, Any]:
    """On one of some ranks, which are one group; with four, two groups of two for training."""
    world = dist.get_world_size()
    group = Ulysses(make_mesh(world))
    with pytest.raises(ValueError, match="sequence_degree") as refused:
        make_mesh(3)
    return {
        "presets": {name: differences(config, group) for name, config in cases.items()},
        "less": {name: differences(cases[name], group, clips=1) for name in (JOINT, CROSS, SOUND, "hunyuan_tiny")},
        "clips": {name: derivatives(cases[name], group) for name in (JOINT, CROSS, SOUND, "minimax with sound")},
        "recomputed": [name for name in (JOINT, CROSS) if changed_when_recomputed(cases[name], group)],
        "bytes": {name: traffic(cases[name], group) for name in (JOINT, CROSS)},
        "refused": str(refused.value),
        "read": read_together(),
        "engine": training(cases[JOINT], make_mesh(2)),
    }


def pack(lane: int) -> Pack:
    generator = torch.Generator().manual_seed(lane)
    frames = [torch.randint(256, (5, side, 4, 3), dtype=torch.uint8, generator=generator) for side in (4, 6)]
    shapes = [ClipShape(5, side, 4) for side in (4, 6)]
    return Pack(7, lane, ["a", "b"], ["", "c"], shapes, frames, None, torch.ones(2), 1.0, [3, 4], [0, 0], [], 8.0, 0.1)


def read_together() -> tuple[bool, str]:
    """Whether every rank got the packs of the first one of its group, and the error that it then had."""
    rank, mesh = dist.get_rank(), make_mesh(2)

    def read() -> Iterator[list[Pack]]:
        assert mesh.sequence_rank == 0
        yield [pack(lane) for lane in (0, 1)]
        raise ValueError("the disk is gone")

    packs = read_once(Process(rank, rank, dist.get_world_size(), torch.device("cpu"), mesh), read)
    same = True
    for ours, theirs in zip(next(packs), [pack(0), pack(1)], strict=True):
        same &= (ours.lane, ours.keys, ours.shapes) == (theirs.lane, theirs.keys, theirs.shapes)
        same &= all(torch.equal(a, b) for a, b in zip(ours.frames, theirs.frames, strict=True))
    with pytest.raises(ValueError, match="disk") as error:
        next(packs)
    return same, str(error.value)


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Of two lists of tensors, over the largest value of each, and of all: a gradient may be nothing but rounding."""
    with torch.no_grad():
        most = [float(x.abs().max()) for x in theirs]
        off = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    return max(difference / (own + 1e-3 * max(most)) for difference, own in zip(off, most, strict=True))


def weighed(outputs: list[Tensor]) -> Tensor:
    """A loss to which every number of every clip adds something else."""
    weights = [torch.linspace(0, 1, x.numel(), dtype=x.dtype).view_as(x) for x in outputs]
    return torch.stack([(x.square() * weight).mean() for x, weight in zip(outputs, weights, strict=True)]).sum()


def passed(module: nn.Module, inputs: Inputs) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs, and gradients of all weights, latents and captions."""
    leaves = [*module.parameters(), *inputs.latents, *inputs.text]
    outputs = inputs.outputs(module)
    return outputs, list(torch.autograd.grad(weighed(outputs), leaves, allow_unused=True))


def differences(config: DiTConfig, group: Ulysses, *, compiled: bool = False, clips: int = 3) -> tuple[float, float]:
    """Of outputs and gradients on this group against those of this rank alone."""
    module, inputs = model(config), Inputs(config, clips=clips).with_gradients()
    expected, gradients = passed(module, inputs)
    module.share_tokens(group)
    if compiled:
        module.compile_blocks(traced)
    outputs, parts = passed(module, inputs)
    assert [part is None for part in parts] == [gradient is None for gradient in gradients]
    ours, theirs = ([x for x in each if x is not None] for each in (parts, gradients))
    for part in ours:
        dist.all_reduce(part, group=group.group)
    return largest_difference(outputs, expected), largest_difference(ours, theirs)


def derivatives(config: DiTConfig, group: Ulysses) -> tuple[float, float]:
    """Largest derivative of the first clip's prediction by its own latents and caption, and by those of the others."""
    module, inputs = model(config), Inputs(config).with_gradients()
    module.share_tokens(group)
    leaves = [*inputs.latents, *inputs.text]
    parts = torch.autograd.grad(inputs.outputs(module)[0].square().sum(), leaves)
    for part in parts:
        dist.all_reduce(part, group=group.group)
    largest = [float(part.abs().max()) for part in parts]
    clips = len(GRIDS)
    own = min(largest[0], largest[clips])
    return own, max(value for place, value in enumerate(largest) if place % clips)


def changed_when_recomputed(config: DiTConfig, group: Ulysses) -> bool:
    """Whether any gradient has another last bit under any kind of activation checkpointing."""

    def gradients(kind: ActivationCheckpointing) -> list[Tensor | None]:
        module = model(config)
        module.share_tokens(group)
        keep_less(module.all_blocks(), kind)
        return passed(module, Inputs(config).with_gradients())[1]

    expected = gradients(ActivationCheckpointing.none)
    kinds = [kind for kind in ActivationCheckpointing if kind is not ActivationCheckpointing.none]
    pairs = [pair for kind in kinds for pair in zip(gradients(kind), expected, strict=True)]
    return not all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def traffic(config: DiTConfig, group: Ulysses) -> tuple[int, float]:
    """Bytes that a rank sends to others, forwards and backwards, and the formula of docs/sequence_parallel.md."""
    module, inputs = model(config), Inputs(config)
    module.share_tokens(group)
    with sent_bytes() as sent:
        weighed(inputs.outputs(module)).backward()
    ranks = group.size
    video, words = (-(-sum(counts) // ranks) for counts in ([t * h * w for t, h, w in GRIDS], WORDS))
    heads = -(-config.num_heads // ranks) * ranks
    if config.attention.name == "windowed":
        tokens = config.depth * 4 * video
    else:  # joint over each frame, the last block's words only answer; then the video over time
        tokens = config.depth * (8 * video + 4 * words) - 2 * words
    return sum(sent), 2 * tokens * heads * config.head_dim * 8 * (ranks - 1) / ranks


def training(config: DiTConfig, mesh: Mesh) -> list[tuple[float, float]]:
    """At every ZeRO stage the largest differences of gradient norms, and of moves of weights, from one process."""
    norms, expected = reference(config)
    return [trained(config, mesh, stage, norms, expected) for stage in range(4)]


def trained(
    config: DiTConfig, mesh: Mesh, stage: int, norms: list[float], expected: dict[str, Tensor]
) -> tuple[float, float]:
    lanes = range(mesh.data_rank, LANES, mesh.data_size)
    module = model(config).float()
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    module.share_tokens(Ulysses(mesh))
    engine = Engine(
        module, optimizer(module), zero_stage=stage, precision=Precision.float32, accumulation=len(lanes),
        gradient_clipping=0.5,
    )  # fmt: skip
    off = 0.0
    for step in range(STEPS):
        for lane in lanes:
            engine.backward(lane_loss(engine, config, step, lane, torch.float32))
            engine.step(1e-2)
        off = max(off, abs(engine.grad_norm() / norms[step] - 1))
    moves = [(full - before[name], expected[name] - before[name]) for name, full in engine.gather()]
    return off, max(float((ours - theirs).abs().max() / (theirs.abs().max() + 1e-5)) for ours, theirs in moves)


def reference(config: DiTConfig) -> tuple[list[float], dict[str, Tensor]]:
    module, norms = model(config), []
    moves = optimizer(module)
    for step in range(STEPS):
        moves.zero_grad()
        for lane in range(LANES):
            lane_loss(module, config, step, lane, torch.float64).backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), 0.5)))
        moves.step()
    return norms, {name: value.detach() for name, value in module.named_parameters()}


def lane_loss(module: Any, config: DiTConfig, step: int, lane: int, dtype: torch.dtype) -> Tensor:
    inputs = Inputs(config, seed=10 * step + lane, dtype=dtype)
    return weighed(module(inputs.latents, inputs.timesteps, inputs.text, inputs.extras)) / LANES


def optimizer(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-2, weight_decay=0.0)  # damped, see test_engine


@pytest.mark.soak
def test_compiled_blocks_learn_the_same():
    """The exchanges stay out of the graph, or what lies before them might get a gradient of zero."""
    for found in run_ranks(compiled, 2, configs()[JOINT]):
        assert max(found) < 1e-12


def compiled(config: DiTConfig) -> tuple[float, float]:
    return differences(config, Ulysses(make_mesh(2)), compiled=True)

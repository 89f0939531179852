"""Compiled blocks: the numbers of uncompiled ones, one compilation for packs of any sizes, the others counted."""

import re
from functools import partial

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from kinema.distributed.activations import ActivationCheckpointing, keep_less
from kinema.distributed.compiling import Compilations, Compile, compiler
from kinema.distributed.engine import ParallelConfig
from kinema.models.dit import TextEdge, make_denoiser
from kinema.models.dit.compiled import token_rows
from kinema.models.dit.segments import Rows
from kinema.training.finetune import LoRA
from tests.unit.test_activation_checkpointing import CHANNELS, DITS, TEXT, randomised
from tests.unit.test_dit import extras_for, small

MIXED = [
    [(2, 4, 6), (1, 8, 4), (2, 4, 6)],
    [(1, 4, 4)],
    [(4, 6, 4), (1, 2, 2)],
    [(1, 2, 2), (1, 2, 2), (3, 2, 6), (2, 8, 4)],
]
"""Packs, by the shapes of their clips in latents, for patches of one frame."""


@pytest.fixture(autouse=True)
def _fresh():
    """Settings of the process as they were; nothing compiled before."""
    import torch._functorch.config as kept
    import torch.fx.experimental._config as shapes

    torch._dynamo.reset()
    sizes = shapes.patch(backed_size_oblivious=False, use_duck_shape=True)
    with sizes, kept.patch(ban_recompute_materialized_backward=True):
        yield


def made(config, dtype):
    return randomised(make_denoiser(config, CHANNELS, TEXT)).to(dtype)


def traced(function):
    """Compiled as in a run, by all but the last step: graphs are not turned into machine code, which takes minutes."""
    compile_ = compiler()
    return torch.compile(function, **{**compile_.keywords, "options": None}, backend="aot_eager")


def clips(model, shapes, dtype, seed=0):
    """The prediction of a pack of clips of these shapes, with captions of 1 token and more."""
    patch, generator = model.config.patch_size[0], torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    latents = [draw(CHANNELS, t * patch, h, w) for t, h, w in shapes]
    times, text = draw(len(shapes)).sigmoid(), [draw(1 + 3 * clip, TEXT) for clip in range(len(shapes))]
    extras = extras_for(model.config, latents)
    return model([x.to(dtype) for x in latents], times.to(dtype), [x.to(dtype) for x in text], extras)


def passed(model, shapes, dtype=torch.float64):
    """Predictions, loss and gradients."""
    model.zero_grad()
    found = clips(model, shapes, dtype)
    loss = sum(clip.square().mean() for clip in found)
    loss.backward()
    return [*found, loss], {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def furthest(found, wanted):
    """The largest difference of outputs and gradients, over the largest number of each, and a thousandth of all."""
    assert found[1].keys() == wanted[1].keys()
    pairs = [*zip(found[0], wanted[0], strict=True), *((found[1][name], x) for name, x in wanted[1].items())]
    with torch.no_grad():
        most = max(float(x.abs().max()) for x in wanted[1].values())
        return max(float((a - b).abs().max() / (b.abs().max() + 1e-3 * most)) for a, b in pairs)


def compare(config, dtype, how, packs):
    """The largest difference over these packs, and how many graphs the first one and the others made."""
    model, plain = made(config, dtype), made(config, dtype)
    names = list(model.state_dict())
    model.compile_blocks(how)
    counted, off, graphs = Compilations(), 0.0, []
    for shapes in packs:
        off = max(off, furthest(passed(model, shapes, dtype), passed(plain, shapes, dtype)))
        graphs.append(counted.count())
    assert list(model.state_dict()) == names
    return off, graphs[0], graphs[-1] - graphs[0]


def test_compiled_blocks_are_the_uncompiled_ones():
    """By a C++ compiler, which takes its time: of one kind of layer."""
    off, _, more = compare(small(depth=1, text=TextEdge.shared), torch.float64, compiler(), MIXED)
    assert off < 1e-12
    assert more == 0


@pytest.mark.soak
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", DITS)
def test_every_family_compiled_is_the_uncompiled_one(name, dtype):
    off, first, more = compare(DITS[name], dtype, compiler(), MIXED)
    print(f"{name} {dtype}: {off:.1e}, {first} graphs and {more} more")
    assert off < (1e-12 if dtype is torch.float64 else 1e-5)
    assert more == 0


@pytest.mark.parametrize("lengths", [(2, 0, 3), (0, 0), (4,)])
def test_rows_of_tokens_are_rows_of_lengths(lengths):
    """Also of rows that no token here has, as of a share of a pack, or of the other segments."""
    first, count = 2, 6
    vectors = torch.randn(count, 4, dtype=torch.float64, requires_grad=True)
    found = token_rows(Rows(lengths, first), count, vectors.device).of(vectors)
    of_tokens = torch.arange(first, first + len(lengths)).repeat_interleave(torch.tensor(lengths))
    assert torch.equal(found, vectors[of_tokens])
    weights = torch.randn(len(found), 4, dtype=torch.float64)
    (grad,) = torch.autograd.grad(found, vectors, weights)
    torch.testing.assert_close(grad, torch.zeros_like(grad).index_add(0, of_tokens, weights))


@pytest.mark.soak
@pytest.mark.parametrize("how", [traced, compiler], ids=["traced", "compiled"])
def test_adapters_draw_the_same_dropout(how):
    def adapted():
        model = made(small(depth=2), torch.float64)
        torch.manual_seed(1)
        LoRA(rank=2, dropout=0.3).prepare(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        return model.double()

    model, plain = adapted(), adapted()
    model.compile_blocks(compiler() if how is compiler else traced)
    counted, graphs = Compilations(), []
    for shapes in MIXED:
        found = []
        for one in (model, plain):
            torch.manual_seed(2)
            found.append(passed(one, shapes))
        assert furthest(*found) < 1e-12
        graphs.append(counted.count())
    assert graphs[0] == graphs[-1] > 0


def test_blocks_alike_and_packs_unlike_are_compiled_once():
    """The first pack is the worst teacher: one clip of one token, with a caption of one."""
    few, many = (made(small(depth=depth), torch.float64) for depth in (1, 12))
    counted = Compilations()
    few.compile_blocks(traced)
    passed(few, [(1, 2, 2)])
    once = counted.count()
    many.compile_blocks(traced)
    plain = made(small(depth=12), torch.float64)
    for shapes in MIXED:
        assert furthest(passed(many, shapes), passed(plain, shapes)) < 1e-12
    assert counted.count() == once
    lines = counted.lines()
    assert len(lines) == once
    assert all(re.fullmatch(r"(ask|answer|all) in [\d.]+ s(, not as before: [^#\n]+)?", line) for line in lines)
    assert counted.lines() == []


def test_what_would_compile_without_end_ends():
    model = made(small(depth=1), torch.float64)
    model.compile_blocks(partial(torch.compile, fullgraph=True, dynamic=False, recompile_limit=2, backend="eager"))
    passed(model, [(1, 4, 4)])  # self- and cross-attention are two kinds of the same function
    with pytest.raises(FailOnRecompileLimitHit):
        passed(model, [(2, 4, 4)])


@pytest.mark.parametrize(
    "kind",
    [ActivationCheckpointing.attention, pytest.param(ActivationCheckpointing.full, marks=pytest.mark.soak)],
)
def test_compiled_blocks_are_computed_again(kind):
    config = small(depth=2, text=TextEdge.shared)
    model, plain = made(config, torch.float64), made(config, torch.float64)
    keep_less(model.all_blocks(), kind)
    model.compile_blocks(traced)
    counted, graphs = Compilations(), []
    for shapes in MIXED[:2]:
        assert furthest(passed(model, shapes), passed(plain, shapes)) < 1e-12
        graphs.append(counted.count())
    assert graphs[0] == graphs[1] > 0


def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(ValueError, match="activation_checkpointing=selective"):
        ParallelConfig(compile=Compile.blocks, activation_checkpointing=ActivationCheckpointing.selective)

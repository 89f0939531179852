"""Packs: clips of any size through one pass of the DiT are what each is alone, and know nothing of each other."""

import functools
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kinema.data.geometry import ClipShape, Geometry
from kinema.models import attention as door
from kinema.models.dit import (
    AttentionPattern,
    DiT,
    Extras,
    ModulationSource,
    NormKind,
    PositionEmbedding,
    Sound,
    TextEdge,
)
from kinema.training.dit_task import check_sizes
from tests.unit.test_attention import flash_attn_varlen_func
from tests.unit.test_dit import (
    CHANNELS,
    TEXT,
    VARIANTS,
    WALKED,
    extras_for,
    is_inert,
    legal_points,
    pack,
    small,
    unread,
)

WORDS = [3, 1, 9, 2, 4]
PARALLEL = {"text": TextEdge.joint, "modulation": ModulationSource.linear, "depth": 2, "single_depth": 1}
CASES = {
    **VARIANTS,
    "root mean square norms": {"norm": NormKind.rms, "norm_affine": True},
    "factorised and parallel": {**PARALLEL, "attention": AttentionPattern.factorised},
    "controlled": {"control_layers": [0], "control_channels": 2},
    "told of images, glyphs and channels": {"image_width": 3, "glyph_width": 4, "condition_channels": 2},
}
by_case = pytest.mark.parametrize("case", CASES)


def shapes_of(config):
    """In latents: not sorted, two alike, one a single token of frames."""
    return [(4, 6, 8), (2, 10, 4), (4, 6, 8), (2, 2, 4), (config.patch_size[0], 4, 4)]


class Given:
    """A pack as a model is called with it, and its clips one by one."""

    def __init__(self, config, shapes, words, *, by_frame=False, seed=0):
        self.latents, times, self.text = pack(shapes, words, seed=seed)
        frames = [shape[0] // config.patch_size[0] for shape in shapes]
        spread = [
            (time * torch.linspace(0, 1, count, dtype=time.dtype)) for time, count in zip(times, frames, strict=True)
        ]
        self.times = spread if by_frame else list(times[:, None])
        self.by_frame, self.extras = by_frame, extras_for(config, self.latents)

    def __len__(self):
        return len(self.latents)

    def run(self, model, clips):
        """What the model says of these clips, together: video, and sound where it has any."""
        clips = list(clips)
        times = [self.times[clip] for clip in clips]
        found = model.predict_streams(
            [self.latents[clip] for clip in clips],
            times if self.by_frame else torch.cat(times),
            [self.text[clip] for clip in clips],
            self.extras.take(clips),
        )
        return [list(both) for both in zip(found.video, *([] if found.audio is None else [found.audio]), strict=True)]

    def leaves(self, clip):
        """Every tensor that this clip alone is told."""
        extras = [getattr(self.extras, field.name) for field in fields(Extras)]
        own = [value[clip] for value in extras if value is not None and not isinstance(value, Sound)]
        sound = [] if self.extras.audio is None else [self.extras.audio.latents[clip]]
        return [
            x for x in (self.latents[clip], self.times[clip], self.text[clip], *own, *sound) if isinstance(x, Tensor)
        ]

    def to(self, dtype):
        for clip in range(len(self)):
            for leaf in self.leaves(clip):
                leaf.data = leaf.data.to(dtype)
        return self


def made(config, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = DiT(config, CHANNELS, TEXT).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def loss_of(clips):
    return sum(x.square().mean() for clip in clips for x in clip)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def together(model, given):
    found = given.run(model, range(len(given)))
    return found, gradients(model, loss_of(found))


def alone(model, given):
    found, total = [], dict[str, Tensor]()
    for clip in range(len(given)):
        (one,) = given.run(model, [clip])
        found.append(one)
        for name, grad in gradients(model, loss_of([one])).items():
            total[name] = total.get(name, 0) + grad
    return found, total


def furthest(found, wanted, model):
    """Largest difference of any output or gradient, as a share of the largest number in that tensor.

    Gradients that are a thousandth of the largest, or less, are what is left of sums that cancel: shares of that.
    """
    outputs = [(a, b) for one, other in zip(found[0], wanted[0], strict=True) for a, b in zip(one, other, strict=True)]
    assert found[1].keys() == wanted[1].keys()
    grads = [(found[1][name], grad) for name, grad in wanted[1].items() if not is_inert(name, model)]
    least = max(grad.abs().max() for _, grad in grads) / 1000
    return max(
        *(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in outputs),
        *(float((a - b).abs().max() / b.abs().max().clamp(min=least)) for a, b in grads),
    )


def check_nothing_leaks(model, given):
    """No output of a clip has a derivative other than exactly zero by anything that another clip is told."""
    everyone = range(len(given))
    for clip in everyone:
        for leaf in given.leaves(clip):
            leaf.requires_grad_()
    found = given.run(model, everyone)
    for clip in everyone:
        for other in everyone:
            leaves = given.leaves(other)
            grads = torch.autograd.grad(loss_of([found[clip]]), leaves, retain_graph=True, allow_unused=True)
            if clip == other:
                assert grads[0].abs().max() > 1e-9  # the latents
            else:
                assert not any(grad.any() for grad in grads if grad is not None), (clip, other)


@by_case
def test_a_pack_is_its_clips_one_by_one(case):
    config = small(**CASES[case])
    for dtype, most in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model, given = made(config, dtype), Given(config, shapes_of(config), WORDS).to(dtype)
        assert furthest(together(model, given), alone(model, given), model) < most


@by_case
def test_nothing_leaks_from_clip_to_clip(case):
    config = small(**CASES[case])
    check_nothing_leaks(made(config), Given(config, shapes_of(config), WORDS))


@pytest.mark.parametrize("alike", [False, True])
@by_case
def test_a_clip_without_numbers_spoils_no_other_bit(case, alike):
    config = small(**CASES[case])
    shapes = [(4, 6, 8)] * 5 if alike else shapes_of(config)
    model, given = made(config, torch.float32), Given(config, shapes, WORDS).to(torch.float32)
    with torch.no_grad():
        before = given.run(model, range(5))
        for leaf in given.leaves(1):
            leaf.fill_(torch.nan)
        after = given.run(model, range(5))
    assert after[1][0].isnan().all()
    assert all(torch.equal(before[clip][0], after[clip][0]) for clip in (0, 2, 3, 4))


def walked(count):
    """Random legal models with a pack each; frames of every second one have timesteps of their own."""
    for seed, changes in enumerate(legal_points(count)):
        config = small(**WALKED, **changes)
        grid = [side * patch for side, patch in zip(config.position_grid, config.patch_size, strict=True)]
        fixed = bool(config.position_words)  # a model of learned places takes one size alone
        shapes = [grid] * 3 if fixed else [(4, 6, 8), (2, 4, 4), (4, 6, 8)]
        given = Given(config, shapes, [3, 2, 1] if fixed else [3, 2, 7], by_frame=seed % 2 == 1, seed=seed)
        yield made(config, seed=seed), given, changes


def check_walk(count):
    for model, given, changes in walked(count):
        wanted = alone(model, given)
        for name in [name for name in wanted[1] if unread(name, model.config)]:
            del wanted[1][name]
        found = together(model, given)
        same = found[0], {name: found[1][name] for name in wanted[1]}
        assert furthest(same, wanted, model) < 1e-9, changes
        check_nothing_leaks(model, given)


def test_random_points_of_the_product_of_the_axes_take_packs():
    check_walk(8)


@pytest.mark.soak
def test_many_random_points_of_the_product_of_the_axes_take_packs():
    check_walk(100)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (PositionEmbedding.learned, r"data\.shapes has \[5, 32, 32\].*exactly model\.position_grid=\[3, 2, 2\]"),
        (
            PositionEmbedding.learned_axes,
            r"data\.shapes has \[9, 64, 32\].*larger than .*model\.position_grid=\[3, 4, 2\]",
        ),
    ],
)
def test_clips_that_fixed_places_cannot_take_are_refused_before_the_first_step(kind, message):
    learned = kind is PositionEmbedding.learned
    words = {"position_words": 8, "text": TextEdge.shared, "modulation": ModulationSource.linear} if learned else {}
    config = small(position_embedding=kind, position_grid=[3, 2, 2], **words)
    shapes = [ClipShape(9, 32, 32), ClipShape(5, 32, 32), ClipShape(9, 64, 32)]
    geometry = Geometry(4, 8, (1, 2, 2))
    check_sizes(config, geometry, shapes[:1])
    with pytest.raises(ValueError, match=message):
        check_sizes(config, geometry, shapes)


@pytest.mark.parametrize("case", ["full", "single streams", "joint and factorised", "windowed"])
def test_activations_can_be_made_again(case):
    config = small(**CASES[case])
    model, given = made(config), Given(config, shapes_of(config), WORDS)
    wanted = together(model, given)
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    found = together(model, given)
    assert furthest(found, wanted, model) < 1e-12


@pytest.mark.parametrize("case", ["full", "joint", "factorised and parallel", "windowed"])
def test_a_pack_through_flash_attention_is_the_same(case, monkeypatch):
    """The call that runs on a GPU, with the kernel done by loops."""
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    config = small(**CASES[case])
    model, given = made(config), Given(config, shapes_of(config)[1:], WORDS[1:])
    wanted = together(model, given)
    model.replace_attention(lambda present: door._flash_varlen)
    assert furthest(together(model, given), wanted, model) < 1e-11


def test_compiled_blocks_give_the_same():
    """A pack of several lengths and then another: other guards, the same numbers. What it costs: docs/packing.md."""
    config = small(depth=1)
    model, given = made(config), Given(config, shapes_of(config), WORDS)
    wanted = [given.run(model, clips) for clips in ([0, 1, 2], [3, 4])]
    for block in model.blocks:
        block.compile(backend="eager")
    for clips, expected in zip(([0, 1, 2], [3, 4]), wanted, strict=True):
        for one, other in zip(given.run(model, clips), expected, strict=True):
            torch.testing.assert_close(one, other)

"""The second stream: a new model's towers leave each other alone, both hear each other, and its work is counted."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kinema.models.dit import (
    CrossNorm,
    DiT,
    DiTConfig,
    Extras,
    HeadModulation,
    ModulationSource,
    Rope,
    Sound,
    StreamConfig,
    TextEdge,
)

SHAPES = [(4, 2, 4), (2, 4, 6)]  # not in the order that the model sorts them in
SOUNDS = [5, 9]
STREAM = {"channels": 3, "width": 16, "num_heads": 2, "extent": 4.0}
SIZES = {"width": 24, "depth": 2, "num_heads": 2, "rope": Rope.seconds, "rope_theta": 20.0, "rope_fps": 24.0}


NEWER = {"cross_norm": CrossNorm.modulated, "modulated_captions": True, "head_gates": True}  # LTX-2.3


def streams(random=True, dtype=torch.float64, crossed=False, **changes):
    torch.manual_seed(0)
    model = DiT(DiTConfig(**SIZES, audio=StreamConfig(**STREAM, crossed=crossed), **changes), 5, 7).to(dtype)
    for parameter in model.parameters() if random else []:
        nn.init.normal_(parameter, std=0.3)
    return model


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    audio = Sound([draw(3, t) for t in SOUNDS], torch.tensor([0.9, 0.2], dtype=dtype), [draw(2, 7), draw(6, 7)])
    latents, text = [draw(5, *shape) for shape in SHAPES], [draw(4, 7), draw(2, 7)]
    return latents, torch.tensor([0.3, 0.8], dtype=dtype), text, Extras(audio=audio)


@pytest.mark.parametrize(
    "choices",
    [{}, {"modulation": ModulationSource.linear}, {**NEWER, "crossed": True}],
    ids=["table", "linear", "newer"],
)
def test_a_new_model_predicts_zero_for_both_and_learns_past_it(choices):
    model = streams(random=False, head_modulation=HeadModulation.table, **choices)
    latents, timesteps, text, extras = inputs()
    found = model.predict_streams(latents, timesteps, text, extras)
    assert all(out.eq(0).all() for out in (*found.video, *found.audio))
    assert [out.shape for out in found.audio] == [x.shape for x in extras.audio.latents]
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        found = model.predict_streams(latents, timesteps, text, extras)
        targets = zip((*found.video, *found.audio), (*latents, *extras.audio.latents), strict=True)
        sum((out - x).square().mean() for out, x in targets).backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, start[name])] == []


def test_new_head_gates_change_nothing():
    gated, plain = streams(random=False, head_gates=True), streams()
    gated.load_state_dict(gated.state_dict() | plain.state_dict())
    for a, b in zip(gated(*inputs()), plain(*inputs()), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("choices", [{}, {**NEWER, "crossed": True}], ids=["plain", "newer"])
def test_a_pack_of_both_equals_its_clips_one_by_one(choices):
    model, (latents, timesteps, text, extras) = streams(**choices), inputs()
    together = model.predict_streams(latents, timesteps, text, extras)
    for i in range(2):
        alone = model.predict_streams([latents[i]], timesteps[i : i + 1], [text[i]], extras.take([i]))
        torch.testing.assert_close(together.video[i], alone.video[0])
        torch.testing.assert_close(together.audio[i], alone.audio[0])


def test_streams_that_do_not_look_at_each_other_are_two_models():
    """With the gates of the exchange closed, the video's tower is the plain DiT, and sound changes nothing."""
    model, (latents, timesteps, text, extras) = streams(), inputs()
    heard = model(latents, timesteps, text, extras)
    for exchange in model.exchanges:
        for side in (exchange.hear, exchange.see):
            nn.init.zeros_(side.operation.project.weight)
            nn.init.zeros_(side.operation.project.bias)
    plain = DiT(dataclasses.replace(model.config, audio=None), 5, 7).double()
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    deaf, expected = model(latents, timesteps, text, extras), plain(latents, timesteps, text)
    for a, b, c in zip(deaf, expected, heard, strict=True):
        torch.testing.assert_close(a, b)
        assert not torch.allclose(a, c)


@pytest.mark.parametrize("choices", [{}, {**NEWER, "crossed": True}], ids=["plain", "newer"])
def test_both_streams_flops_are_counted(choices):
    model = streams(dtype=torch.float32, **choices)
    latents, timesteps, text, extras = inputs(torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(latents[:1], timesteps[:1], text[:1], extras.take([0]))
    assert counter.get_total_flops() == model.flops((4, 1, 2), 4, audio=(5, 2))


def test_time_is_the_middle_of_what_a_token_covers():
    """At 24 frames a second with 8 in a latent: one frame, then eight; the same second in either stream."""
    model = streams(rope_units=[8.0, 32.0, 32.0])
    places = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 2.0]])
    expected = torch.tensor([[0.5 / 24, 32.0, 32.0], [5 / 24, 96.0, 160.0]])
    torch.testing.assert_close(model.rotary.middles(places, 24.0), expected)
    assert model.audio.rotary.middles(torch.tensor([[12.0, 0.0, 0.0]]), 100.0)[0, 0] == pytest.approx(0.47)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope": Rope.axes, "rope_axes": [4, 4, 4]}, r"model\.audio needs model\.rope=seconds"),
        ({"rope_fps": 0.0}, r"model\.rope=seconds needs a frame rate"),
        ({"control_layers": [0], "control_channels": 2}, r"model\.audio needs model\.control_layers=\[\]"),
        ({"audio": StreamConfig(width=16, num_heads=3)}, r"model\.audio\.num_heads=3 must divide"),
        ({"audio": StreamConfig(**STREAM, text_width=-1)}, r"model\.audio\.text_width=-1 must be zero or more"),
        (
            {"audio": None, "text": TextEdge.joint, "head_gates": True},
            r"model\.head_gates=true needs model\.text=cross",
        ),
    ],
)
def test_choices_that_two_streams_exclude_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**(SIZES | {"audio": StreamConfig(**STREAM)} | changes))


def test_sound_is_demanded_by_the_model_that_was_built_for_it():
    model, (latents, timesteps, text, extras) = streams(), inputs()
    with pytest.raises(ValueError, match=r"extras\.audio is missing"):
        model(latents, timesteps, text)
    with pytest.raises(ValueError, match=r"extras\.audio has 1 entries for 2 clips"):
        model(latents, timesteps, text, extras.take([0]))

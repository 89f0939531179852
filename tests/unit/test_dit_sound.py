"""Sound in the video's softmax: packs equal single clips, silence is allowed, and what does not fit is refused."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kinema.models.dit import (
    AttentionPattern,
    DiT,
    DiTConfig,
    Extras,
    ModulationSource,
    NormKind,
    Rope,
    Sound,
    TextEdge,
    TextEmbedding,
)

CHANNELS, HEARD, TEXT = 5, 3, 7
PACKED = {
    "width": 20,
    "depth": 2,
    "num_heads": 3,
    "head_channels": 16,
    "rope": Rope.packed,
    "rope_axes": [4, 4, 4],
    "rope_still": 4,
    "rope_spans": [1.0, 4.0],
    "rope_side": 32.0,
    "text": TextEdge.shared,
    "text_embedding": TextEmbedding.encoder,
    "modulation": ModulationSource.linear,
    "norm": NormKind.rms,
    "head_norm": NormKind.rms,
    "reversed_time": True,
    "timestep_channels": 6,
    "timestep_hidden_width": 14,
    "audio_channels": HEARD,
}


def small(**changes):
    return DiTConfig(**{**PACKED, **changes})


def random_model(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    model = DiT(small(**changes), CHANNELS, TEXT).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def pack(dtype=torch.float64):
    g = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    latents = [draw(CHANNELS, *shape) for shape in [(3, 6, 4), (1, 2, 8), (3, 6, 4)]]
    sound = Sound([draw(HEARD, length, 2) for length in (4, 1, 7)], torch.tensor([0.1, 0.9, 0.4], dtype=dtype))
    return latents, torch.tensor([0.3, 0.8, 0.55], dtype=dtype), [draw(words, TEXT) for words in (3, 9, 1)], sound


@torch.no_grad()
def test_a_pack_equals_its_clips_one_by_one():
    model, (latents, timesteps, text, sound) = random_model(), pack()
    together = model.predict_streams(latents, timesteps, text, Extras(audio=sound))
    for clip in range(3):
        one = [clip]
        alone = model.predict_streams([latents[clip]], timesteps[one], [text[clip]], Extras(audio=sound.take(one)))
        torch.testing.assert_close(together.video[clip], alone.video[0])
        torch.testing.assert_close(together.audio[clip], alone.audio[0])
        assert together.audio[clip].shape == sound.latents[clip].shape


@torch.no_grad()
def test_video_and_sound_hear_of_each_other_and_of_both_timesteps():
    model, (latents, timesteps, text, sound) = random_model(), pack()
    usual = model.predict_streams(latents, timesteps, text, Extras(audio=sound))
    later = model.predict_streams(latents, timesteps, text, Extras(audio=Sound(sound.latents, sound.timesteps + 0.05)))
    other = model.predict_streams([2 * x for x in latents], timesteps, text, Extras(audio=sound))
    silent = model.predict_streams(latents, timesteps, text)
    assert silent.audio is None
    for clip in range(3):
        assert (usual.video[clip] - later.video[clip]).abs().max() > 1e-4
        assert (usual.audio[clip] - other.audio[clip]).abs().max() > 1e-4
        assert (usual.video[clip] - silent.video[clip]).abs().max() > 1e-4


def test_a_new_model_predicts_exactly_zero_for_both():
    latents, timesteps, text, sound = pack(torch.float32)
    found = DiT(small(), CHANNELS, TEXT).predict_streams(latents, timesteps, text, Extras(audio=sound))
    assert not any(x.any() for x in [*found.video, *found.audio])


@pytest.mark.parametrize("length", [0, 5])
def test_flops_equal_torchs_count(length):
    model = random_model(torch.float32)
    latents, timesteps, text, _ = pack(torch.float32)
    sound = Sound([torch.randn(HEARD, length, 2)], timesteps[:1]) if length else None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(latents[:1], timesteps[:1], text[:1], Extras(audio=sound))
    assert counter.get_total_flops() == model.flops((3, 3, 2), 3, audio=(2 * length, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": TextEdge.cross}, r"model\.rope=packed needs model\.text=shared"),
        ({"attention": AttentionPattern.factorised}, r"model\.rope=packed needs model\.attention=full"),
        ({"rope": Rope.axes, "rope_spans": [1.0]}, r"model\.audio_channels=3 needs model\.rope=packed"),
        ({"rope": Rope.axes, "audio_channels": 0}, r"model\.rope_spans=\[1\.0, 4\.0\] needs model\.rope=packed"),
        ({"rope_spans": []}, r"model\.rope_spans=\[\] must be one or more numbers above zero"),
        ({"rope_spans": [1.0, 0.0]}, r"model\.rope_spans=\[1\.0, 0\.0\]"),
        ({"rope_still": 2}, r"model\.rope_axes=\[4, 4, 4\] .*less model\.rope_still=2"),
        ({"rope_still": 3}, r"model\.rope_still=3 must be even"),
        ({"head_channels": -2}, r"model\.head_channels=-2 must be zero or more"),
        ({"rope": Rope.fractional}, r"model\.rope_still=4 and model\.head_channels=16 need heads whose channels"),
        ({"text_embedding": TextEmbedding.refiner}, r"model\.head_channels=16 does not reach them"),
        ({"modulation": ModulationSource.table}, r"model\.audio_channels=3 needs model\.modulation=linear"),
        ({"guidance": True}, r"model\.audio_channels=3 needs model\.guidance=false"),
        ({"first_frame_given": True}, r"model\.audio_channels=3 needs model\.first_frame_given=false"),
    ],
)
def test_choices_that_do_not_go_together_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_a_hidden_width_that_nothing_has_is_refused():
    lora = {"modulation": ModulationSource.lora, "timestep_norm": True, "timestep_channels": 10}
    with pytest.raises(ValueError, match=r"model\.timestep_hidden_width=6 lies between two layers"):
        DiTConfig(**lora, timestep_hidden_width=6)


def test_sound_that_does_not_fit_is_refused():
    model, (latents, timesteps, text, sound) = random_model(), pack()

    def given(**changes):
        return Extras(audio=Sound(**{**vars(sound), **changes}))

    with pytest.raises(ValueError, match=r"extras\.audio\.text is given"):
        model(latents, timesteps, text, given(text=text))
    with pytest.raises(ValueError, match=r"latents of shape \(3, 4\)"):
        model(latents, timesteps, text, given(latents=[sound.latents[0][..., 0]] * 3))
    with pytest.raises(ValueError, match=r"latents of shape \(4, 2, 2\) .*model\.audio_channels=3"):
        model(latents, timesteps, text, given(latents=[torch.zeros(4, 2, 2)] * 3))
    with pytest.raises(ValueError, match=r"extras\.audio\.timesteps must be one tensor"):
        model(latents, timesteps, text, given(timesteps=list(torch.rand(3, 1))))
    with pytest.raises(ValueError, match=r"extras\.audio has 2 entries for 3 clips"):
        model(latents, timesteps, text, Extras(audio=sound.take([0, 1])))

"""Classifier-free guidance: the formula, and the call it costs."""

import pytest
import torch

from kinema.diffusion.guidance import by_noise, check_guidance, guided
from kinema.diffusion.objective import RectifiedFlow
from kinema.diffusion.solvers import Solver, solve

NULL = torch.zeros(1, 8)


def clips() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(4, 1, 2, 3, generator=g), torch.randn(4, 2, 2, 2, generator=g)]


def text() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(5, 8, generator=g), torch.randn(2, 8, generator=g)]


class Model:
    """Answers with the clip, its timestep and the mean of its text; remembers how it was asked."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.batches: list[int] = []
        self.dtype = dtype

    def __call__(self, noisy, timesteps, text):
        assert len(noisy) == len(timesteps) == len(text)
        self.batches.append(len(noisy))
        return [(x * t + c.mean()).to(self.dtype) for x, t, c in zip(noisy, timesteps, text, strict=True)]


def test_guidance_is_the_formula_in_one_call_of_twice_the_clips():
    model, timesteps = Model(), torch.tensor([0.3, 0.8])
    actual = guided(model, text(), [NULL, NULL], 4.0)(clips(), timesteps)
    assert model.batches == [4]
    for clip, x, t, c in zip(actual, clips(), timesteps, text(), strict=True):
        null, with_text = x * t, x * t + c.mean()
        torch.testing.assert_close(clip, null + 4.0 * (with_text - null))


def test_guidance_scale_1_is_the_unguided_model_and_costs_no_more():
    model, timesteps = Model(), torch.tensor([0.3, 0.8])
    actual = guided(model, text(), [NULL, NULL], 1.0)(clips(), timesteps)
    assert model.batches == [2]
    assert all(map(torch.equal, actual, Model()(clips(), timesteps, text())))


def test_guidance_scale_0_is_the_model_without_text():
    timesteps = torch.tensor([0.3, 0.8])
    actual = guided(Model(), text(), [NULL, NULL], 0.0)(clips(), timesteps)
    torch.testing.assert_close(actual, Model()(clips(), timesteps, [NULL, NULL]))


def test_bfloat16_predictions_are_combined_in_float32():
    actual = guided(Model(torch.bfloat16), text(), [NULL, NULL], 7.5)(clips(), torch.tensor([0.3, 0.8]))
    assert {x.dtype for x in actual} == {torch.float32}


def test_guided_sampling_equals_sampling_the_guided_velocity():
    objective, noise = RectifiedFlow(timestep_shift=2.0), clips()

    def by_hand(noisy, timesteps):
        a = Model()(noisy, timesteps, text())
        b = Model()(noisy, timesteps, [NULL, NULL])
        return [3.0 * x - 2.0 * y for x, y in zip(a, b, strict=True)]

    actual = solve(guided(Model(), text(), [NULL, NULL], 3.0), noise, objective, Solver.heun, 4)
    torch.testing.assert_close(actual, solve(by_hand, noise, objective, Solver.heun, 4))


def test_guidance_over_a_condition_that_was_never_dropped_is_refused():
    with pytest.raises(ValueError, match=r"guidance_scale=4\.0 .* guidance_scale=1"):
        check_guidance(4.0, text_dropout=0.0)
    with pytest.raises(ValueError, match="guidance_scale=-1"):
        check_guidance(-1, text_dropout=0.1)
    check_guidance(1.0, text_dropout=0.0)
    check_guidance(4.0, text_dropout=0.1)


def test_each_clip_is_led_by_the_scale_of_its_own_timestep():
    timesteps = torch.tensor([0.9, 0.8])
    both = guided(Model(), text(), [NULL, NULL], by_noise(4.0, 3.0, 0.9))(clips(), timesteps)
    for i, scale in enumerate((4.0, 3.0)):  # the boundary itself is high, in float32 as the experts have it
        alone = guided(Model(), text()[i : i + 1], [NULL], scale)(clips()[i : i + 1], timesteps[i : i + 1])
        assert torch.equal(both[i], alone[0])
    model = Model()
    guided(model, text(), [NULL, NULL], by_noise(1.0, 1.0, 0.9))(clips(), timesteps)
    guided(model, text(), [NULL, NULL], by_noise(1.0, 3.0, 0.9))(clips(), timesteps)
    assert model.batches == [2, 4]

"""Objectives: formulas, their inverses, the loss and its weighting."""

import pytest
import torch
from diffusers import DDPMScheduler

from kinema.diffusion.objective import DDPM, LossWeighting, PredictionTarget, RectifiedFlow

TARGETS = PredictionTarget
OBJECTIVES = {
    "flow-velocity": RectifiedFlow(timestep_shift=3.0),
    "flow-data": RectifiedFlow(prediction_target=TARGETS.data),
    "ddpm-noise": DDPM(),
    "ddpm-velocity": DDPM(prediction_target=TARGETS.velocity, zero_terminal_snr=True),
    "ddpm-data": DDPM(prediction_target=TARGETS.data),
}
SIZES = [(4, 3, 4, 6), (4, 1, 2, 2), (4, 2, 5, 3)]


@pytest.fixture(params=OBJECTIVES, name="objective")
def any_objective(request):
    return OBJECTIVES[request.param]


def clips(seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=g, dtype=torch.float64).to(dtype) for size in SIZES]


TIMESTEPS = torch.tensor([0.125, 0.5, 0.875], dtype=torch.float64)


def test_sign_convention():
    latents, noise = clips(0), clips(1)
    flow = RectifiedFlow()
    for i, t in enumerate(TIMESTEPS.tolist()):
        torch.testing.assert_close(flow.add_noise(latents, noise, TIMESTEPS)[i], (1 - t) * latents[i] + t * noise[i])
        torch.testing.assert_close(flow.target(latents, noise, TIMESTEPS)[i], noise[i] - latents[i])


def test_the_ends_are_data_and_noise(objective):
    latents, noise = clips(0), clips(1)
    torch.testing.assert_close(objective.add_noise(latents, noise, torch.zeros(3)), latents)
    ends = objective.add_noise(latents, noise, torch.ones(3))
    for end, e in zip(ends, noise, strict=True):
        assert torch.corrcoef(torch.stack([end.flatten(), e.flatten()]))[0, 1] > 0.999


def test_ddpm_noises_and_targets_like_diffusers():
    reference = DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    objective = DDPM(prediction_target=TARGETS.velocity)
    latents, noise = torch.randn(2, 8, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0)).unbind()
    rows = torch.tensor([0, 1, 10, 100, 300, 700, 900, 999])
    timesteps = (rows + 1) / 1000
    noisy = torch.stack(objective.add_noise(list(latents), list(noise), timesteps))
    velocity = torch.stack(objective.target(list(latents), list(noise), timesteps))
    torch.testing.assert_close(noisy, reference.add_noise(latents, noise, rows), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(velocity, reference.get_velocity(latents, noise, rows), rtol=1e-4, atol=1e-5)


def test_prediction_gives_back_data_noise_and_velocity(objective):
    latents, noise = clips(0), clips(1)
    noisy, target = (f(latents, noise, TIMESTEPS) for f in (objective.add_noise, objective.target))
    torch.testing.assert_close(objective.to_data(noisy, target, TIMESTEPS), latents)
    torch.testing.assert_close(objective.to_noise(noisy, target, TIMESTEPS), noise)
    expected = [e - x for x, e in zip(latents, noise, strict=True)]
    torch.testing.assert_close(objective.velocity(noisy, target, TIMESTEPS), expected)


def test_the_true_prediction_has_zero_loss(objective):
    latents, noise = clips(0, torch.float32), clips(1, torch.float32)
    target = objective.target(latents, noise, TIMESTEPS)
    loss = objective.loss(lambda noisy, t, text: target, latents, None, TIMESTEPS, noise)
    assert loss.tolist() == [0.0, 0.0, 0.0]


def test_the_wrong_sign_does_not():
    latents, noise = clips(0), clips(1)
    wrong = [x - e for x, e in zip(latents, noise, strict=True)]
    loss = RectifiedFlow().loss(lambda noisy, t, text: wrong, latents, None, TIMESTEPS, noise)
    assert (loss > 1).all()


def linear_model(weight: torch.Tensor):
    def model(noisy, timesteps, text):
        return [weight * x + t * c for x, t, c in zip(noisy, timesteps, text, strict=True)]

    return model


def test_the_loss_of_a_pack_is_the_loss_of_each_clip_alone_and_so_is_its_gradient(objective):
    latents, noise = clips(0, torch.float32), clips(1, torch.float32)
    text = [torch.tensor(value) for value in (0.1, -0.3, 0.7)]
    timesteps = TIMESTEPS.float()

    together = torch.tensor(0.4, requires_grad=True)
    losses = objective.loss(linear_model(together), latents, text, timesteps, noise)
    losses.sum().backward()

    alone = torch.tensor(0.4, requires_grad=True)
    parts = [
        objective.loss(linear_model(alone), [x], [c], t[None], [e])[0]
        for x, c, t, e in zip(latents, text, timesteps, noise, strict=True)
    ]
    torch.stack(parts).sum().backward()
    assert losses.shape == (3,)
    torch.testing.assert_close(losses, torch.stack(parts))
    torch.testing.assert_close(together.grad, alone.grad)

    # And against the formula written out in float64.
    p = [
        0.4 * x + t * c for x, t, c in zip(objective.add_noise(latents, noise, timesteps), timesteps, text, strict=True)
    ]
    y = objective.target(latents, noise, timesteps)
    mean_squares = [((a.double() - b.double()) ** 2).mean() for a, b in zip(p, y, strict=True)]
    torch.testing.assert_close(losses.double(), torch.stack(mean_squares), rtol=1e-5, atol=1e-6)


def test_timesteps_stay_float32_when_the_latents_are_bfloat16(objective):
    seen = []

    def model(noisy, timesteps, text):
        seen.extend([timesteps.dtype, *(x.dtype for x in noisy)])
        assert len(timesteps.unique()) == len(timesteps)
        return noisy

    # 1 - 1/1000 and 1 - 2/1000 are one number in bfloat16: the model must still tell them apart.
    timesteps = torch.tensor([0.999, 0.998, 0.5])
    loss = objective.loss(model, clips(0, torch.bfloat16), None, timesteps, clips(1, torch.bfloat16))
    assert seen == [torch.float32] + 3 * [torch.bfloat16]
    assert loss.dtype is torch.float32


def test_a_thousand_timesteps_stay_a_thousand(objective):
    t = (torch.arange(1000) + 1) / 1000
    latents = [torch.zeros(1, 1, 1, 1)] * 1000
    noise = [torch.ones(1, 1, 1, 1)] * 1000
    noisy = torch.stack(objective.add_noise(latents, noise, t)).flatten()
    assert len(noisy.unique()) > 990  # sigma of a table is close to 1 at its end
    assert (noisy.diff() >= 0).all()


WEIGHTED = {
    "flow-velocity": RectifiedFlow(loss_weighting=LossWeighting.min_snr, timestep_shift=2.0),
    "flow-data": RectifiedFlow(loss_weighting=LossWeighting.min_snr, prediction_target=TARGETS.data),
    "ddpm-noise": DDPM(loss_weighting=LossWeighting.min_snr),
    "ddpm-velocity": DDPM(loss_weighting=LossWeighting.min_snr, prediction_target=TARGETS.velocity),
    "ddpm-data": DDPM(loss_weighting=LossWeighting.min_snr, prediction_target=TARGETS.data, min_snr_gamma=1.0),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_have_mean_1_under_the_timesteps_really_drawn(name):
    objective = WEIGHTED[name]
    timesteps = objective.sample_timesteps(100_000, torch.Generator().manual_seed(0))
    weights = objective.loss_weights(timesteps)
    assert abs(weights.mean().item() - 1) < 4 * weights.std().item() / 100_000**0.5
    assert (weights >= 0).all()


def test_weights_have_mean_1_for_each_size_of_clip():
    objective = RectifiedFlow(loss_weighting=LossWeighting.min_snr, shift_base_tokens=64)
    for tokens in (64, 1024):
        sizes = [tokens] * 50_000
        timesteps = objective.sample_timesteps(50_000, torch.Generator().manual_seed(0), sizes)
        weights = objective.loss_weights(timesteps, sizes)
        assert abs(weights.mean().item() - 1) < 4 * weights.std().item() / 50_000**0.5


@pytest.mark.parametrize("name", WEIGHTED)
def test_min_snr_weighs_the_error_of_the_data_by_the_clipped_snr(name):
    """At 11 timesteps: loss in any target = c * min(SNR, gamma) * loss in the data, one c for all t."""
    objective = WEIGHTED[name]
    gamma = objective.min_snr_gamma or 5.0
    t = torch.linspace(0.02, 0.98, 11, dtype=torch.float64)
    ones = [torch.ones(1, dtype=torch.float64)] * 11
    noise = [torch.full((1,), 0.5, dtype=torch.float64)] * 11
    noisy, right = objective.add_noise(ones, noise, t), objective.target(ones, noise, t)
    wrong = [p + 0.1 for p in right]
    data_error = torch.cat(objective.to_data(noisy, wrong, t)) - 1
    snr = (objective.noise_schedule.alpha(t) / objective.noise_schedule.sigma(t)) ** 2

    weighted = objective.loss_weights(t).double() * 0.1**2
    expected = snr.clamp(max=gamma) * data_error**2
    ratio = weighted / expected
    torch.testing.assert_close(ratio, ratio[:1].expand(11), rtol=1e-5, atol=0)


def test_min_snr_scales_the_loss_and_no_weighting_leaves_it():
    latents, noise = clips(0), clips(1)
    plain, weighted = RectifiedFlow(), RectifiedFlow(loss_weighting=LossWeighting.min_snr)

    def model(noisy, timesteps, text):
        return noisy

    losses = plain.loss(model, latents, None, TIMESTEPS, noise)
    scaled = weighted.loss(model, latents, None, TIMESTEPS, noise)
    torch.testing.assert_close(scaled, losses * weighted.loss_weights(TIMESTEPS))
    assert plain.loss_weights(TIMESTEPS).tolist() == [1, 1, 1]

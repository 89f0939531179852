"""Noise schedules and timestep distributions, against diffusers' tables and closed forms."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from kinema.diffusion.objective import DDPM, PredictionTarget, RectifiedFlow
from kinema.diffusion.schedules import BetaSchedule, FlowSchedule
from kinema.diffusion.timesteps import TimestepDistribution, realised_histogram, shift_timesteps

DIFFUSERS_NAMES = {
    BetaSchedule.linear: "linear",
    BetaSchedule.scaled_linear: "scaled_linear",
    BetaSchedule.cosine: "squaredcos_cap_v2",
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", list(BetaSchedule))
def test_every_row_of_the_ddpm_table_is_that_of_diffusers(beta_schedule, zero_terminal_snr):
    reference = DDIMScheduler(
        beta_schedule=DIFFUSERS_NAMES[beta_schedule],
        beta_start=0.0001,
        beta_end=0.02,
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    target = PredictionTarget.velocity
    ours = DDPM(
        beta_schedule=beta_schedule, prediction_target=target, zero_terminal_snr=zero_terminal_snr
    ).noise_schedule

    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    torch.testing.assert_close(
        ours.alpha(t) ** 2, reference.alphas_cumprod.double(), rtol=1e-3, atol=3e-7
    )  # theirs is a float32 product of 1000 factors
    torch.testing.assert_close(ours.alpha(t) ** 2 + ours.sigma(t) ** 2, torch.ones_like(t))
    assert (ours.alpha(t[-1:]) == 0) == zero_terminal_snr


@pytest.mark.parametrize("schedule", [FlowSchedule(), DDPM().noise_schedule], ids=["flow", "ddpm"])
def test_t_0_is_clean_data_and_noise_grows_with_t(schedule):
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    assert schedule.alpha(t[0]) == 1
    assert schedule.sigma(t[0]) == 0
    assert (schedule.sigma(t).diff() > 0).all()
    assert (schedule.alpha(t).diff() < 0).all()


def test_coefficients_are_float64_whatever_the_timesteps_are():
    t = torch.tensor([0.25, 0.5])
    for schedule in (FlowSchedule(), DDPM().noise_schedule):
        assert {part.dtype for part in schedule.level(t)} == {torch.float64}


def test_shift_lowers_the_log_snr_by_twice_its_logarithm():
    # Esser et al. 2024, section 5.3.2: lambda_m = lambda_n - log(m / n), with shift = sqrt(m / n).
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    shifted = shift_timesteps(t, 3.0)
    log_snr = 2 * torch.log((1 - t) / t)
    log_snr_shifted = 2 * torch.log((1 - shifted) / shifted)
    torch.testing.assert_close(log_snr_shifted, log_snr - 2 * math.log(3.0))


def test_shifts_multiply_and_the_ends_stay():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    twice = shift_timesteps(shift_timesteps(t, 2.0), 3.0)
    torch.testing.assert_close(twice, shift_timesteps(t, 6.0))
    torch.testing.assert_close(shift_timesteps(shift_timesteps(t, 5.0), 0.2), t)
    for shift in (0.3, 1.0, 7.0):
        ends = shift_timesteps(t[[0, -1]], shift)
        assert ends.tolist() == [0.0, 1.0]


def kolmogorov_smirnov(samples: torch.Tensor, cdf: torch.Tensor) -> float:
    """Largest distance between the samples' distribution and the declared one at the sorted samples."""
    n = len(samples)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return max((cdf - steps[:-1]).abs().max().item(), (cdf - steps[1:]).abs().max().item())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("mean", "std"), [(None, None), (0.0, 1.0), (-0.5, 0.7), (0.8, 1.4)])
def test_realised_timesteps_have_the_declared_logit_normal_distribution(mean, std, shift):
    flow = RectifiedFlow(timestep_mean=mean, timestep_std=std, timestep_shift=shift)
    samples = flow.sample_timesteps(20_000, generator()).double().sort().values
    # Closed form, independent of the code's quantiles: logit(t) is Normal(mean + log(shift), std).
    z = (torch.logit(samples) - (mean or 0.0) - math.log(shift)) / (std or 1.0)
    cdf = 0.5 * (1 + torch.erf(z / 2**0.5))
    assert kolmogorov_smirnov(samples, cdf) < 1.63 / 20_000**0.5  # the 1 % level


@pytest.mark.parametrize("shift", [1.0, 0.5, 3.0])
def test_realised_timesteps_have_the_declared_uniform_distribution(shift):
    flow = RectifiedFlow(timestep_distribution=TimestepDistribution.uniform, timestep_shift=shift)
    samples = flow.sample_timesteps(20_000, generator()).double().sort().values
    cdf = samples / (shift - (shift - 1) * samples)
    assert kolmogorov_smirnov(samples, cdf) < 1.63 / 20_000**0.5


def test_ddpm_draws_every_row_of_its_table_equally_often_and_nothing_else():
    samples = DDPM(num_train_timesteps=50).sample_timesteps(50_000, generator())
    rows, counts = (samples.double() * 50).unique(return_counts=True)
    torch.testing.assert_close(rows, torch.arange(1, 51, dtype=torch.float64), rtol=0, atol=1e-4)
    chi_square = ((counts - 1000.0) ** 2 / 1000.0).sum()
    assert chi_square < 49 + 4 * (2 * 49) ** 0.5


def test_eight_clips_have_eight_timesteps():
    for objective in (RectifiedFlow(), DDPM()):
        timesteps = objective.sample_timesteps(8, generator(3))
        assert timesteps.shape == (8,)
        assert len(timesteps.unique()) == 8
        assert timesteps.dtype is torch.float32
        assert ((timesteps > 0) & (timesteps <= 1)).all()


def test_the_shift_follows_the_size_of_the_clip():
    flow = RectifiedFlow(timestep_shift=2.0, shift_base_tokens=256)
    assert flow.shift_for(256) == 2.0
    assert flow.shift_for(1024) == 4.0
    base = RectifiedFlow().sample_timesteps(2, generator()).double()
    mixed = flow.sample_timesteps(2, generator(), num_tokens=[256, 1024])
    expected = shift_timesteps(base, torch.tensor([2.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"shift_base_tokens=256 .* num_tokens"):
        flow.sample_timesteps(2, generator())
    with pytest.raises(ValueError, match="num_tokens has 1 entries for 2 clips"):
        flow.sample_timesteps(2, generator(), num_tokens=[256])


def test_training_and_sampling_share_one_shift():
    flow = RectifiedFlow(timestep_shift=3.0, timestep_distribution=TimestepDistribution.uniform)
    quantiles = torch.arange(0, 1001, dtype=torch.float64) / 1000
    grid = flow.sampling_timesteps(1000)
    assert torch.equal(grid.flip(0), flow.training_timesteps(quantiles, flow.shift_for(None)))
    # The same for clips whose shift depends on their size, and only an explicit shift breaks the tie.
    sized = RectifiedFlow(timestep_shift=3.0, shift_base_tokens=100)
    assert torch.equal(sized.sampling_timesteps(8, num_tokens=400), flow.sampling_timesteps(8, shift=6.0))
    assert not torch.equal(flow.sampling_timesteps(8, shift=1.0), flow.sampling_timesteps(8))


def test_the_sampling_grid_of_n_train_steps_is_the_training_grid():
    ddpm = DDPM(num_train_timesteps=1000)
    rows = ddpm.sample_timesteps(100_000, generator()).unique().double()
    torch.testing.assert_close(ddpm.sampling_timesteps(1000)[:-1].flip(0), rows, rtol=0, atol=1e-7)


def test_asking_for_the_sampling_grid_twice_changes_nothing():
    flow = RectifiedFlow(timestep_shift=5.0)
    first = flow.sampling_timesteps(30)
    flow.sampling_timesteps(7, shift=2.0)
    assert torch.equal(first, flow.sampling_timesteps(30))
    assert first[0] == 1
    assert first[-1] == 0
    assert (first.diff() < 0).all()


def test_histogram_shows_the_draws_and_the_grid():
    flow, grid = RectifiedFlow(timestep_shift=3.0, shift_base_tokens=64), torch.linspace(1, 0, 11)
    picture = realised_histogram(flow, grid, num_tokens=256, training_tokens=[64, 256], num_samples=4000)
    assert len(picture["edges"]) == 21
    assert len(picture["counts"]) == 20
    assert sum(picture["counts"]) == 4000
    assert picture["sampler"] == grid.tolist()
    assert picture["counts"] != realised_histogram(flow, grid, num_tokens=256, num_samples=4000)["counts"]
    unshifted = realised_histogram(RectifiedFlow(), grid, num_samples=4000)
    assert sum(picture["counts"][10:]) > 1.3 * sum(unshifted["counts"][10:])


def test_histogram_of_an_expert_shows_its_range_alone():
    flow, grid = RectifiedFlow(timestep_shift=5.0), torch.linspace(1, 0, 11)
    whole, high, low = (
        realised_histogram(flow, grid, timestep_range=each)["counts"] for each in ((0.0, 1.0), (0.85, 1.0), (0.0, 0.85))
    )
    assert high == [0.0] * 17 + whole[17:]
    assert low == whole[:17] + [0.0] * 3
    assert min(sum(high), sum(low)) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RectifiedFlow(timestep_shift=0.0), r"objective\.timestep_shift=0\.0"),
        (lambda: RectifiedFlow(timestep_std=0.0), r"objective\.timestep_std=0\.0"),
        (lambda: RectifiedFlow(shift_base_tokens=0), r"objective\.shift_base_tokens=0"),
        (lambda: DDPM(timestep_mean=0.5), r"objective\.timestep_mean=0\.5 .* never reads it"),
        (lambda: DDPM(min_snr_gamma=5.0), r"objective\.min_snr_gamma=5\.0 is never read"),
        (lambda: DDPM(beta_schedule=BetaSchedule.cosine, beta_end=0.1), r"objective\.beta_end=0\.1 is never"),
        (lambda: DDPM(beta_start=0.5, beta_end=0.1), "0 < start < end < 1"),
        (lambda: DDPM(num_train_timesteps=1), r"objective\.num_train_timesteps=1"),
        (lambda: DDPM(zero_terminal_snr=True), r"zero_terminal_snr=true needs .*velocity or data"),
        (lambda: RectifiedFlow(prediction_target=PredictionTarget.noise), "cannot sample a rectified flow"),
        (lambda: DDPM().sampling_timesteps(10, shift=3.0), "timestep_shift=3.0 has no meaning"),
        (lambda: DDPM().sampling_timesteps(1001), "num_steps=1001 is more than the 1000 rows"),
        (lambda: RectifiedFlow().sampling_timesteps(0), "num_steps=0"),
        (lambda: RectifiedFlow().sampling_timesteps(4, shift=-1.0), "timestep_shift=-1.0"),
    ],
)
def test_a_setting_that_makes_no_sense_or_is_never_read_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_quantiles_rise_with_probability():
    u = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    for objective in (RectifiedFlow(timestep_mean=0.3, timestep_shift=2.0), DDPM()):
        times = objective.training_timesteps(u, objective.shift_for(None))
        assert (times.diff() >= 0).all()
        assert times[-1] == 1


def test_the_shift_can_be_a_line_of_tokens_in_its_logarithm():
    flow = RectifiedFlow(timestep_shift=2.0, shift_base_tokens=100, shift_top=8.0, shift_top_tokens=300)
    assert [flow.shift_for(tokens) for tokens in (100, 200, 300, 400)] == pytest.approx([2.0, 4.0, 8.0, 16.0])
    with pytest.raises(ValueError, match="two points"):
        RectifiedFlow(shift_base_tokens=100, shift_top=8.0)


def test_the_last_step_can_begin_where_it_is_told_to():
    visited = RectifiedFlow(timestep_shift=3.0).sampling_timesteps(5, terminal=0.1)
    assert visited[[0, -2, -1]].tolist() == pytest.approx([1.0, 0.1, 0.0])
    with pytest.raises(ValueError, match="timestep_terminal"):
        RectifiedFlow().sampling_timesteps(1, terminal=0.1)


def test_a_table_can_be_shifted_in_its_signal_to_noise_ratio():
    plain, shifted = (DDPM(snr_shift=by).noise_schedule.level(torch.tensor([0.3, 0.9])) for by in (1.0, 3.0))
    ratio = (plain.alpha / plain.sigma) ** 2 / (shifted.alpha / shifted.sigma) ** 2
    torch.testing.assert_close(ratio, torch.full((2,), 3.0, dtype=torch.float64))


def test_the_network_can_be_told_rows_from_zero():
    times = torch.tensor([1.0, 0.001], dtype=torch.float64)
    assert DDPM(rows_from_zero=True).told(times).tolist() == pytest.approx([0.999, 0.0])
    assert DDPM().told(times) is times

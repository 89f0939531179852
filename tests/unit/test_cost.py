import numpy as np
import pytest

from kinema.data.steps.cost import CostConfig, fit_cost


def test_measured_times_give_their_coefficients_back():
    tokens = [256, 1024, 4096, 16384, 65536]
    fit = fit_cost(tokens, [3e-6 * n + 2e-10 * n**2 for n in tokens])
    assert fit.linear == pytest.approx(3e-6)
    assert fit.quadratic == pytest.approx(2e-10)
    noise = np.random.default_rng(0).normal(1, 0.05, (40, 5))
    times = noise * [3e-6 * n + 2e-10 * n**2 for n in tokens]
    noisy = fit_cost(tokens * 40, times.reshape(-1).tolist())
    assert noisy.linear == pytest.approx(3e-6, rel=0.03)
    assert noisy.quadratic == pytest.approx(2e-10, rel=0.03)


def test_no_coefficient_is_below_zero():
    assert fit_cost([10, 100], [1.0, 5.0]).quadratic == 0  # less than linear
    more_than_quadratic = fit_cost([10, 100], [1.0, 200.0])
    assert more_than_quadratic.linear == 0
    assert more_than_quadratic.quadratic > 0
    with pytest.raises(ValueError, match="two lengths"):
        fit_cost([10, 10], [1.0, 1.0])


def test_the_cost_of_a_clip():
    assert CostConfig(2.0, 0.5).of(10) == 70
    for wrong in ({"quadratic": 1.0}, {"linear": -1.0}, {"linear": 0.0}):
        with pytest.raises(ValueError, match=r"data\.cost\."):
            CostConfig(**wrong)

"""Rotary positions: the formula, the relative property, and the split over three axes."""

import cmath
import math

import pytest
import torch

from kinema.models.position import (
    apply_rope,
    centred,
    check_rope_axes,
    fractional_rope,
    grid_positions,
    mixed_rope,
    rope_3d,
    shared_frequencies,
    sincos_3d,
    sincos_quarters,
)

SPLITS = [(16, [4, 6, 6], 10000.0), (12, [2, 4, 6], 100.0), (8, [0, 4, 4], 50.0), (32, [12, 10, 10], 256.0)]
GRIDS = [(1, 2, 3), (5, 3, 2), (2, 7, 4), (4, 1, 9), (3, 5, 6), (7, 2, 1)]


def rope_by_complex_numbers(x, positions, axes, theta):
    """Channel pair i of an axis is a complex number, turned by position * theta^(-2i / size)."""
    out = torch.empty_like(x)
    for token in range(len(x)):
        channel = 0
        for axis, size in enumerate(axes):
            for pair in range(size // 2):
                turn = cmath.exp(1j * float(positions[token, axis]) * theta ** (-2 * pair / size))
                for head in range(x.shape[1]):
                    number = complex(x[token, head, channel], x[token, head, channel + 1]) * turn
                    out[token, head, channel] = number.real
                    out[token, head, channel + 1] = number.imag
                channel += 2
    return out


def test_positions_count_time_outermost():
    expected = [(t, h, w) for t in range(2) for h in range(3) for w in range(4)]
    assert grid_positions(2, 3, 4).tolist() == [list(map(float, row)) for row in expected]
    assert grid_positions(1, 1, 1).shape == (1, 3)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("head_dim", "axes", "theta"), SPLITS)
def test_equals_complex_numbers(grid, head_dim, axes, theta):
    torch.manual_seed(0)
    positions = grid_positions(*grid) * 1.5  # positions need not be whole
    x = torch.randn(len(positions), 2, head_dim, dtype=torch.float64)
    cos, sin = rope_3d(positions, head_dim, axes, theta, torch.float64)
    torch.testing.assert_close(apply_rope(x, cos, sin), rope_by_complex_numbers(x, positions, axes, theta))


@pytest.mark.parametrize(("head_dim", "axes", "theta"), SPLITS)
def test_scores_depend_on_differences_only(head_dim, axes, theta):
    torch.manual_seed(0)
    positions = grid_positions(3, 4, 5).double()
    q, k = (torch.randn(1, 1, head_dim, dtype=torch.float64).expand(60, 1, -1) for _ in range(2))

    def scores(offset):
        cos, sin = rope_3d(positions + torch.tensor(offset), head_dim, axes, theta, torch.float64)
        return apply_rope(q, cos, sin)[:, 0] @ apply_rope(k, cos, sin)[:, 0].T

    torch.testing.assert_close(scores([7.0, -3.0, 11.5]), scores([0.0, 0.0, 0.0]))
    # Tokens (0, 0, 0) -> (1, 1, 1) and (1, 2, 3) -> (2, 3, 4) differ by the same step.
    torch.testing.assert_close(scores([0.0] * 3)[0, 26], scores([0.0] * 3)[33, 59])
    assert (scores([0.0] * 3)[0] - scores([0.0] * 3)[1]).abs().max() > 1e-3


def test_channels_that_do_not_divide_stay_zero_and_no_two_places_are_alike():
    waves = sincos_3d(grid_positions(3, 4, 5), 23, 100.0)
    assert waves.shape == (60, 23)
    assert (waves[:, 18:] == 0).all()
    assert (waves[:, :18].abs().sum(0) > 0).all()
    assert torch.cdist(waves, waves).fill_diagonal_(1).min() > 1e-2


def test_each_axis_turns_its_own_channels():
    axes = [4, 6, 8]
    for axis, channels in enumerate([range(0, 2), range(2, 5), range(5, 9)]):
        positions = torch.zeros(1, 3)
        positions[0, axis] = 0.7
        _, sin = rope_3d(positions, 18, axes, 100.0)
        assert sin[0].nonzero().flatten().tolist() == list(channels)


def test_backward_turns_back():
    torch.manual_seed(0)
    cos, sin = rope_3d(grid_positions(2, 3, 2), 12, [4, 4, 4], 30.0, torch.float64)
    x = torch.randn(12, 2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, cos, sin), [x])


def test_half_precision_turns_in_float32():
    torch.manual_seed(0)
    cos, sin = rope_3d(grid_positions(4, 5, 6), 16, [4, 6, 6], 10000.0)
    assert cos.dtype == sin.dtype == torch.float32
    x = torch.randn(120, 2, 16).bfloat16()
    turned = apply_rope(x, cos, sin)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, apply_rope(x.float(), cos, sin).bfloat16())


def test_large_positions_keep_float32_accuracy():
    positions = torch.tensor([[9999.0, 0.0, 0.0]])
    cos, _ = rope_3d(positions, 6, [2, 2, 2], 10000.0)
    assert cos[0, 0] == torch.tensor(9999.0, dtype=torch.float64).cos().float()


@pytest.mark.parametrize("axes", [[4, 4], [6, 6, 6], [5, 5, 6], [18, -2, 0], [4, 4, 4, 4]])
def test_a_split_that_does_not_fit_is_named(axes):
    with pytest.raises(ValueError, match=r"model\.rope_axes=\[.*head width 16.*Type model\.rope_axes=\[8,4,4\]"):
        check_rope_axes(axes, 16)
    check_rope_axes([8, 4, 4], 16)


def test_quarters_are_time_then_columns_then_rows():
    place = torch.tensor([[2.0, 3.0, 5.0]])
    (waves,) = sincos_quarters(place, 32, 100.0, torch.float64).tolist()
    expected = []
    for position, size in [(2.0, 8), (5.0, 12), (3.0, 12)]:  # t, w, h
        angles = [position * 100.0 ** (-2 * pair / size) for pair in range(size // 2)]
        expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    assert waves == pytest.approx(expected)


def test_fractions_turn_each_head_at_its_own_rates():
    fractions = torch.tensor([[0.5, 0.25, 1.0]])
    width, heads, theta = 16, 2, 9.0  # two rates an axis; the first two pairs of 8 do not turn
    cos, sin = fractional_rope(fractions, width, heads, theta, torch.float64)
    rates = [math.pi / 2, math.pi / 2 * theta]
    angles = [0.0, 0.0] + [rate * (2 * place - 1) for rate in rates for place in (0.5, 0.25, 1.0)]
    assert cos.shape == sin.shape == (1, heads, width // heads // 2)
    assert sin.flatten().tolist() == pytest.approx([math.sin(angle) for angle in angles], abs=1e-6)
    assert cos.flatten().tolist() == pytest.approx([math.cos(angle) for angle in angles], abs=1e-6)


def test_a_table_for_each_head_turns_each_head():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    angles = torch.randn(3, 2, 4, dtype=torch.float64)
    turned = apply_rope(x, angles.cos(), angles.sin())
    for head in range(2):
        alone = apply_rope(x[:, head : head + 1], angles[:, head].cos(), angles[:, head].sin())
        torch.testing.assert_close(turned[:, head : head + 1], alone)


def test_a_centred_frame_has_the_area_of_the_square():
    found = centred(grid_positions(2, 2, 8), side=8.0).view(2, 2, 8, 3)  # steps of 2
    assert found[1, :, :, 0].unique().tolist() == [1.0]
    assert found[0, :, 0, 1].tolist() == [-1.0, 1.0]
    assert found[0, 0, :, 2].tolist() == [-7.0, -5.0, -3.0, -1.0, 1.0, 3.0, 5.0, 7.0]


def test_learned_frequencies_turn_each_head_by_all_axes_and_learn():
    torch.manual_seed(0)
    positions = grid_positions(2, 3, 2).double()
    x, frequencies = torch.randn(12, 2, 6).double(), torch.randn(3, 2, 3).double().requires_grad_()
    turned = apply_rope(x, *mixed_rope(positions, frequencies))
    pairs, angles = torch.view_as_complex(x.unflatten(-1, (-1, 2))), torch.einsum("na,ahf->nhf", positions, frequencies)
    expected = torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(-2)
    torch.testing.assert_close(turned, expected)
    weights = torch.randn_like(x)
    gradients = [torch.autograd.grad((each * weights).sum(), frequencies)[0] for each in (turned, expected)]
    torch.testing.assert_close(*gradients)


def test_learned_frequencies_begin_with_one_axis_for_each_pair():
    found = shared_frequencies(num_heads=2, head_dim=8, theta=10.0)
    assert found.shape == (3, 2, 4)
    assert ((found != 0).sum(0) == 1).all()
    torch.testing.assert_close(found.sum(0)[1], 10.0 ** (-torch.arange(4) / 4))

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinema.data.geometry import ClipShape, Geometry, assign_shape
from tests.unit.clips import record


def test_legal_shapes_give_the_latent_sizes_of_the_vae():
    geometry = Geometry(4, 8, (1, 2, 2))
    assert geometry.check([17, 64, 96]) == ClipShape(17, 64, 96)
    assert geometry.latent_shape(ClipShape(17, 64, 96)) == (5, 8, 12)  # H before W
    assert geometry.num_tokens(ClipShape(17, 64, 96)) == 5 * 4 * 6
    assert geometry.num_tokens(ClipShape(1, 16, 32)) == 1 * 1 * 2


@pytest.mark.parametrize("shape", [(16, 64, 64), (18, 64, 64), (17, 60, 64), (17, 64, 72)])
def test_an_illegal_shape_is_refused_with_the_nearest_legal_ones(shape):
    geometry = Geometry(4, 8, (1, 2, 2))
    with pytest.raises(ValueError, match=r"data\.shapes=") as error:
        geometry.check(shape)
    assert str(list(shape)) in str(error.value)
    for near in geometry.nearest(shape):
        assert str(list(near)) in str(error.value)


def test_4k_frames_name_both_neighbours():
    with pytest.raises(ValueError, match=r"\[17, 64, 64\], \[13, 64, 64\]"):
        Geometry(4, 8, (1, 1, 1)).check((16, 64, 64))


def test_latent_frames_must_divide_into_patches():
    geometry = Geometry(4, 8, (2, 1, 1))
    assert geometry.num_tokens((13, 8, 8)) == 2  # 4 latent frames
    with pytest.raises(ValueError, match="one of 5, 13, 21"):
        geometry.check((17, 8, 8))


@pytest.mark.parametrize("shape", [(17, 64), (0, 64, 64), (17, -8, 64)])
def test_shapes_that_are_none_are_refused(shape):
    with pytest.raises(ValueError, match="each at least 1"):
        Geometry(4, 8, (1, 1, 1)).check(shape, key="vae.shape")


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 16),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 200), st.integers(1, 600), st.integers(1, 600)),
)
def test_the_nearest_shapes_are_legal_and_a_legal_shape_is_its_own(temporal, spatial, patch, wanted):
    geometry = Geometry(temporal, spatial, patch)
    nearest = geometry.nearest(wanted)
    for shape in nearest:
        assert geometry.check(shape) == shape
        assert geometry.nearest(shape) == [shape]
    # And no legal number of frames is nearer, as a ratio, than that of the first.
    t = wanted[0]
    brute = min(
        abs(math.log(f / t))
        for f in range(1, 3 * t + 3 * temporal * patch[0])
        if geometry._is_legal(ClipShape(f, *nearest[0][1:]))
    )
    assert brute == pytest.approx(abs(math.log(nearest[0].frames / t)))


def sized(width, height, seconds):
    return record("clip", b"", width=width, height=height, duration_seconds=seconds)


def test_a_clip_takes_the_nearest_aspect_then_the_longest_it_fills():
    wide, high, square = ClipShape(17, 64, 128), ClipShape(17, 128, 64), ClipShape(17, 64, 64)
    shapes = [wide, high, square, ClipShape(33, 64, 128), ClipShape(9, 64, 128)]
    assert assign_shape(sized(1280, 720, 2.2), shapes, 8) == wide
    assert assign_shape(sized(720, 1280, 9.0), shapes, 8) == high  # portrait stays portrait
    assert assign_shape(sized(1280, 720, 33 / 8), shapes, 8) == ClipShape(33, 64, 128)
    assert assign_shape(sized(1280, 720, 1.2), shapes, 8) == ClipShape(9, 64, 128)
    assert assign_shape(sized(1280, 720, 1.0), shapes, 8) is None
    assert assign_shape(sized(500, 500, 2.0), shapes, 8) is None  # 17 frames at 8 fps take 2.125 s


def test_equal_shapes_of_two_sizes_go_to_the_largest_without_enlarging():
    shapes = [ClipShape(9, side, side) for side in (32, 64, 128)]
    assert assign_shape(sized(100, 100, 2), shapes, 8) == ClipShape(9, 64, 64)
    assert assign_shape(sized(16, 16, 2), shapes, 8) == ClipShape(9, 32, 32)

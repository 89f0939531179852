import pytest
import torch

from kinema.data.pixels import to_model_range, to_uint8


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).reshape(2, 8, 16, 1).expand(2, 8, 16, 3)
    video = to_model_range(levels)
    assert (video.min(), video.max()) == (-1, 1)
    assert torch.equal(to_uint8(video), levels)


def test_axes_keep_their_meaning_and_values_follow_the_closed_form():
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (5, 7, 11, 3), dtype=torch.uint8)  # T, H, W, C all distinct
    video = to_model_range(frames)
    assert video.shape == (3, 5, 7, 11)
    expected = frames[4, 6, 10, 2].double() / 127.5 - 1
    torch.testing.assert_close(video[2, 4, 6, 10].double(), expected, atol=1e-7, rtol=0)


def test_values_outside_are_clamped_and_levels_are_rounded_to_the_nearest():
    video = torch.tensor([-3.0, -1.0, 0.0, 0.4 / 127.5, 0.6 / 127.5, 1.0, 9.0])  # 0.0 is level 127.5
    levels = to_uint8(video.view(1, 7, 1, 1).expand(3, 7, 1, 1))[:, 0, 0, 0]
    assert levels.tolist() == [0, 0, 128, 128, 128, 255, 255]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(4, 8, 8, 3), "dtype=torch.float32"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "must be \\(T, H, W, 3\\)"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), "image\\[None\\]"),
    ],
)
def test_other_frames_are_refused(frames, message):
    with pytest.raises(ValueError, match=message):
        to_model_range(frames)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(3, 4, 8, 8, dtype=torch.uint8), "float type"),
        (torch.zeros(4, 3, 8, 8), "channels first"),
        (torch.full((3, 1, 2, 2), float("nan")), "NaN"),
    ],
)
def test_other_videos_are_refused(video, message):
    with pytest.raises(ValueError, match=message):
        to_uint8(video)

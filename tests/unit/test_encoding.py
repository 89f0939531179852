import io

import av
import numpy as np
import pytest
import torch

from kinema.data.decode.encoding import encode_video, read_metadata, write_video

CORNERS = {
    "top left": (230, 30, 30),
    "top right": (30, 200, 30),
    "bottom left": (40, 60, 240),
    "bottom right": (240, 230, 40),
}


def decode(mp4):
    """Frames (T, H, W, 3) and their times in seconds."""
    with av.open(io.BytesIO(mp4)) as container:
        frames = list(container.decode(video=0))
    return np.stack([f.to_ndarray(format="rgb24") for f in frames]), np.array([f.time for f in frames])


def corner_frames():
    frames = np.full((6, 32, 80, 3), 20, np.uint8)  # higher than wide would go unnoticed if sides were swapped twice
    for name, colour in CORNERS.items():
        rows = slice(0, 12) if "top" in name else slice(-12, None)
        columns = slice(0, 12) if "left" in name else slice(-12, None)
        frames[:, rows, columns] = colour
    return frames


def moving_dot(fps, pixels_per_second=24.0, seconds=2.0):
    """A disc of radius 6 whose centre is at x = 10 + 24 t."""
    times = np.arange(round(seconds * fps)) / fps
    y, x = np.mgrid[0:32, 0:80] + 0.5
    inside = np.hypot(x - (10 + pixels_per_second * times)[:, None, None], y - 16) < 6
    return np.where(inside[..., None], 230, 20).astype(np.uint8).repeat(3, -1)


def test_corners_stay_where_they_are():
    decoded, _ = decode(encode_video(corner_frames(), 8))
    assert decoded.shape == (6, 32, 80, 3)
    for name, colour in CORNERS.items():
        y = 4 if "top" in name else -5
        x = 4 if "left" in name else -5
        np.testing.assert_allclose(decoded[3, y, x], colour, atol=8, err_msg=name)


def test_colours_agree_with_another_reader():
    decord = pytest.importorskip("decord")
    reader = decord.VideoReader(io.BytesIO(encode_video(corner_frames(), 8)))
    frame = reader[3].asnumpy()
    for name, colour in CORNERS.items():
        y = 4 if "top" in name else -5
        x = 4 if "left" in name else -5
        np.testing.assert_allclose(frame[y, x], colour, atol=8, err_msg=name)


@pytest.mark.parametrize("fps", [8, 12, 24000 / 1001, 29.97, 30, 7.5])
def test_a_dot_keeps_its_speed_at_any_frame_rate(fps):
    decoded, times = decode(encode_video(moving_dot(fps), fps))
    assert len(times) == round(2 * fps)
    np.testing.assert_allclose(times, np.arange(len(times)) / fps, atol=2e-4)
    weight = (decoded[..., 0] > 125).astype(float)
    centres = (weight * (np.arange(80) + 0.5)).sum((1, 2)) / weight.sum((1, 2))
    speed = np.polyfit(times, centres, 1)[0]
    assert speed == pytest.approx(24.0, rel=0.01)


def test_equal_input_gives_equal_bytes_with_sound_and_metadata():
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (9, 32, 48, 3), dtype=torch.uint8)
    sound = np.sin(np.arange(16_000) / 7).astype(np.float32)
    first = encode_video(frames, 12, audio=sound, metadata={"prompt": "a"})
    assert encode_video(frames.numpy(), 12, audio=sound, metadata={"prompt": "a"}) == first
    assert encode_video(frames.numpy(), 12, audio=sound, metadata={"prompt": "b"}) != first


def test_metadata_is_in_the_file(tmp_path):
    given = {
        "prompt": "ein großer roter Kreis; 'so' = \"da\"",
        "seed": "17",
        "kinema_manifest": '{"a": [1, 2]}',
    }
    write_video(tmp_path / "clip.mp4", moving_dot(8), 8, metadata=given)
    assert given.items() <= read_metadata(tmp_path / "clip.mp4").items()


def test_a_sound_starts_when_it_should():
    sound = np.zeros(32_000, np.float32)
    n = np.arange(4000)
    sound[20_000:24_000] = 0.6 * np.sin(n * 0.3) * np.exp(-n / 900)
    with av.open(io.BytesIO(encode_video(moving_dot(8), 8, audio=sound))) as container:
        decoded = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    assert np.argmax(np.abs(decoded) > 0.1) / 16_000 == pytest.approx(1.25, abs=0.002)


def test_groups_of_pictures_are_short_and_in_display_order():
    with av.open(io.BytesIO(encode_video(moving_dot(12), 12))) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    keys = [i for i, p in enumerate(packets) if p.is_keyframe]
    assert keys == [0, 12]
    assert all(p.pts == p.dts for p in packets)


def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, moving_dot(8), 8)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="could not convert"):
        write_video(path, moving_dot(8), 8, audio=np.array(["x"]))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((2, 31, 32, 3), np.uint8), 8, "Crop to 30 x 32"),
        (np.zeros((2, 32, 32, 3), np.float32), 8, "to_uint8"),
        (np.zeros((2, 3, 32, 32), np.uint8), 8, r"\(2, 3, 32, 32\)"),
        (np.zeros((0, 32, 32, 3), np.uint8), 8, "T >= 1"),
        (np.zeros((2, 32, 32, 3), np.uint8), 0, "fps=0"),
    ],
)
def test_what_cannot_be_encoded_is_refused(frames, fps, message):
    with pytest.raises(ValueError, match=message):
        encode_video(frames, fps)

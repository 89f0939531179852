import numpy as np
import pytest

from kinema.data.decode.cuts import split_shots, suspected_cuts


def shot(colour, num_frames, seed=0, speed=1.0):
    """A textured background with a bright disc that moves across; noise as from a codec."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:48, 0:80]
    texture = 18 * np.sin(x / (4 + seed)) * np.cos(y / 5)
    frames = np.array(colour, float) + texture[None, :, :, None] + rng.normal(0, 3, (num_frames, 48, 80, 3))
    for t in range(num_frames):
        frames[t][np.hypot(x - (10 + speed * t) % 80, y - 24) < 9] = (240, 230, 210)
    return np.clip(frames, 0, 255).astype(np.uint8)


def test_cuts_are_found_at_their_first_frame():
    frames = np.concatenate([shot((60, 120, 60), 14), shot((150, 170, 220), 9, 1), shot((70, 50, 40), 12, 2)])
    assert suspected_cuts(frames) == [14, 23]
    assert split_shots(frames) == [(0, 14), (14, 23), (23, 35)]
    assert split_shots(frames, min_frames=10) == [(0, 14), (23, 35)]


def test_motion_pans_and_fades_are_no_cuts():
    assert suspected_cuts(shot((60, 120, 60), 30, speed=6.0)) == []
    scenery = np.random.default_rng(0).integers(0, 255, (6, 40, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    pan = np.stack([scenery[:, 5 * t : 5 * t + 80] for t in range(30)])
    assert suspected_cuts(pan) == []
    fade = (shot((200, 200, 210), 40) * np.linspace(1, 0, 40)[:, None, None, None]).astype(np.uint8)
    assert suspected_cuts(fade) == []


def test_the_first_and_the_last_frame_can_be_cut_off():
    frames = np.concatenate([shot((60, 120, 60), 1), shot((200, 170, 220), 9, 1), shot((60, 120, 60), 1)])
    assert suspected_cuts(frames) == [1, 10]
    assert suspected_cuts(frames[:1]) == []


def test_another_layout_is_refused():
    with pytest.raises(ValueError, match="T, H, W, 3"):
        suspected_cuts(np.zeros((3, 4, 8, 8), np.uint8))

"""Scores of clips against clips whose motion, blur, text and bars are known, because they were made so."""

import io
import itertools

import av
import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from data_prep.scores.borders import Borders, border_share, find_borders
from data_prep.scores.duplicates import LARGEST_LIMIT, find_duplicates, near_pairs, signature
from data_prep.scores.measure import SCORERS, UNITS, Plugin, measure
from data_prep.scores.motion import motion, still_share
from data_prep.scores.picture import exposure, sharpness
from data_prep.scores.sample import Sample, frames_to_sample
from data_prep.scores.text import text_share
from kinema.data.decode.encoding import encode_video
from tests.unit.made_clips import FPS, FRAMES, HEIGHT, WIDTH, panned, scenery, still


def moving_square(pixels_per_second, side=40):
    """A patterned square that crosses a still picture."""
    background, square = scenery(1), scenery(2, side, side)
    frames = np.repeat(background[None], FRAMES, axis=0)
    for number, frame in enumerate(frames):
        left = 4 + round(number / FPS * pixels_per_second)
        frame[40 : 40 + side, left : left + side] = square
    return frames


def sample(frames, fps=FPS):
    numbers = np.array(frames_to_sample(len(frames), fps))
    return Sample(frames[numbers], numbers / fps)


def write_on(frames, text, size, place, fill=(255, 255, 255)):
    font, pictures = ImageFont.load_default(size), []
    for frame in frames:
        picture = Image.fromarray(frame)
        outline = tuple(255 - part for part in fill)
        ImageDraw.Draw(picture).text(place, text, fill=fill, font=font, stroke_width=1, stroke_fill=outline)
        pictures.append(np.asarray(picture))
    return np.stack(pictures)


# --- The sample --------------------------------------------------------------------------------------------


def test_a_sample_is_pairs_of_near_frames_spread_over_the_clip():
    numbers = frames_to_sample(240, 24)
    assert len(numbers) == 16
    assert set(np.diff(numbers)[::2]) == {2}  # 1/12 s
    assert abs(numbers[0] + numbers[-1] - 239) <= 1  # as far from the end as from the start
    assert len(sample(still(scenery())).pairs) >= 8


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_short_clips_give_the_frames_they_have(count):
    numbers = frames_to_sample(count, 24)
    assert numbers == sorted(set(numbers))
    assert 0 <= numbers[0] <= numbers[-1] < count
    assert len(numbers) >= min(count, 2)


def test_frames_far_apart_in_time_are_no_pair():
    assert Sample(still(scenery())[:3], np.array([0.0, 0.1, 1.1])).pairs == [(0, 1)]


@pytest.mark.parametrize(
    ("frames", "seconds", "why"),
    [(np.zeros((2, 4, 4), np.uint8), [0, 1], "uint8"), (np.zeros((2, 4, 4, 3), np.uint8), [1, 1], "must rise")],
)
def test_a_wrong_sample_is_refused(frames, seconds, why):
    with pytest.raises(ValueError, match=why):
        Sample(frames, np.array(seconds, float))


# --- Motion ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", [15, 60, 100])
def test_motion_of_a_pan_is_its_speed_in_heights_a_second(speed):
    assert motion(sample(panned(speed))) == pytest.approx(speed / HEIGHT, rel=0.1)


def test_motion_does_not_depend_on_size_or_frame_rate():
    frames = panned(60)
    large = np.stack([cv2.resize(frame, (2 * WIDTH, 2 * HEIGHT)) for frame in frames])
    wanted = motion(sample(frames))
    assert motion(sample(large)) == pytest.approx(wanted, rel=0.1)
    assert motion(sample(frames[::2], FPS / 2)) == pytest.approx(wanted, rel=0.1)


def test_motion_of_a_square_is_its_speed_times_its_share_of_the_picture():
    wanted = 40 / HEIGHT * (40 * 40) / (HEIGHT * WIDTH)
    assert motion(sample(moving_square(40))) == pytest.approx(wanted, rel=0.3)  # flow blurs its outline


def test_a_still_picture_with_coding_noise_has_no_motion():
    noise = np.random.default_rng(0).integers(-1, 2, (FRAMES, HEIGHT, WIDTH, 3))
    noisy = sample((still(scenery()) + noise).clip(0, 255).astype(np.uint8))
    assert motion(noisy) < 0.005
    assert still_share(noisy) == 1
    assert still_share(sample(panned(15))) == 0


def test_one_small_thing_that_moves_is_not_still():
    frames = still(scenery())
    for number in range(FRAMES):
        frames[number, 50:58, number * 3 : number * 3 + 8] = 255
    assert still_share(sample(frames)) == 0


def test_a_stream_that_freezes_half_way_is_half_still():
    frames = panned(60)
    frames[FRAMES // 2 :] = frames[FRAMES // 2]
    assert still_share(sample(frames)) == pytest.approx(0.5, abs=0.1)


def test_a_single_picture_has_no_motion_value():
    picture = Sample(scenery()[None], np.array([0.0]))
    assert motion(picture) is None
    assert still_share(picture) is None
    assert measure(picture, SCORERS)["sharpness"] > 0


# --- Sharpness and exposure --------------------------------------------------------------------------------


def test_sharpness_falls_with_every_blur():
    values = [sharpness(sample(still(scenery(3, 256, 320, 0.8))))]
    for sigma in (1, 2, 4):  # beyond, the rounding to 8 bits is all there is
        blurred = cv2.GaussianBlur(scenery(3, 256, 320, 0.8), (0, 0), sigma)
        values.append(sharpness(sample(still(blurred))))
    assert all(before > 2 * after for before, after in itertools.pairwise(values))


def test_sharpness_is_opencvs_formula():
    """256 pixels high, so nothing is scaled: 4-neighbour Laplacian by numpy, inner pixels."""
    picture = scenery(4, 256, 256, 0.8)
    luma = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(float)
    padded = np.pad(luma, 1, mode="reflect")
    laplacian = padded[2:, 1:-1] + padded[:-2, 1:-1] + padded[1:-1, 2:] + padded[1:-1, :-2] - 4 * luma
    assert sharpness(sample(still(picture))) == pytest.approx(laplacian.var(), rel=1e-6)


def test_exposure_counts_clipped_pixels():
    picture = np.full((100, 100, 3), 128, np.uint8)
    picture[:20], picture[20:50] = 0, 255
    found = exposure(sample(still(picture)))
    assert found["dark_share"] == pytest.approx(0.2)
    assert found["bright_share"] == pytest.approx(0.3)
    assert found["brightness"] == pytest.approx((0.3 * 255 + 0.5 * 128) / 255)


# --- Text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [(255, 255, 255), (255, 230, 0), (0, 0, 0)])
@pytest.mark.parametrize("size", [12, 20, 36])
def test_text_that_stays_over_moving_pictures_is_found_by_its_area(size, fill):
    frames = np.stack([cv2.resize(frame, (340, 256)) for frame in panned(60)[:24]])
    text, place = "Subscribe to 24/7 NEWS"[: 330 // size * 2], (10, 190)
    box = ImageFont.load_default(size).getbbox(text)
    area = (min(box[2], 330) - box[0]) * (box[3] - box[1]) / (256 * 340)
    assert text_share(sample(frames)) < 0.002
    assert text_share(sample(write_on(frames, text, size, place, fill))) == pytest.approx(area, rel=0.4)


def test_text_that_moves_with_the_picture_is_no_overlay():
    wide = write_on(scenery(5, 256, 900)[None], "BAKERY  AND  SHOP", 20, (400, 100))[0]
    frames = np.stack([wide[:, 8 * number : 8 * number + 340] for number in range(FRAMES)])
    assert text_share(sample(frames)) < 0.002


# --- Borders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bars", [(0, 0, 0, 0), (14, 14, 0, 0), (0, 0, 20, 20), (10, 12, 8, 6), (15, 0, 0, 0)])
def test_black_bars_are_measured_to_the_pixel(bars):
    top, bottom, left, right = bars
    frames = np.pad(panned(60), ((0, 0), (top, bottom), (left, right), (0, 0)))
    noise = np.random.default_rng(0).integers(0, 12, frames.shape).astype(np.uint8)
    framed = sample(np.maximum(frames, noise))
    assert find_borders(framed) == Borders(*bars)
    inside, whole = HEIGHT * WIDTH, frames.shape[1] * frames.shape[2]
    assert border_share(framed) == pytest.approx(1 - inside / whole)


def test_a_dark_clip_and_a_night_sky_have_no_bars():
    dark = still(scenery() // 12)
    assert not find_borders(sample(dark)).any
    sky = panned(60)
    sky[:, :30] = 0
    sky[:, 30:, :] *= (np.arange(WIDTH) % 16 < 2)[None, None, :, None]  # a few towers under it
    sky[:, 60:] = panned(60)[:, 60:]
    assert find_borders(sample(sky)).top == 0


def test_scores_are_those_of_the_picture_inside_the_bars():
    frames = panned(60)
    framed = np.pad(frames, ((0, 0), (16, 16), (0, 0), (0, 0)))
    plain, barred = measure(sample(frames), SCORERS), measure(sample(framed), SCORERS)
    assert barred.pop("border_share") == pytest.approx(32 / (HEIGHT + 32), rel=1e-5)
    assert plain.pop("border_share") == 0
    assert barred == plain
    assert set(barred) | {"border_share"} == set(UNITS)


# --- Scorers from outside ----------------------------------------------------------------------------------


class RedScorer:
    """How red a clip is, by a tiny torch module: what a plug-in looks like."""

    def __init__(self, weight=1.0):
        import torch

        self.module = torch.nn.Linear(3, 1, bias=False)
        self.module.weight.data = torch.tensor([[weight, 0.0, 0.0]])

    def __call__(self, clip):
        import torch

        return {"red": self.module(torch.from_numpy(clip.frames.mean(axis=(0, 1, 2))).float()).item()}


def test_a_torch_module_scores_by_its_name_in_the_config():
    plugin = Plugin("tests.unit.test_scores:RedScorer", {"weight": 2.0})
    frames = still(np.full((64, 64, 3), (100, 0, 0), np.uint8))
    assert measure(sample(frames), {"red": plugin.load("red")}) == {"red": 200.0}


@pytest.mark.parametrize(
    ("target", "settings", "why"),
    [
        ("no_module_here", {}, "must be package.module:name"),
        ("no_module_here:f", {}, "cannot be loaded"),
        ("tests.unit.test_scores:missing", {}, "cannot be loaded"),
        ("tests.unit.test_scores:RedScorer", {"wrong": 1}, "cannot be loaded"),
        ("tests.unit.test_scores:still", {"picture": np.zeros((2, 2))}, "must return a function"),
    ],
)
def test_a_plugin_that_cannot_work_is_refused_by_its_key(target, settings, why):
    with pytest.raises(ValueError, match=rf"scorers\.mine\.target={target}.*{why}"):
        Plugin(target, settings).load("mine")


def test_a_score_must_be_a_number_and_come_once():
    clip = sample(still(scenery()))
    with pytest.raises(ValueError, match="odd=nan"):
        measure(clip, {"odd": lambda _: float("nan")})
    with pytest.raises(ValueError, match="given before"):
        measure(clip, {"a": lambda _: 1.0, "b": lambda _: {"a": 2.0}})


# --- Duplicates --------------------------------------------------------------------------------------------


def copies(frames):
    """The same clip as others would have saved it."""
    with av.open(io.BytesIO(encode_video(frames, FPS, crf=36))) as container:
        again = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    yield "encoded again", np.stack(again)
    yield "half the size", np.stack([cv2.resize(f, (WIDTH // 2, HEIGHT // 2), interpolation=3) for f in frames])
    yield "cropped by 3 %", frames[:, 2:-2, 2:-2]
    yield "brighter", (frames * 1.15 + 8).clip(0, 255).astype(np.uint8)


def brute_force_pairs(signatures, limit):
    distances = np.bitwise_count(signatures[:, None] ^ signatures[None]).sum(axis=2)
    pairs = itertools.combinations(range(len(signatures)), 2)
    return [(i, j, int(distances[i, j])) for i, j in pairs if distances[i, j] <= limit]


def random_signatures(count, near, seed=0):
    """Random signatures, some of them copies of others with a few bits turned."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (count, 256), dtype=np.uint8)
    for number in range(near):
        of = rng.integers(near, count)
        bits[number] = bits[of]
        bits[number, rng.choice(256, rng.integers(0, 70), replace=False)] ^= 1
    return np.packbits(bits, axis=1).view(np.uint64)


@pytest.mark.parametrize("limit", [0, 15, 24, 47])
def test_banding_misses_no_pair(limit):
    signatures = random_signatures(600, 200)
    assert near_pairs(signatures, limit) == brute_force_pairs(signatures, limit)
    assert limit == 0 or near_pairs(signatures, limit)


def test_banding_compares_far_fewer_than_all_pairs(monkeypatch):
    import data_prep.scores.duplicates as module

    compared = 0
    whole = module._candidates

    def counted(*arguments):
        nonlocal compared
        for first, second in whole(*arguments):
            compared += len(first)
            yield first, second

    monkeypatch.setattr(module, "_candidates", counted)
    near_pairs(random_signatures(20_000, 100), 24)
    assert compared < 20_000 * 19_999 / 2 / 100


def test_copies_are_found_and_other_clips_are_not():
    clips, names = [], []
    for seed in range(4):
        frames = panned(40, seed)
        for name, copy in [("original", frames), *copies(frames)]:
            clips.append(copy)
            names.append((seed, name))
    signatures = np.stack([signature(sample(clip)) for clip in clips])
    found = find_duplicates(signatures, 24, preference=[(-clip[0].size, n) for n, clip in enumerate(clips)])
    assert {names[one.number] for one in found} == {name for name in names if name[1] != "original"}
    assert all(names[one.of] == (names[one.number][0], "original") for one in found)


def test_which_copy_stays_does_not_depend_on_the_order():
    signatures = random_signatures(200, 100, seed=1)
    keys = [f"clip-{number:03d}" for number in range(200)]
    wanted = {(keys[one.number], keys[one.of]) for one in find_duplicates(signatures, 24, keys)}
    shuffled = np.random.default_rng(2).permutation(200)
    found = find_duplicates(signatures[shuffled], 24, [keys[number] for number in shuffled])
    assert {(keys[shuffled[one.number]], keys[shuffled[one.of]]) for one in found} == wanted
    assert wanted


def test_a_chain_of_small_steps_joins_only_its_links():
    """b is near a and c, but a and c are far apart: c stays although b goes."""
    bits = np.zeros((3, 256), np.uint8)
    bits[1, :20], bits[2, :40] = 1, 1
    found = find_duplicates(np.packbits(bits, axis=1).view(np.uint64), 24, ["a", "b", "c"])
    assert [(one.number, one.of, one.distance) for one in found] == [(1, 0, 20)]


def test_many_equal_clips_leave_one():
    signatures = np.zeros((5000, 4), np.uint64)
    found = find_duplicates(signatures, 24, [(number != 7, number) for number in range(5000)])
    assert len(found) == 4999
    assert {one.of for one in found} == {7}


def test_a_limit_that_would_join_strangers_is_refused():
    with pytest.raises(ValueError, match="limit=64"):
        near_pairs(np.zeros((2, 4), np.uint64), LARGEST_LIMIT + 1)

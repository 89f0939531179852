import io
from dataclasses import replace
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_prep import toy
from kinema.data.dataset.shards import ShardWriter
from kinema.evaluation.captions import check_toy_data
from kinema.evaluation.toy_check import (
    COLOURS,
    DIRECTIONS,
    NONE,
    SHAPES,
    Attributes,
    Moments,
    check_clip,
    combinations,
    heldout_prompts,
    is_heldout,
    look,
    name_shape,
    parse_caption,
    pass_rates,
)
from tests.unit.clips import record as clip_record

BACKGROUND = (20, 22, 24)


@pytest.fixture(scope="module")
def clips():
    """Real held-out clips through their mp4: (caption, 17 frames at 8 fps by timestamp)."""
    sizes = [(64, 64), (80, 48), (48, 80)]
    made = [toy.make_clip(toy.Job(number, 5, "heldout", sizes, 0.0, 0.3, keep_frames=False)) for number in range(28)]
    return [(record.caption, decode(mp4)) for record, mp4, _ in made]


def decode(mp4):
    with av.open(io.BytesIO(mp4)) as container:
        frames = list(container.decode(video=0))
    times = np.array([frame.time for frame in frames])
    chosen = [int(np.argmin(np.abs(times - i / 8))) for i in range(17)]
    return np.stack([frames[i].to_ndarray(format="rgb24") for i in chosen])


def draw(shape="circle", colour="red", path=None, size=(64, 64), diameter=22.0, frames=17):
    """Frames of one shape along `path`, a function of 0..1 to (x, y)."""
    path = path or (lambda t: (16 + 30 * t, 32))
    track = np.array([path(t) for t in np.linspace(0, 1, frames)])
    body = toy.Body(Attributes("small", colour, shape, "slowly", "right"), toy.Shape(shape, diameter), (0, 0), 0)
    return toy.render(toy.Scene([body], size, 8, frames, BACKGROUND, None, ""), [track])


def blur(frames, radius):
    return np.stack([np.asarray(Image.fromarray(f).filter(ImageFilter.GaussianBlur(radius))) for f in frames])


def add_noise(frames, std):
    noise = np.random.default_rng(0).normal(0, std, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


WORSE = {
    "as decoded": lambda frames: frames,
    "blurred by 1.5 pixels": lambda frames: blur(frames, 1.5),
    "noise of 20 levels": lambda frames: add_noise(frames, 20),
    "blurred, noisy and pale": lambda frames: add_noise(blur(frames, 1.0), 8) // 4 * 3,
}


@pytest.mark.parametrize("how", WORSE)
def test_real_heldout_clips_are_judged_right(clips, how):
    verdicts = [check_clip(WORSE[how](frames), caption) for caption, frames in clips]
    rates = pass_rates(verdicts)
    assert rates["all"] >= 0.98, [v.found for v in verdicts if not v.ok]
    assert np.mean([v.found.bounces == v.expected.bounces for v in verdicts]) >= 0.95


def test_a_clip_never_passes_for_another_caption(clips):
    for caption, frames in clips[:20]:
        truth = parse_caption(caption)
        found = look(frames)
        assert check_clip(frames, truth).ok
        for name, words in (("colour", COLOURS), ("shape", SHAPES), ("direction", DIRECTIONS)):
            for word in words:
                wrong = replace(truth, **{name: word})
                assert (getattr(found, name) == getattr(wrong, name)) == (wrong == truth)
    frames = clips[0][1]
    truth = parse_caption(clips[0][0])
    verdict = check_clip(frames, replace(truth, shape=next(s for s in SHAPES if s != truth.shape)))
    assert (verdict.colour_ok, verdict.shape_ok, verdict.direction_ok, verdict.ok) == (
        True,
        False,
        True,
        False,
    )


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reversed_and_turned_clips_change_the_direction_only(colour, shape):
    frames = draw(shape, colour)
    assert look(frames).direction == "right"
    assert look(frames[::-1]).direction == "left"
    assert look(draw(shape, colour, lambda t: (32, 45 - 30 * t))).direction == "up"
    assert look(draw(shape, colour, lambda t: (32, 18 + 25 * t))).direction == "down"
    assert (look(frames).colour, look(frames).shape) == (colour, shape)


def two_objects():
    return np.maximum(
        draw("circle", path=lambda t: (14 + 25 * t, 16)), draw("circle", path=lambda t: (14 + 25 * t, 48))
    )


def gaussian_blob():
    y, x = np.mgrid[0:64, 0:64] + 0.5
    blobs = [np.exp(-((x - 16 - 2 * t) ** 2 + (y - 32) ** 2) / 2 / 6**2) for t in range(17)]
    return (np.stack(blobs)[..., None] * (210, 20, 20) + BACKGROUND).astype(np.uint8)


def two_colours():
    frames = draw("circle", "red", diameter=26)
    frames[:, :32][frames[:, :32, :, 0] > 120] = (52, 104, 248)
    return frames


NOTHING = {
    "black": np.zeros((17, 64, 64, 3), np.uint8),
    "grey": np.full((17, 64, 64, 3), 60, np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8),
    "dark noise": add_noise(np.full((17, 64, 64, 3), 30, np.uint8), 25),
    "two objects": two_objects(),
    "everything red": np.full((17, 64, 64, 3), (232, 44, 40), np.uint8),
    "object in half of the frames": np.concatenate([draw()[:8], np.full((9, 64, 64, 3), 22, np.uint8)]),
    "a speck": draw(diameter=6),
}


@pytest.mark.parametrize("what", NOTHING)
def test_nothing_is_seen_where_there_is_no_one_object(what):
    found = look(NOTHING[what])
    assert (found.colour, found.shape, found.direction) == (NONE, NONE, NONE)
    assert found.reason


def test_what_is_ambiguous_is_none_in_that_attribute_only():
    assert look(gaussian_blob()).shape == NONE
    assert look(gaussian_blob()).colour == "red"
    assert look(draw("triangle")[:, ::-1]).shape == NONE  # stands on its tip
    assert look(draw("square").repeat(2, axis=2)).shape == NONE  # a rectangle
    assert look(draw(path=lambda t: (32, 32))).direction == NONE
    assert look(draw(path=lambda t: (16 + 30 * t, 16 + 30 * t))).direction == NONE
    assert look(draw(path=lambda t: (16, 32) if t < 0.5 else (48, 32))).direction == NONE  # jumps
    assert look(two_colours()).colour == NONE
    orange = np.where(draw("square", "red") > 100, 0, draw("square", "red"))
    orange[draw("square", "red")[..., 0] > 100] = (236, 130, 40)
    assert look(orange).colour == NONE


def test_a_shape_that_changes_half_way_has_no_name():
    circle, square = draw("circle"), draw("square")
    assert look(np.concatenate([circle[:9], square[9:]])).shape == NONE


def test_a_shape_between_two_names_has_none():
    """Half circle, half square: the moments are in the middle, and neither caption may claim them."""
    y, x = np.mgrid[-1:1:400j, -1:1:400j]
    rounded = (np.abs(x) ** 3.7 + np.abs(y) ** 3.7) < 0.6
    z = (x + 1j * y)[rounded]
    area = rounded.sum() / 200**2
    fourth = (z**4).mean().real / area**2
    assert 0.45 < fourth / (-1 / 60) < 0.55
    assert name_shape(Moments(0, 0, 1.0, 0.97, 0.0, 0.0, 0.0, fourth)) == NONE


def test_moments_of_ideal_shapes_match_their_closed_forms():
    y, x = np.mgrid[-30:30:0.05, -30:30:0.05] + 0.025
    for name in SHAPES:
        inside = toy.Shape(name, 20.0).distance(x, y) <= 0
        z, area = (x - 1j * y)[inside], np.pi * 100
        spread = (np.abs(z) ** 2).mean()
        third, fourth = (z**3).mean() / area**1.5, (z**4).mean() / area**2
        compactness = area / (2 * np.pi * spread)
        assert name_shape(Moments(0, 0, 1.0, compactness, 0, third.real, third.imag, fourth.real)) == name
        assert third.imag == pytest.approx({"triangle": -0.06755}.get(name, 0), abs=4e-4)
        assert fourth.real == pytest.approx({"square": -1 / 60}.get(name, 0), abs=4e-4)


def test_captions_and_attributes_are_one_to_one():
    for prompt in heldout_prompts(72):
        attributes = parse_caption(prompt.prompt)
        assert attributes.phrase == prompt.prompt
        assert (attributes.colour, attributes.shape, attributes.direction) == prompt[1:]
    for bad in (
        "a red circle moves right",
        "a large pink circle moves slowly right",
        heldout_prompts(1)[0].prompt + " and " + heldout_prompts(2)[1].prompt,
    ):
        with pytest.raises(ValueError, match="is not a caption of one toy object"):
            parse_caption(bad)


def test_heldout_prompts_are_balanced_and_possible():
    prompts = heldout_prompts(64)
    assert len({p.prompt for p in prompts}) == 64
    assert all(is_heldout(*p[1:]) for p in prompts)
    counts = [sum(p[1:] == combo for p in prompts) for combo in combinations(heldout=True)]
    assert set(counts) <= {5, 6}
    trained = {
        scene.caption
        for scene in (toy.draw_scene(np.random.default_rng(n), [(64, 64)], True, 0.0, 0.3) for n in range(900))
    }
    assert len({p.prompt for p in prompts} - trained) <= 2  # the generator makes such clips
    with pytest.raises(ValueError, match="n=73"):
        heldout_prompts(73)


def test_no_rate_over_no_clips_and_no_look_at_other_layouts():
    with pytest.raises(ValueError, match="zero clips"):
        pass_rates([])
    with pytest.raises(ValueError, match="T >= 4"):
        look(np.zeros((3, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        look(np.zeros((8, 64, 64, 3), np.float32))


# Whose samples are judged


def trained_on(folder, captions):
    """A checkpoint whose data have these captions."""
    with ShardWriter(folder / "data", name="some", command="none") as writer:
        for number, caption in enumerate(captions):
            writer.write(clip_record(f"clip{number}", b"mp4", caption=caption), b"mp4")
    step = folder / "checkpoints" / "step-00000000"
    step.mkdir(parents=True)
    (step / "config.yaml").write_text(f"data: {{path: {folder / 'data'}, cache_folder: x, train_split: train}}\n")
    return SimpleNamespace(folder=step)


def test_runs_on_other_data_than_toy_ones_are_not_judged(tmp_path):
    rng = np.random.default_rng(0)
    made = [toy.draw_scene(rng, [(64, 64), (96, 64)], number % 4 == 0, 0.5, 0.5).caption for number in range(40)]
    one = heldout_prompts(1)[0].prompt
    assert {caption.count(" moves ") for caption in made} == {1, 2}
    assert any("they collide" in caption for caption in made)
    check_toy_data(trained_on(tmp_path / "toy", [*made, one]), "runs/toy")
    with pytest.raises(
        ValueError, match=r"run=runs/film.*2 captions.*such as 'a cat', 'a dog runs'\. It judges captions"
    ):
        check_toy_data(trained_on(tmp_path / "film", [one, "a dog runs", "a cat"]), "runs/film")
    with pytest.raises(
        ValueError, match=r"run=runs/wan was not trained here: kinema evaluate judges toy captions only"
    ):
        check_toy_data(SimpleNamespace(folder=tmp_path), "runs/wan")

import hashlib
import io
import itertools
import json
import shutil

import av
import numpy as np
import pytest

from data_prep import toy
from kinema.data.dataset.shards import DatasetIndex, read_member
from kinema.data.verbs.check import check_dataset
from kinema.evaluation.toy_check import COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS, Attributes, is_heldout

FRAMES = [(64, 64), (80, 48), (48, 80)]
DENSE = np.linspace(0, toy.WINDOW_SECONDS, 400)


def simulated(count, *, heldout=False, pairs=0.15, seconds=4.0):
    """Scenes with their paths and hits, without drawing them."""
    for number in range(count):
        scene = toy.draw_scene(np.random.default_rng([7, number]), FRAMES, heldout, pairs, 0.3)
        paths, events = toy.simulate(scene.bodies, scene.size, seconds, scene.contact)
        yield scene, paths, events


TRAIN = list(simulated(500))
PAIRS = list(simulated(150, pairs=1.0))


def hits(events, kind):
    return [event.seconds for event in events if event.kind == kind and event.seconds <= toy.WINDOW_SECONDS]


def test_captions_are_exactly_true_for_the_captioned_time():
    for scene, paths, events in [*TRAIN, *PAIRS]:
        collides = scene.caption.endswith(" and they collide")
        phrases = " and ".join(body.attributes.phrase for body in scene.bodies)
        assert scene.caption == phrases + (" and they collide" if collides else "")
        assert bool(hits(events, "collision")) == collides
        named = toy.WINDOW_SECONDS if not collides else hits(events, "collision")[0]
        for i, (body, path) in enumerate(zip(scene.bodies, paths, strict=True)):
            a = body.attributes
            walls = [
                t for t in hits(events, "wall") if t <= named and any(i in e.objects for e in events if e.seconds == t)
            ]
            assert bool(walls) == a.bounces
            first_hit = min([named, *walls])
            assert first_hit >= 0.69
            start, end = toy.positions_at(body, path, np.array([0.0, first_hit]))
            moved = (end - start) / first_hit / min(scene.size)  # short sides a second
            np.testing.assert_allclose(moved, np.array(DIRECTIONS[a.direction]) * SPEEDS[a.speed], atol=0.025)
            assert body.shape.diameter / min(scene.size) == pytest.approx(SIZES[a.size], rel=0.051)


def test_every_word_pair_is_trained_and_no_heldout_combination_is():
    seen = {
        (a.colour, a.shape, a.direction)
        for scene, _, _ in [*TRAIN, *PAIRS]
        for a in [b.attributes for b in scene.bodies]
    }
    everything = set(itertools.product(COLOURS, SHAPES, DIRECTIONS))
    held = {combo for combo in everything if is_heldout(*combo)}
    assert len(held) == 12
    assert seen == everything - held
    for first, second in itertools.combinations(range(3), 2):
        pairs = {(combo[first], combo[second]) for combo in seen}
        assert pairs == {(combo[first], combo[second]) for combo in everything}
    for scene, _, _ in simulated(60, heldout=True):
        (body,) = scene.bodies
        assert is_heldout(body.attributes.colour, body.attributes.shape, body.attributes.direction)


def test_the_mix_is_what_the_help_says():
    share = np.mean([len(scene.bodies) == 2 for scene, _, _ in TRAIN])
    assert share == pytest.approx(0.15, abs=0.05)
    assert {scene.fps for scene, _, _ in TRAIN} == set(toy.FPS)
    assert {scene.size for scene, _, _ in TRAIN} == set(FRAMES)
    assert all(2.25 <= scene.num_frames / scene.fps <= 4.13 for scene, _, _ in TRAIN)
    bounces = np.mean([b.attributes.bounces for scene, _, _ in TRAIN for b in scene.bodies if len(scene.bodies) == 1])
    assert 0.25 < bounces < 0.6


def test_momentum_and_energy_survive_collisions_and_energy_survives_walls():
    collisions = 0
    for scene, paths, events in PAIRS:
        mass = [body.shape.diameter**2 for body in scene.bodies]
        for event in events:
            before, after = ([_velocity(path, event.seconds, side) for path in paths] for side in (-1e-9, 1e-9))
            energies = [sum(m * v * v for m, v in zip(mass, vs, strict=True)) for vs in (before, after)]
            assert energies[0] == pytest.approx(energies[1])
            if event.kind == "collision":
                collisions += 1
                momenta = [sum(m * v for m, v in zip(mass, vs, strict=True)) for vs in (before, after)]
                assert momenta[0] == pytest.approx(momenta[1], abs=1e-6)
    assert collisions > 50


def _velocity(path, seconds, side):
    times = np.array([moment[0] for moment in path])
    return path[np.searchsorted(times, seconds + side, side="right") - 1][2]


def test_nothing_leaves_the_frame_or_overlaps():
    for scene, paths, _ in [*TRAIN[:60], *PAIRS[:60]]:
        tracks = [toy.positions_at(b, p, np.linspace(0, 4, 200)) for b, p in zip(scene.bodies, paths, strict=True)]
        for body, track in zip(scene.bodies, tracks, strict=True):
            left, up, right, down = body.shape.extents
            assert (track >= (left - 1e-6, up - 1e-6)).all()
            assert (track <= np.array(scene.size) - (right - 1e-6, down - 1e-6)).all()
        if len(tracks) == 2:
            assert _deepest_overlap(scene, tracks) < 0.3  # pixels; contact is found on a raster


def _deepest_overlap(scene, tracks):
    """How deep any point lies in both shapes at once, over all times."""
    y, x = np.mgrid[0 : scene.size[1] : 1.0, 0 : scene.size[0] : 1.0]
    depths = [
        body.shape.distance(x - track[::4, 0, None, None], y - track[::4, 1, None, None])
        for body, track in zip(scene.bodies, tracks, strict=True)
    ]
    return -np.maximum(*depths).min()


@pytest.mark.parametrize(("first", "second"), itertools.product(SHAPES, SHAPES))
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_contact_is_where_shapes_touch(first, second, direction):
    shapes = toy.Shape(first, 20.0), toy.Shape(second, 14.0)
    step = np.array(DIRECTIONS[direction]) * toy.contact_distance(*shapes, direction)
    y, x = np.mgrid[-40:40:0.25, -40:40:0.25]
    gap = np.maximum(shapes[0].distance(x, y), shapes[1].distance(x - step[0], y - step[1])).min()
    assert gap == pytest.approx(0, abs=0.3)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_area_and_the_centroid_it_claims(name):
    shape = toy.Shape(name, 20.0)
    y, x = np.mgrid[-20:20:0.1, -20:20:0.1] + 0.05
    inside = shape.distance(x, y) <= 0
    assert inside.sum() * 0.01 == pytest.approx(np.pi * 100, rel=0.01)
    assert [x[inside].mean(), y[inside].mean()] == pytest.approx([0, 0], abs=0.02)
    measured = (-x[inside].min(), -y[inside].min(), x[inside].max(), y[inside].max())
    assert measured == pytest.approx(shape.extents, abs=0.12)


def test_the_picture_shows_the_trajectory():
    for scene, paths, _ in itertools.islice(simulated(12, pairs=0.0), 12):
        times = np.arange(scene.num_frames) / scene.fps
        track = toy.positions_at(scene.bodies[0], paths[0], times)
        frames = toy.render(scene, [track]).astype(float)
        weight = np.abs(frames - scene.background).sum(-1)
        height, width = weight.shape[1:]
        x = (weight * (np.arange(width) + 0.5)).sum((1, 2)) / weight.sum((1, 2))
        y = (weight * (np.arange(height) + 0.5)[:, None]).sum((1, 2)) / weight.sum((1, 2))
        np.testing.assert_allclose(np.stack([x, y], 1), track, atol=0.15)


def test_each_hit_sounds_at_its_moment():
    checked = 0
    for number in range(16):
        record, mp4, _ = toy.make_clip(toy.Job(number, 3, "train", FRAMES, 0.3, 0.3, keep_frames=False))
        events = [event["seconds"] for event in record.extra["events"]]
        with av.open(io.BytesIO(mp4)) as container:
            sound = np.abs(np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)]))
        if not events:
            assert sound.max() < 0.01
            continue
        begin = round(events[0] * toy.SAMPLE_RATE)
        assert sound[: max(0, begin - 400)].max(initial=0) < 0.02
        assert sound[begin : begin + 160].max() > 0.1  # within 10 ms
        checked += 1
    assert checked > 5


def run_toy(folder, *options):
    arguments = ["--out", str(folder), "--clips", "4", "--heldout", "2", "--sizes", "64x64,80x48", *options]
    assert toy.main(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return run_toy(tmp_path_factory.mktemp("toy") / "a", "--workers", "1")


def test_two_builds_are_equal_whatever_the_number_of_workers(built, tmp_path, capsys):
    first, second = built, run_toy(tmp_path / "b", "--workers", "2")
    assert capsys.readouterr().out.strip().endswith(f"kept 6/6 READY {tmp_path / 'b'}")
    names = sorted(path.name for path in first.iterdir())
    assert names == ["clips-000000.index.json", "clips-000000.tar", "contact_sheet.png", "dataset.json"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert check_dataset(second).ready
    assert (
        toy.make_clip(toy.Job(0, 1, "train", FRAMES, 0.15, 0.3, False))[1]
        != toy.make_clip(toy.Job(0, 0, "train", FRAMES, 0.15, 0.3, False))[1]
    )


def test_records_say_what_a_record_must(built):
    index = DatasetIndex.load(built)
    assert index.manifest["splits"] == {"heldout": 2, "train": 4}
    for entry in index.entries:
        record, extra = entry.record, json.loads(read_member(index.folder, entry, "json"))["extra"]
        assert (record.license, record.consent, record.source) == ("CC0-1.0", "synthetic", "kinema-toy/0")
        assert record.sha256 == hashlib.sha256(read_member(index.folder, entry, "mp4")).hexdigest()
        attributes = [Attributes(**values) for values in extra["attributes"]]
        assert record.caption.startswith(" and ".join(a.phrase for a in attributes))
        assert np.shape(extra["trajectories"]) == (len(attributes), record.num_frames, 2)


@pytest.mark.parametrize("sizes", ["64", "64x60", "16x64", "64x64;80x48", "axb"])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="--sizes"):
        toy.parse_sizes(sizes)


def test_an_existing_data_set_is_not_overwritten_unasked(built, tmp_path):
    folder = shutil.copytree(built, tmp_path / "copy")
    with pytest.raises(ValueError, match="holds a data set already"):
        run_toy(folder, "--workers", "1")
    run_toy(folder, "--workers", "1", "--seed", "1", "--overwrite")
    assert DatasetIndex.load(folder).hash != DatasetIndex.load(built).hash


def test_grounds_come_in_turn_and_a_wrong_one_is_named():
    assert toy.parse_backgrounds("1,2,3/40,50,60") == ((1, 2, 3), (40, 50, 60))
    with pytest.raises(ValueError, match="1,2: 1,2 must be R,G,B"):
        toy.parse_backgrounds("1,2")

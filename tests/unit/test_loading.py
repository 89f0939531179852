import multiprocessing
import shutil
import time

import pytest
import torch

from kinema.data.account.rights import RightsPolicy
from kinema.data.config import Crop, DataConfig, Window
from kinema.data.dataset.shards import DatasetIndex, index_name, read_member
from kinema.data.decode.clip_decoder import DecodingRules
from kinema.data.decode.decoders.video import Decoder
from kinema.data.geometry import ClipShape
from kinema.data.packs.loading import make_loader
from kinema.data.steps.candidates import plan_clips
from kinema.data.steps.plan import lanes_of
from kinema.data.storage.place import resolve_folder
from tests.unit.clips import GEOMETRY, SHAPES, build, make_plan, numbers

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    # Every third clip lasts 1 s, and so takes the shorter shape.
    return build(tmp_path_factory.mktemp("data") / "set", 30, duration_seconds=lambda i: 1.0 if i % 3 == 0 else 2.0)


def load(index, plan, start, steps, *, world=1, workers=0, seed=0, **options):
    """All ranks' packs of each step, in lane order."""
    loaders = [
        make_loader(
            index,
            plan,
            lanes_of(rank, world, plan.lanes),
            start,
            steps,
            fps=8,
            seed=seed,
            num_workers=workers,
            **options,
        )
        for rank in range(world)
    ]
    return [[pack for packs in row for pack in packs] for row in zip(*loaders, strict=True)]


def keys(rows):
    return [[pack.keys for pack in row] for row in rows]


def pixels(rows):
    return torch.cat([frames.flatten() for row in rows for pack in row for frames in pack.frames])


def test_a_pack_says_what_it_holds(index):
    plan = make_plan(index)
    (row,) = load(index, plan, 3, 1)
    for lane, pack in enumerate(row):
        slots = plan.step(3)[lane]
        assert (pack.step, pack.lane) == (3, lane)
        assert pack.keys == [f"clip-{slot.clip.entry_index:03d}" for slot in slots]
        assert pack.captions == [f"caption of {key}" for key in pack.keys]
        assert pack.positions == [slot.position for slot in slots]
        assert [tuple(frames.shape) for frames in pack.frames] == [(*shape, 3) for shape in pack.shapes]
        assert pack.weights.tolist() == [1.0] * len(slots)
        assert pack.seconds > 0
        for frames, shape in zip(pack.frames, pack.shapes, strict=True):
            # 8 fps out of 10: times 0, 0.125, 0.25, ... (a tie at 0.25 goes to frame 2)
            assert numbers(frames) == [0, 1, 2, 4, 5, 6, 7, 9, 10][: shape.frames]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("window", list(Window))
def test_any_number_of_workers_yields_the_same_packs(index, workers, window):
    plan = make_plan(index)
    expected = load(index, plan, 5, 6, window=window)
    actual = load(index, plan, 5, 6, window=window, workers=workers)
    assert len(actual) == 6
    assert keys(actual) == keys(expected)
    assert torch.equal(pixels(actual), pixels(expected))
    assert [p.positions for row in actual for p in row] == [p.positions for row in expected for p in row]


@pytest.mark.parametrize("workers", [0, 2])
def test_ten_steps_and_ten_after_resuming_are_twenty(index, workers):
    plan = make_plan(index)
    whole = load(index, plan, 0, 20, window=Window.random)
    first = load(index, plan, 0, 10, window=Window.random, workers=workers)
    loader = make_loader(index, plan, [0, 1], 10, 10, fps=8, seed=0, num_workers=workers, prefetch=4)
    next(loader)  # prefetched packs that nobody consumed are not lost
    loader.close()
    second = load(index, make_plan(index), 10, 10, window=Window.random, workers=workers)
    assert keys(first + second) == keys(whole)
    assert torch.equal(pixels(first + second), pixels(whole))


def test_resuming_on_another_world_size_goes_on_with_the_same_packs(index):
    plan = make_plan(index)
    whole = load(index, plan, 0, 15)
    parts = load(index, plan, 0, 5) + load(index, plan, 5, 5, world=2) + load(index, plan, 10, 5)
    assert keys(parts) == keys(whole)
    assert torch.equal(pixels(parts), pixels(whole))


def test_ranks_read_each_clip_of_an_epoch_once(index):
    plan = make_plan(index, lanes=6, clips_per_step=6)
    for world in (1, 2, 3, 6):
        seen = [key for row in load(index, plan, 0, 5, world=world) for pack in row for key in pack.keys]
        assert sorted(seen) == sorted(entry.record.key for entry in index.entries)


def test_a_random_window_is_keyed_by_position_and_seed(index):
    plan = make_plan(index, shapes=[ClipShape(5, 32, 32)])
    one = load(index, plan, 0, 16, window=Window.random)
    assert torch.equal(pixels(one), pixels(load(index, plan, 0, 16, window=Window.random)))
    assert not torch.equal(pixels(one), pixels(load(index, plan, 0, 16, window=Window.random, seed=1)))
    starts = {}
    for row in one:
        for pack in row:
            for key, frames in zip(pack.keys, pack.frames, strict=True):
                first, last = numbers(frames)[0], numbers(frames)[-1]
                assert 4 <= last - first <= 6  # half a second at 10 fps
                starts.setdefault(key, set()).add(first)
    assert max(first for clip in starts.values() for first in clip) > 10  # to the end of 2 s
    assert sum(len(clip) > 1 for clip in starts.values()) > 15  # another one in the next epoch


def test_loading_leaves_the_global_random_state_alone(index):
    before = torch.get_rng_state()
    load(index, make_plan(index), 0, 2, workers=1, window=Window.random, crop=Crop.random)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_end_with_the_loader(index):
    loader = make_loader(index, make_plan(index), [0, 1], 0, 10**6, fps=8, seed=0, num_workers=2)
    next(loader)
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_every_decoder_serves_the_loader(index):
    plan = make_plan(index)
    one, *others = (load(index, plan, 0, 4, decoding=DecodingRules(decoder)) for decoder in Decoder)
    for other in others:
        assert (pixels(one).int() - pixels(other).int()).abs().max() <= 3


def test_clips_that_cannot_be_used_are_counted_by_reason(tmp_path):
    index = build(
        tmp_path / "set",
        12,
        caption=lambda i: " " if i in (1, 2) else "a ball",
        license=lambda i: "unknown" if i in (2, 3, 4) else "CC0-1.0",
        duration_seconds=lambda i: 0.4 if i == 5 else 2.0,
        fps=lambda i: 6.0 if i == 6 else 10.0,
    )
    clips, report = plan_clips(index, SHAPES, 8, GEOMETRY, rights=RightsPolicy(("CC0-1.0",)))
    assert [clip.entry_index for clip in clips] == [0, 7, 8, 9, 10, 11]
    assert report.line().startswith("kept 6/12 (50%): license unknown not in data.rights.allowed_licenses 3, ")
    assert report.dropped["no caption"] == report.dropped["too short"] == 1
    assert report.dropped["frame rate below data.fps"] == 1
    assert report.kept + sum(report.dropped.values()) == report.total
    _, lenient = plan_clips(index, SHAPES, 5, GEOMETRY, require_captions=False)
    assert lenient.kept == 11


def test_max_clips_takes_the_first_usable_clips_and_counts_the_others(tmp_path):
    index = build(tmp_path / "set", 8, caption=lambda i: "" if i == 1 else "a ball")
    clips, report = plan_clips(index, SHAPES, 8, GEOMETRY, max_clips=3)
    assert [clip.entry_index for clip in clips] == [0, 2, 3]
    assert report.dropped == {"no caption": 1, "beyond data.max_clips": 4}
    assert report.kept == 3
    every, _ = plan_clips(index, SHAPES, 8, GEOMETRY, max_clips=99)
    assert list(every) == list(plan_clips(index, SHAPES, 8, GEOMETRY)[0])


def test_keeping_nothing_is_an_error_that_says_why(index):
    with pytest.raises(ValueError, match=r"kept 0/30 .* too short 30.*needs 17 frames .* 2\.12 s; .* lasts 2\.00 s"):
        plan_clips(index, [ClipShape(17, 32, 32)], 8, GEOMETRY)


def test_an_illegal_size_is_refused_before_anything_is_read(index):
    with pytest.raises(ValueError, match=r"data\.shapes=\[8, 32, 32\].*\[9, 32, 32\], \[5, 32, 32\]"):
        plan_clips(index, [ClipShape(8, 32, 32)], 8, GEOMETRY)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fps", 0),
        ("lanes", 0),
        ("max_failed_fraction", 1.5),
        ("shapes", [[17, 64]]),
        ("shapes", []),
        ("num_workers", -1),
        ("timeout_seconds", 0),
    ],
)
def test_the_config_names_the_value_it_refuses(name, value):
    with pytest.raises(ValueError, match=f"data.{name}="):
        DataConfig(**{name: value})


def test_only_manifest_and_indexes_of_a_remote_data_set_are_brought_here(index, tmp_path):
    address = index.folder.resolve().as_uri()
    assert address.startswith("file:///")
    folder = resolve_folder(address, tmp_path / "cache")
    copy = DatasetIndex.load(folder, "train")
    assert copy.hash == index.hash
    assert read_member(folder, copy.entries[7], "mp4") == read_member(index.folder, index.entries[7], "mp4")
    names = {path.name for path in folder.path.iterdir()}
    assert {name for name in names if not name.startswith(".")} == {"dataset.json"} | {
        index_name(shard["file"]) for shard in index.manifest["shards"]
    }
    stamps = {path: path.stat().st_mtime_ns for path in folder.path.glob("*.index.json")}
    assert resolve_folder(address + "/", tmp_path / "cache").path == folder.path
    assert {path: path.stat().st_mtime_ns for path in folder.path.glob("*.index.json")} == stamps
    assert resolve_folder("data/toy", tmp_path) == type(tmp_path)("data/toy")


def test_remote_trouble_is_told_and_leaves_no_data_set(index, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(index.folder, source)
    shard = sorted(source.glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{shard.name} is missing there or shorter"):
        resolve_folder(source.as_uri(), tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("dataset.json"))
    with pytest.raises(ValueError, match="cannot be read"):
        resolve_folder((tmp_path / "nowhere").as_uri(), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"data\.path=pipe:rm"):
        resolve_folder("pipe:rm -rf x", tmp_path / "cache")


def test_a_remote_manifest_cannot_name_files_elsewhere(index, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(index.folder, source)
    manifest = source / "dataset.json"
    manifest.write_text(manifest.read_text().replace("clips-000000.tar", "../evil.tar"))
    with pytest.raises(ValueError, match=r"\.\./evil\.tar"):
        resolve_folder(source.as_uri(), tmp_path / "cache")

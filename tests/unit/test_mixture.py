"""Several data sets in one run, and what is different in its first steps."""

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kinema.data.account.rights import RightsPolicy
from kinema.data.config import DataConfig
from kinema.data.dataset.mixture import SourceConfig, StageConfig
from kinema.data.dataset.shards import DatasetIndex, read_member
from kinema.data.decode.clip_decoder import DecodingRules
from kinema.data.decode.decoders.video import Decoder
from kinema.data.packs.cached_clips import open_caches
from kinema.data.packs.latents import write_latents
from kinema.data.packs.loading import make_loader
from kinema.data.steps.candidates import plan_clips
from kinema.data.steps.planning import Planner, open_index
from tests.unit.clips import GEOMETRY, build

ALL = RightsPolicy()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    build(root / "toy", 12, split=lambda i: "heldout" if i > 9 else "train")
    build(root / "film", 7, source="a film", caption=lambda i: "" if i == 0 else "a street")
    return {"toy": str(root / "toy"), "film": str(root / "film")}


def config(folders, **values):
    mixture = {name: SourceConfig(path=path, weight=weight) for (name, path), weight in zip(folders.items(), [3, 1])}  # noqa: B905
    chosen = {"shapes": [[9, 32, 32], [5, 32, 32]], "fps": 8.0, "clips_per_step": 4, "lanes": 2, **values}
    return DataConfig(**{"mixture": mixture, **chosen})


def planned(data, seed=0, rights=ALL):
    index = open_index(data, data.train_split)
    return index, *Planner(data, GEOMETRY, rights, seed).training(index)


def keys_of(data, index, plan, first, steps, workers=0):
    rows = make_loader(
        index, plan, range(data.lanes), first, steps, fps=8, seed=0, decoding=DecodingRules(), num_workers=workers
    )
    return [[pack.keys for pack in row] for row in rows]


def test_each_data_set_has_its_share_of_every_step_and_bytes_of_its_own(folders):
    data = config(folders)
    index, plan, report = planned(data)
    assert report.line() == "kept 16/17 (94%): film: no caption 1"
    assert len(index.entries) == 17
    for step in range(12):
        slots = [slot for pack in plan.step(step) for slot in pack]
        assert Counter(index.place(slot.clip.entry_index)[0] for slot in slots) == {"toy": 3, "film": 1}
        for slot in slots:
            folder, entry = index.locate(slot.clip.entry_index)
            name = index.place(slot.clip.entry_index)[0]
            assert str(folder) == folders[name]
            joined = index.entries[slot.clip.entry_index]
            assert joined.record.key == f"{name}/{entry.record.key}"
            assert joined.shard == f"{name}/{entry.shard}"
            assert read_member(folder, entry, "mp4")
    film = [slot for step in range(12) for pack in plan.step(step) for slot in pack if slot.clip.entry_index >= 10]
    assert [slot.epoch for slot in sorted(film, key=lambda slot: slot.position)] == [0] * 6 + [1] * 6
    assert index.parts == ["toy", "film"]
    assert index.manifest["sources"] == {"test": 12, "a film": 7}
    assert index.hash != planned(config(dict(reversed(folders.items()))))[0].hash


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixture_with_stages_goes_on_after_resuming(folders, workers):
    stages = [
        StageConfig(until_step=3, shapes=[[5, 32, 32]], clips_per_step=6),
        StageConfig(until_step=6, weights={"toy": 1, "film": 1}),
    ]
    data = config(folders, stages=stages)
    index, plan, _ = planned(data)
    whole = keys_of(data, index, plan, 0, 9)
    parts = []
    for first, steps in ((0, 2), (2, 3), (5, 4)):  # a new process each time, in the middle of stages too
        again, fresh, _ = planned(data)
        parts += keys_of(data, again, fresh, first, steps, workers)
        assert fresh.state(first) == plan.state(first)
    assert parts == whole
    sizes = [sum(map(len, row)) for row in whole]
    assert sizes == [6] * 3 + [4] * 6
    films = [sum(key.startswith("film/") for pack in row for key in pack) for row in whole]
    assert sum(films[:3]) in (4, 5)
    assert films[3:6] == [2, 2, 2]
    assert films[6:] == [1, 1, 1]
    shapes = [{slot.clip.shape.frames for pack in plan.step(step) for slot in pack} for step in range(9)]
    assert shapes == [{5}] * 3 + [{9}] * 6


def test_rights_are_asked_with_the_keys_of_the_data_sets_themselves(folders):
    data = config(folders)
    index, plan, report = planned(data, rights=RightsPolicy(excluded_keys=("clip-003",)))
    assert report.dropped["toy: key in data.rights.excluded_keys"] == 1
    assert report.dropped["film: key in data.rights.excluded_keys"] == 1
    index, plan, _ = planned(data)
    withdrawn = RightsPolicy(excluded_keys=("clip-003",))  # while the run goes on
    rows = make_loader(index, plan, [0, 1], 0, 8, fps=8, seed=0, decoding=DecodingRules(), rights=withdrawn)
    failed = [f for row in rows for pack in row for f in pack.withdrawn]
    assert {failure.key for failure in failed} == {"toy/clip-003", "film/clip-003"}


def test_held_out_clips_come_from_the_data_sets_that_have_some(folders):
    data = config(folders, stages=[StageConfig(until_step=3, shapes=[[5, 32, 32]])])
    heldout = open_index(data, "heldout")
    assert heldout.parts == ["toy"]
    plan = Planner(data, GEOMETRY, RightsPolicy(), 0).heldout(heldout)
    assert {slot.clip.shape.frames for pack in plan.step(0) for slot in pack} == {9}
    none = open_index(config({"film": folders["film"]}), "heldout")
    assert Planner(data, GEOMETRY, RightsPolicy(), 0).heldout(none) is None


def test_one_data_set_is_planned_as_before(folders):
    data = DataConfig(path=folders["toy"], shapes=[[9, 32, 32], [5, 32, 32]], clips_per_step=4, lanes=2)
    index, plan, report = planned(data)
    assert report.kept == 10
    assert index.parts == []
    assert plan.state(3) == {"epoch": 1, "cursor": 2}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixture": {"toy": SourceConfig()}}, r"data\.mixture\.toy\.path is missing"),
        ({"path": "data/film"}, r"data\.path=data/film and data\.mixture are given"),
        ({"latents": "data/latents"}, r"data\.latents=data/latents belongs to one data set"),
        ({"stages": [StageConfig(until_step=0)]}, r"data\.stages\[0\]\.until_step=0 must be above 0"),
        ({"stages": [StageConfig(5), StageConfig(5)]}, r"data\.stages\[1\]\.until_step=5 must be above 5"),
        ({"stages": [StageConfig(5, weights={"toy": 1.0})]}, r"data\.stages\[0\]\.weights .* film is in one"),
        ({"lanes": 17, "clips_per_step": 17}, r"data\.lanes=17 with 16 clips: an epoch would give a lane nothing"),
        ({"stages": [StageConfig(5, shapes=[[6, 32, 32]])]}, r"data\.shapes=\[6, 32, 32\] does not fit"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(folders, values, message):
    with pytest.raises(ValueError, match=message):
        planned(config(folders, **values))


def test_shares_of_data_sets_do_not_depend_on_the_number_of_ranks(folders):
    data = config(folders, lanes=4, clips_per_step=8)
    index, plan, _ = planned(data)
    whole = keys_of(data, index, plan, 0, 4)
    for world in (2, 4):
        rows = [
            make_loader(index, plan, range(rank * 4 // world, (rank + 1) * 4 // world), 0, 4, fps=8, seed=0,
                        decoding=DecodingRules())
            for rank in range(world)
        ]  # fmt: skip
        together = [[pack.keys for packs in row for pack in packs] for row in zip(*rows, strict=True)]
        assert together == whole


def test_a_data_set_of_a_mixture_may_lie_at_an_address(folders, tmp_path):
    here = config(folders)
    there = {**folders, "film": Path(folders["film"]).resolve().as_uri()}
    away = config(there, cache_folder=str(tmp_path / "cache"))
    loaded = []
    for data in (here, away):
        index, plan, _ = planned(data)
        rows = make_loader(index, plan, [0, 1], 0, 6, fps=8, seed=0, decoding=DecodingRules(), num_workers=1)
        loaded.append([pack for row in rows for pack in row])
    for pack, clean in zip(loaded[1], loaded[0], strict=True):
        assert (pack.keys, pack.failures) == (clean.keys, [])
        assert all(map(torch.equal, pack.frames, clean.frames))
    read = sum(pack.storage["storage_cache_misses"] + pack.storage["storage_cache_hits"] for pack in loaded[1])
    assert read == sum(key.startswith("film/") for pack in loaded[0] for key in pack.keys)
    assert loaded[0][0].storage == {}


def cached(folders, root):
    """Latents of each data set, and the config that names them; every latent is the mean colour of a clip's frames."""

    def encode(frames):
        mean = frames.float().mean(dim=(0, 1, 2)).view(3, 1, 1, 1)
        return mean, -mean

    data = config(folders)
    for name, folder in folders.items():
        index = DatasetIndex.load(folder, "train")
        clips, _ = plan_clips(index, data.clip_shapes, 8.0, GEOMETRY)
        write_latents(root / name, index, clips, encode, vae_hash="abc", shapes=data.clip_shapes, fps=8.0)
        data.mixture[name].latents = str(root / name)
    return data, encode


def test_each_data_set_of_a_mixture_has_its_own_cached_latents(folders, tmp_path):
    data, encode = cached(folders, tmp_path)
    index, plan, _ = planned(data)
    caches = open_caches(data, index, "abc")
    options = {"fps": 8, "seed": 0, "rights": ALL}
    frames = make_loader(index, plan, range(2), 3, 9, **options)
    latents = make_loader(index, plan, range(2), 3, 9, **options, latents=caches, num_workers=2)
    for one, other in zip(itertools.chain(*frames), itertools.chain(*latents), strict=True):
        assert one.keys == other.keys
        assert one.captions == other.captions
        torch.testing.assert_close(other.latents, [encode(clip) for clip in one.frames])


def test_every_cache_of_a_mixture_is_checked_by_name(folders, tmp_path):
    data, _ = cached(folders, tmp_path)
    index, _, _ = planned(data)
    for name, value in {"fps": 12.0, "decoder": Decoder.pyav, "shapes": [[9, 32, 32]]}.items():
        with pytest.raises(ValueError, match=rf"^data\.mixture\.toy\.latents=.* was made with {name}="):
            open_caches(replace(data, **{name: value}), index, "abc")
    with pytest.raises(ValueError, match=r"^data\.mixture\.toy\.latents=.* was made with vae_hash=abc"):
        open_caches(data, index, "another")
    with pytest.raises(ValueError, match="a VAE trains on frames"):
        open_caches(data, index, None)
    data.mixture["film"].latents = data.mixture["toy"].latents
    with pytest.raises(ValueError, match=r"^data\.mixture\.film\.latents=.* was made with data_hash="):
        open_caches(data, index, "abc")
    data.mixture["film"].latents = None
    with pytest.raises(ValueError, match=r"data\.mixture\.film\.latents=null, but other"):
        replace(data)
    with pytest.raises(ValueError, match=r"type data\.latents=null, and data\.mixture\.toy\.latents=FOLDER"):
        replace(config(folders), latents=str(tmp_path / "toy"))

import itertools
import json
import pickle
import tarfile
import time

import pytest
import torch
from safetensors.torch import load

from kinema.data.config import Crop, Window
from kinema.data.dataset.shards import DamagedSample, read_member
from kinema.data.decode.decoding import Decoder, decode_clip
from kinema.data.geometry import ClipShape
from kinema.data.packs.cached_clips import CachedClips
from kinema.data.packs.latents import LatentCache, LatentWriter, write_latents
from kinema.data.packs.loading import make_loader
from kinema.data.steps.candidates import plan_clips
from kinema.data.steps.keyed import keyed_seed
from tests.unit.clips import GEOMETRY, SHAPES, build, make_plan

IDENTITY = {"vae_hash": "abc", "data_hash": "def", "shapes": SHAPES, "fps": 8.0}


def encode(frames):
    """Stands for a VAE: mean and log-variance that tell clips, windows, height and width apart."""
    video = frames.double().permute(3, 0, 1, 2)[:, ::4, ::8, ::16] / 255
    return video * 2 - 1, -2 - video


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return build(tmp_path_factory.mktemp("data") / "set", 12, damaged=(5,))


def cached(index, folder, shapes=SHAPES, **options):
    clips, _ = plan_clips(index, shapes, 8.0, GEOMETRY)
    failures = write_latents(folder, index, clips, encode, vae_hash="abc", shapes=shapes, fps=8.0, **options)
    return LatentCache.load(folder, vae_hash="abc", data_hash=index.hash, shapes=shapes, fps=8.0), failures


def read(cache, key):
    return cache.read(cache.find(key, SHAPES[0]))


@pytest.fixture(scope="module")
def cache(index, tmp_path_factory):
    return cached(index, tmp_path_factory.mktemp("latents") / "cache")[0]


def test_mean_and_log_variance_come_back_as_they_were_encoded(index, cache):
    for entry in [entry for entry in index.entries if entry.record.key != "clip-005"]:
        frames = decode_clip(read_member(index.folder, entry, "mp4"), SHAPES[0], 8.0, 0.0, Decoder.decord)
        mean, logvar = read(cache, entry.record.key)
        assert mean.dtype == logvar.dtype == torch.float32
        assert mean.shape == (3, 3, 4, 2) == cache.latent_shapes[SHAPES[0]]
        torch.testing.assert_close((mean, logvar), tuple(part.float() for part in encode(frames)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vae_hash", "another"),
        ("data_hash", "another"),
        ("shapes", [ClipShape(9, 32, 32)]),
        ("shapes", [ClipShape(9, 32, 64), ClipShape(5, 32, 32)]),
        ("fps", 12.0),
        ("decoder", Decoder.pyav),
    ],
)
def test_each_field_of_the_key_is_refused_by_name(tmp_path, name, value):
    with LatentWriter(tmp_path / "cache", **IDENTITY) as writer:
        writer.write("clip", SHAPES[0], 0.0, torch.zeros(4, 3, 4, 4), torch.zeros(4, 3, 4, 4))
    LatentCache.load(tmp_path / "cache", **IDENTITY)
    with pytest.raises(ValueError, match=rf"was made with {name}=.*this run has {name}=") as refused:
        LatentCache.load(tmp_path / "cache", **{**IDENTITY, name: value})
    as_made = {
        "shapes": "type 'data.shapes=[[5,32,32],[9,32,32]]', or",
        "fps": "type 'data.fps=8.0', or",
        "decoder": "type 'data.decoder=decord', or",
    }
    assert as_made.get(name, "or type data.latents=null") in str(refused.value)


def test_other_preprocessing_is_refused(tmp_path, monkeypatch):
    with LatentWriter(tmp_path / "cache", **IDENTITY) as writer:
        writer.write("clip", SHAPES[0], 0.0, torch.zeros(4, 3, 4, 4), torch.zeros(4, 3, 4, 4))
    monkeypatch.setattr("kinema.data.packs.latents.PREPROCESSING", "random crop")
    with pytest.raises(
        ValueError, match=r"made with preprocessing=.*centre crop.*this run has preprocessing=random crop"
    ):
        LatentCache.load(tmp_path / "cache", **IDENTITY)


def test_another_format_version_is_refused(tmp_path, monkeypatch):
    with LatentWriter(tmp_path / "cache", **IDENTITY) as writer:
        writer.write("clip", SHAPES[0], 0.0, torch.zeros(4, 3, 4, 4), torch.zeros(4, 3, 4, 4))
    monkeypatch.setattr("kinema.data.packs.latents.FORMAT_VERSION", 3)
    with pytest.raises(ValueError, match="format_version=2, and this run has format_version=3"):
        LatentCache.load(tmp_path / "cache", **IDENTITY)


def rows(index, cache, **options):
    plan = make_plan(index, clips_per_step=4)
    return list(make_loader(index, plan, [0, 1], 0, 6, fps=8, seed=0, latents=cache, **options))


def test_two_epochs_draw_different_samples_of_the_same_mean(index, cache):
    means, samples = {}, {}
    for pack in itertools.chain(*rows(index, cache)):  # 6 steps of 4: two epochs of 12
        for key, position, (mean, logvar) in zip(pack.keys, pack.positions, pack.latents, strict=True):
            generator = torch.Generator().manual_seed(keyed_seed(0, "posterior", position))
            noise = torch.randn(mean.shape, generator=generator)
            means.setdefault(key, []).append(mean)
            samples.setdefault(key, []).append(mean + (0.5 * logvar).exp() * noise)
    assert len(means) == 12
    for key, two_means in means.items():
        assert torch.equal(*two_means)
        assert key == "clip-005" or not torch.allclose(*samples[key])


def test_the_loader_serves_latents_in_the_order_of_frames_for_any_workers(index, cache):
    expected = rows(index, None)
    for workers in (0, 2):
        actual = rows(index, cache, num_workers=workers)
        for one, other in zip(itertools.chain(*expected), itertools.chain(*actual), strict=True):
            assert one.keys == other.keys
            assert torch.equal(one.weights, other.weights)
            assert other.frames is None
            for frames, weight, (mean, logvar) in zip(one.frames, one.weights, other.latents, strict=True):
                wanted = encode(frames) if weight else (torch.zeros(3, 3, 4, 2),) * 2
                torch.testing.assert_close((mean, logvar), tuple(part.float() for part in wanted))


def test_a_clip_that_could_not_be_encoded_stays_in_its_place_with_weight_0(index, cache):
    failures = [failure for row in rows(index, cache) for pack in row for failure in pack.failures]
    assert [failure.key for failure in failures] == ["clip-005"] * 2
    assert "decord" in failures[0].reason


def test_several_windows_of_a_clip_are_drawn_by_position(index, tmp_path):
    cache, _ = cached(index, tmp_path / "cache", windows_per_clip=3)
    samples = json.loads(next(cache.folder.glob("*.index.json")).read_text())["samples"]
    starts = [sample["start_seconds"] for sample in samples if sample["key"] == "clip-000"]
    assert starts == pytest.approx([0.0, 0.4375, 0.875])  # 2 s less 9 / 8 s to spare
    windows = [cache.find("clip-000", SHAPES[0], draw) for draw in range(4)]
    assert windows[0] == windows[3]
    assert windows[0].member.offset < windows[1].member.offset < windows[2].member.offset
    with_start = rows(index, cache)
    drawn = rows(index, cache, window=Window.random)
    pairs = list(zip(itertools.chain(*with_start), itertools.chain(*drawn), strict=True))
    same = [torch.equal(a[0], b[0]) for one, other in pairs for a, b in zip(one.latents, other.latents, strict=True)]
    assert 2 < sum(same) < len(same) - 2


def test_a_cache_without_some_clips_is_refused(index, tmp_path):
    with LatentWriter(tmp_path / "cache", **{**IDENTITY, "data_hash": index.hash}) as writer:
        writer.write("clip-000", SHAPES[0], 0.0, torch.zeros(4, 3, 4, 4), torch.zeros(4, 3, 4, 4))
    cache = LatentCache.load(tmp_path / "cache", **{**IDENTITY, "data_hash": index.hash})
    plan = make_plan(index, clips_per_step=4)
    with pytest.raises(ValueError, match=r"lacks 11 of 12 clips, e\.g\. clip-001"):
        CachedClips(index, {"": cache}, Window.start, 0).check_covers(plan)


def test_random_crops_are_refused_because_the_cache_holds_the_centre(index, cache):
    with pytest.raises(ValueError, match=r"data\.crop=random"):
        rows(index, cache, crop=Crop.random)


def test_the_shards_are_ordinary_webdataset_tars(cache):
    (shard,) = cache.folder.glob("*.tar")
    with tarfile.open(shard) as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}
    assert len(members) == 11
    tensors = load(members["clip-000--9x32x32--000000000000.safetensors"])
    torch.testing.assert_close(tensors["mean"], read(cache, "clip-000")[0])


def test_changed_bytes_are_noticed(index, tmp_path):
    cache, _ = cached(index, tmp_path / "cache")
    (shard,) = cache.folder.glob("*.tar")
    content = bytearray(shard.read_bytes())
    member = cache.find("clip-003", SHAPES[0]).member
    content[member.offset + member.size - 3] ^= 4
    shard.write_bytes(content)
    with pytest.raises(DamagedSample, match=r"clip-003.*checksum"):
        read(cache, "clip-003")
    read(cache, "clip-004")
    shard.write_bytes(content[:-512])
    with pytest.raises(ValueError, match=f"{shard.name} has .* bytes, not"):
        LatentCache.load(cache.folder, vae_hash="abc", data_hash=index.hash, shapes=SHAPES, fps=8.0)


def test_an_interrupted_cache_is_none(tmp_path):
    def interrupted():
        with LatentWriter(tmp_path / "cache", **IDENTITY) as writer:
            writer.write("clip", SHAPES[0], 0.0, torch.zeros(4, 3, 4, 4), torch.zeros(4, 3, 4, 4))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"no latents\.json"):
        LatentCache.load(tmp_path / "cache", **IDENTITY)


def test_latents_of_other_sizes_than_the_shape_gives_are_refused(tmp_path):
    with LatentWriter(tmp_path / "cache", **IDENTITY) as writer:
        writer.write("one", SHAPES[0], 0.0, torch.zeros(4, 3, 4, 4), torch.zeros(4, 3, 4, 4))
        with pytest.raises(ValueError, match="key=two"):
            writer.write("two", SHAPES[0], 0.0, torch.zeros(4, 2, 4, 4), torch.zeros(4, 2, 4, 4))
        with pytest.raises(ValueError, match="key=two"):
            writer.write("two", SHAPES[0], 0.0, torch.zeros(4, 3, 4, 4), torch.zeros(4, 1, 4, 4))


def test_mean_and_log_variance_may_be_one_tensor(tmp_path):
    both = torch.ones(4, 3, 4, 4)
    with LatentWriter(tmp_path / "cache", **IDENTITY) as writer:
        writer.write("one", SHAPES[0], 0.0, both, both)
    mean, logvar = read(LatentCache.load(tmp_path / "cache", **IDENTITY), "one")
    assert torch.equal(mean, both)
    assert torch.equal(logvar, both)


def test_a_cache_survives_pickling_for_spawned_workers(cache):
    read(cache, "clip-000")
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(read(again, "clip-000")[0], read(cache, "clip-000")[0])


def test_reading_latents_is_fast(cache):
    began = time.process_time()
    for _ in range(500):
        read(cache, "clip-000")
    assert 500 / (time.process_time() - began) > 2000

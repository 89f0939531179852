"""Shards behind a real nginx and a real S3 server, with trouble in between: the same packs as from disk."""

import shutil
import sys

import pytest
import torch

from kinema.data.dataset.shards import DamagedSample, DatasetIndex, read_member
from kinema.data.packs.loading import make_loader
from kinema.data.storage.place import resolve_folder
from kinema.data.storage.remote import StorageConfig
from kinema.data.storage.store import StoreDown
from tests.servers import faulty_proxy, nginx, s3_server
from tests.unit.clips import SHAPES, build, make_plan

CLIPS = 24
QUICK = StorageConfig(retries=6, backoff_seconds=0.02, connect_timeout_seconds=2, timeout_seconds=0.5, cache_gib=0.01)
TROUBLE = {"reset": 0.1, "stall": 0.05, "short": 0.1, "503": 0.1, "429": 0.05}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return build(tmp_path_factory.mktemp("served") / "set", CLIPS)


@pytest.fixture(scope="module")
def port(local, tmp_path_factory):
    with nginx(local.folder.parent, tmp_path_factory.mktemp("nginx")) as port:
        yield port


def packs_of(index, steps=8, **options):
    loader = make_loader(index, make_plan(index, shapes=SHAPES[:1]), [0, 1], 0, steps, fps=8, seed=0, **options)
    return [pack for row in loader for pack in row]


def remote_index(address, tmp_path, settings=QUICK):
    return DatasetIndex.load(resolve_folder(address, tmp_path / "cache", settings), "train")


def assert_equal_packs(actual, expected):
    for pack, clean in zip(actual, expected, strict=True):
        assert (pack.keys, pack.failures, pack.positions) == (clean.keys, clean.failures, clean.positions)
        assert torch.equal(pack.weights, clean.weights)
        assert all(map(torch.equal, pack.frames, clean.frames))


@pytest.mark.parametrize("workers", [0, 2])
def test_resets_stalls_and_5xx_change_nothing_that_is_read(local, port, tmp_path, workers):
    with faulty_proxy(port, TROUBLE, seed=workers) as proxy:
        index = remote_index(f"http://127.0.0.1:{proxy.port}/set", tmp_path)
        packs = packs_of(index, num_workers=workers)
        assert_equal_packs(packs, packs_of(local))
        counts = {name: sum(pack.storage[name] for pack in packs) for name in packs[0].storage}
        assert set(proxy.injected) == {*TROUBLE, "none"}
    assert counts["storage_retries"] > 0
    assert counts["storage_cache_hits"] + counts["storage_cache_misses"] == 8 * 4
    # The second epoch comes from the disk, but for what two workers are at together.
    assert CLIPS <= counts["storage_cache_misses"] <= CLIPS + 4 * workers
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_a_store_that_is_down_stops_the_run_and_blames_no_clip(port, tmp_path):
    settings = StorageConfig(retries=1, backoff_seconds=0.01, timeout_seconds=0.5, cache_gib=0)
    with faulty_proxy(port, {}) as proxy:
        index = remote_index(f"http://user:geheim@127.0.0.1:{proxy.port}/set?token=geheim2", tmp_path, settings)
        proxy.down = True
        for workers in (0, 1):
            with pytest.raises(StoreDown, match="does not answer any more") as raised:
                packs_of(index, num_workers=workers)
            assert "geheim" not in str(raised.value)
        with pytest.raises(StoreDown, match=r"dataset\.json cannot be read there"):
            remote_index(f"http://127.0.0.1:{proxy.port}/set", tmp_path, settings)


def test_a_shard_that_vanished_costs_its_clips_only(local, tmp_path):
    shutil.copytree(local.folder, tmp_path / "www" / "set")
    with nginx(tmp_path / "www", tmp_path / "nginx") as port:
        index = remote_index(f"http://127.0.0.1:{port}/set", tmp_path)
        (tmp_path / "www" / "set" / "clips-000002.tar").unlink()
        packs = packs_of(index, steps=6)
    failures = [failure for pack in packs for failure in pack.failures]
    assert {failure.key for failure in failures} == {f"clip-{number:03d}" for number in range(8, 12)}
    assert all("cannot be read: FileNotFoundError http" in failure.reason for failure in failures)


def test_bytes_that_changed_at_the_server_are_a_damaged_clip(local, tmp_path):
    shutil.copytree(local.folder, tmp_path / "www" / "set")
    with nginx(tmp_path / "www", tmp_path / "nginx") as port:
        index = remote_index(f"http://127.0.0.1:{port}/set", tmp_path)
        entry = index.entries[0]
        with (tmp_path / "www" / "set" / entry.shard).open("r+b") as shard:
            shard.seek(entry.members["mp4"].offset + 5)
            shard.write(b"XXXX")
        with pytest.raises(DamagedSample, match=r"\.mp4 has another checksum .*changed \(tried 7 times\)$"):
            read_member(index.folder, entry, "mp4")
        assert index.folder.store.take_counts()["storage_retries"] == 6


def test_a_server_without_ranges_is_refused(port, local, tmp_path):
    with nginx(local.folder.parent, tmp_path / "nginx", rules="max_ranges 0;") as bare:
        with pytest.raises(ValueError, match="no range requests"):
            remote_index(f"http://127.0.0.1:{bare}/set", tmp_path)
        with pytest.raises(ValueError, match=r"dataset\.json cannot be read there"):
            remote_index(f"http://127.0.0.1:{bare}/nowhere", tmp_path)


def test_shards_in_s3_are_read_as_from_disk(local, tmp_path):
    import boto3

    with s3_server("videos") as endpoint:
        client = boto3.client("s3")
        for path in local.folder.iterdir():
            client.upload_file(str(path), "videos", f"sets/set/{path.name}")
        trouble = {"503": 0.1, "reset": 0.1, "short": 0.1}
        with faulty_proxy(int(endpoint.rpartition(":")[2]), trouble) as proxy, pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
            index = remote_index("s3://videos/sets/set", tmp_path)
            packs = packs_of(index, num_workers=1)
        assert_equal_packs(packs, packs_of(local))
        assert sum(pack.storage["storage_retries"] for pack in packs) > 0
        with pytest.raises(ValueError, match=r"dataset\.json cannot be read there"):
            remote_index("s3://videos/sets/other", tmp_path)
    assert "aiobotocore" in sys.modules

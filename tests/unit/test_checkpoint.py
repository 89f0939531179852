"""A checkpoint is whole or it is not there; damage is found, named, and stepped around."""

import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import zlib
from pathlib import Path

import pytest
import torch

from kinema.training.checkpoints import store as checkpoint
from kinema.training.checkpoints.store import CheckpointError, CheckpointStore, json_writer, tensor_writer, verify


def save(store: CheckpointStore, step: int) -> Path:
    tensors = {"weight": torch.full((64,), float(step)), "bias": torch.arange(8.0)}
    writers = {"model.safetensors": tensor_writer(tensors), "training.json": json_writer({"step": step})}
    return store.publish(step, writers).folder


def test_tensors_and_documents_come_back_as_they_were(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 3)
    found = store.newest()
    assert found is not None
    assert found.step == 3
    assert found.document("training") == {"step": 3}
    assert torch.equal(found.tensors("model")["weight"], torch.full((64,), 3.0))
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000003\n"


def test_every_flipped_byte_and_every_cut_is_found(tmp_path):
    folder = save(CheckpointStore(tmp_path), 1)
    generator = random.Random(0)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        places = range(len(content)) if len(content) < 300 else generator.sample(range(len(content)), 100)
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= 1 << generator.randrange(8)
            path.write_bytes(damaged)
            if path.name == "seal.json" and _same_json(bytes(damaged), content):
                continue  # white space is no damage
            assert verify(folder) is not None, (path.name, place)
        for size in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            if path.name == "seal.json" and _same_json(content[:size], content):
                continue
            assert verify(folder) is not None, (path.name, size)
        path.unlink()
        assert verify(folder) is not None
        path.write_bytes(content)
    assert verify(folder) is None


def _same_json(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_newest_falls_back_past_damage_and_says_so(tmp_path):
    store, lines = CheckpointStore(tmp_path), []
    for step in (1, 2, 3):
        save(store, step)
    (tmp_path / "checkpoints/step-00000003/model.safetensors").write_bytes(b"short")
    found = store.newest(report=lines.append)
    assert found is not None
    assert found.step == 2
    assert len(lines) == 1
    assert "step-00000003" in lines[0]
    assert "5 bytes" in lines[0]


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_from_zero(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        (save(store, step) / "seal.json").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint of this run is damaged[\s\S]*step-00000001"):
        store.newest()


def test_a_failed_write_leaves_nothing_behind_and_harms_no_other(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)

    def full_disk(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        store.publish(2, {"model.safetensors": full_disk})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]
    assert verify(tmp_path / "checkpoints/step-00000001") is None


def test_rotation_keeps_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        save(store, step)
    assert store.steps() == [3, 4]


def as_format(folder: Path, version: int) -> None:
    """The same files under a seal of another version."""
    content = json.loads((folder / "seal.json").read_text())
    del content["crc32"]
    content["format_version"] = version
    content["crc32"] = zlib.crc32(json.dumps(content).encode())
    (folder / "seal.json").write_text(json.dumps(content))


def test_version_1_is_read_and_a_later_one_refused_by_its_number(tmp_path):
    folder = save(CheckpointStore(tmp_path), 1)
    as_format(folder, 1)
    found = CheckpointStore(tmp_path).newest()
    assert found is not None
    assert torch.equal(found.tensors("model")["weight"], torch.full((64,), 1.0))
    as_format(folder, 3)
    assert "format version 3" in (verify(folder) or "")


TENSORS = {"w": torch.full((1000,), 2.0)}


def publish_until_killed(run: Path, point: int) -> None:
    """In a child process: save step 2, and die by SIGKILL at the call number `point` that touches the disk."""
    calls = itertools.count(1)

    def killing(function):
        def wrapped(*arguments, **named):
            if next(calls) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return wrapped

    for name in ("fsync", "write_json", "crc32", "replace_text"):
        setattr(checkpoint, name, killing(getattr(checkpoint, name)))
    checkpoint.os.rename, checkpoint.os.replace = killing(os.rename), killing(os.replace)
    checkpoint.shutil.rmtree = killing(shutil.rmtree)
    store = CheckpointStore(run, keep=1)
    store.publish(2, {"model.safetensors": tensor_writer(TENSORS), "training.json": json_writer({"step": 2})})


def test_a_kill_at_any_point_of_a_save_leaves_a_whole_newest_checkpoint(tmp_path):
    hit, exitcode, found = 0, -signal.SIGKILL, None
    while exitcode == -signal.SIGKILL:  # every call that touches the disk, in turn, until the save survives
        run = tmp_path / f"run{hit}"
        save(CheckpointStore(run), 1)
        child = multiprocessing.get_context("fork").Process(target=publish_until_killed, args=(run, hit + 1))
        child.start()
        child.join()
        exitcode = child.exitcode
        found = CheckpointStore(run).newest()
        assert found is not None
        assert found.document("training")["step"] == found.step
        assert found.step in (1, 2)
        hit += 1
    assert exitcode == 0
    assert hit > 12  # S78
    assert found.step == 2


def test_tensors_that_do_not_fit_are_an_oserror_and_harm_no_earlier_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # the kernel refuses, as a full disk does
    try:
        with pytest.raises(OSError, match=r"model\.safetensors"):
            store.publish(2, {"model.safetensors": tensor_writer({"w": torch.zeros(100_000)})})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.steps() == [1]
    assert verify(tmp_path / "checkpoints/step-00000001") is None

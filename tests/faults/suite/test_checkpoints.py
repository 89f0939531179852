"""Checkpoints that are damaged, missing, or cannot be written: the newest whole one is used, never a wrong one."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kinema.training.checkpoints.store import SEAL
from tests.end_to_end.commands import checkpoint
from tests.faults.suite.harm import Harm
from tests.faults.suite.scene import EVERY, KILLED, MOST_LOST, STEPS, Shown, said

pytestmark = pytest.mark.faults

FILES = 4
"""Files of tensors in a checkpoint."""
LAST = 6
"""The newest checkpoint of the run that is damaged; the one before it is two steps older."""


def largest(folder: Path) -> Path:
    """The file with most bytes in it: tensors."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(folder: Path) -> None:
    path = largest(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(folder: Path) -> None:
    os.truncate(largest(folder), largest(folder).stat().st_size - 1)


def flip_seal(folder: Path) -> None:
    (folder / SEAL).write_text((folder / SEAL).read_text().replace('"step": 6', '"step": 4'))


def take_from_older(folder: Path) -> None:
    path = largest(folder)
    shutil.copyfile(checkpoint_before(folder) / path.relative_to(folder), path)


def rename_older(folder: Path) -> None:
    """The folder of step 6 holds what was written at step 4, whole."""
    shutil.rmtree(folder)
    shutil.copytree(checkpoint_before(folder), folder)


def pickle_inside(folder: Path) -> None:
    import pickle

    largest(folder).write_bytes(pickle.dumps({"weights": 1}))


def checkpoint_before(folder: Path) -> Path:
    return folder.with_name(f"step-{LAST - EVERY:08d}")


DAMAGES: list[tuple[str, str, Callable[[Path], object]]] = [
    ("B4", "a file of the newest checkpoint is missing", lambda folder: largest(folder).unlink()),
    ("B5", "a file of the newest checkpoint is cut by one byte", cut),
    ("B5", "a file of the newest checkpoint is empty", lambda folder: largest(folder).write_bytes(b"")),
    ("B6", "one bit of the newest checkpoint has flipped", flip),
    ("B7", "a file of the newest checkpoint comes from an older one", take_from_older),
    ("B7", "the folder of the newest checkpoint holds an older one", rename_older),
    ("B8", "the seal of the newest checkpoint has changed", flip_seal),
    ("B8", "the seal of the newest checkpoint is missing", lambda folder: (folder / SEAL).unlink()),
    ("B26", "a pickle lies in place of the newest checkpoint's tensors", pickle_inside),
]


@pytest.mark.parametrize(("number", "fault", "damage"), DAMAGES, ids=[row[1] for row in DAMAGES])
def test_a_damaged_checkpoint_is_found_and_the_one_before_it_used(scene, show, number, fault, damage):
    name = f"damaged-{[row[1] for row in DAMAGES].index(fault)}"
    scene.copy_of_whole(name, LAST)
    damage(checkpoint(scene.folder, name, LAST))
    job = scene.finish(scene.start(name))
    assert "resume: from step-00000004" in job.output
    scene.check_as_undisturbed(name)
    show(number, fault, Shown(said(job, "skipped a damaged checkpoint"), "-", None, EVERY))


ELSEWHERE = "../../../vae/checkpoints/step-00000002"
LATEST: list[tuple[str, str, Callable[[Path], object]]] = [
    ("B1", "`latest` is missing", lambda path: path.unlink()),
    ("B2", "`latest` is empty", lambda path: path.write_bytes(b"")),
    ("B2", "`latest` holds zero bytes", lambda path: path.write_bytes(b"\0" * 20)),
    (
        "B3",
        "`latest` points out of the run folder",
        lambda path: path.write_text("../../../vae/checkpoints/step-00000002\n"),
    ),
]


@pytest.mark.parametrize(("number", "fault", "damage"), LATEST, ids=[row[1] for row in LATEST])
def test_the_pointer_is_only_a_hint_for_people(scene, show, number, fault, damage):
    name = f"latest-{[row[1] for row in LATEST].index(fault)}"
    damage(scene.copy_of_whole(name, LAST) / "checkpoints" / "latest")
    job = scene.finish(scene.start(name))
    scene.check_as_undisturbed(name)
    show(number, fault, Shown(said(job, "resume: from step-00000006"), "-", None, 0))


def test_a_run_without_one_whole_checkpoint_does_not_start_from_zero(scene, show):
    name = "hopeless"
    scene.copy_of_whole(name)
    for step in scene.store(name).steps():
        flip(checkpoint(scene.folder, name, step))
    job = scene.finish(scene.start(name), 66)
    show(
        "B9", "every checkpoint of a run is damaged", Shown(said(job, "every checkpoint of this run is damaged"), "66")
    )


def test_a_full_disk_costs_a_save_and_nothing_else(scene, show):
    name = "full"
    job = scene.start(name, harm=Harm("os:fsync", "disk full", after=4))
    scene.finish(job)
    scene.check_as_undisturbed(name)
    show("B10", "the disk is full at one save", Shown(said(job, "checkpoint failed"), "-", None, 0))


def test_a_disk_that_stays_full_ends_the_run_with_what_was_saved(scene, show):
    name = "full-for-good"
    job = scene.start(
        name, harm=Harm("kinema.training.checkpoints.save:write_pieces", "disk full", FILES + 1, times=10_000)
    )
    scene.finish(job, 74)
    assert scene.store(name).steps() == [EVERY]
    recovery, lost = scene.continues(name)
    show("B10", "the disk stays full", Shown(said(job, "could not be written"), "74", recovery, lost))


def test_an_error_of_the_disk_publishes_nothing(scene, show):
    name = "disk-error"
    job = scene.start(name, harm=Harm("os:fsync", "input output error", 3, after=4))
    scene.finish(job)
    scene.check_as_undisturbed(name)
    show(
        "B12", "the disk reports an error while a save is flushed", Shown(said(job, "checkpoint failed"), "-", None, 0)
    )


@pytest.mark.parametrize("nth", [1, 4, 9])
def test_a_kill_inside_a_save_leaves_the_one_before(scene, show, nth):
    name = f"killed-saving-{nth}"
    job = scene.start(name, harm=Harm("os:fsync", "kill", nth, after=8))
    assert job.wait() == [-9]
    recovery, lost = scene.continues(name)
    assert lost <= MOST_LOST
    show(
        "A2",
        f"kill -9 inside a save, before flush {nth} of the second",
        Shown(KILLED, "-9", recovery, lost),
    )


def test_a_small_file_system_fills_up(scene, show, tmp_path):
    """A real one: a tmpfs that holds one checkpoint and a half."""
    name, place = "small-disk", scene.run("small-disk") / "checkpoints"
    size = sum(
        path.stat().st_size for path in checkpoint(scene.folder, scene.whole(), STEPS).rglob("*") if path.is_file()
    )
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", str(place)], check=True)
    try:
        job = scene.finish(scene.start(name), 74)
        assert scene.store(name).newest().step == 2
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
    show("B10", "a file system too small for a second checkpoint", Shown(said(job, "checkpoint failed.*1 of 3"), "74"))


def test_another_model_is_refused_by_name_of_the_tensor(scene, show):
    name = "other-model"
    scene.copy_of_whole(name, LAST)
    job = scene.start(name, "model.width=48", "model.rope_axes=[12,6,6]", "allow_config_change=true")
    scene.finish(job, 64)
    assert scene.store(name).newest().step == LAST
    show(
        "B21", "the model of the configuration is not that of the checkpoint", Shown(said(job, "another model's"), "64")
    )


def test_other_data_are_refused(scene, show):
    name = "other-data"
    scene.copy_of_whole(name, LAST)
    clips = ["--clips", "32", "--heldout", "4", "--sizes", "64x64", "--seed", "7"]
    scene.finish(
        scene.warm.start(["data_prep/toy.py", "--out", f"{scene.folder}/toy2", *clips], scene.folder / "2.log")
    )
    job = scene.finish(scene.start(name, f"data.path={scene.folder}/toy2", "allow_config_change=true"), 64)
    show("B22", "the data set is not the one that the run began with", Shown(said(job, "error: .*data"), "64"))


def test_a_newer_format_is_named(scene, show):
    name = "newer"
    scene.copy_of_whole(name)
    for step in scene.store(name).steps():
        _as_format(checkpoint(scene.folder, name, step) / SEAL, 99)
    job = scene.finish(scene.start(name), 66)
    show("B23", "a checkpoint of a newer Kinema", Shown(said(job, "format version 99"), "66"))


def test_the_sampler_reads_a_run_that_is_being_trained(scene, show):
    name = "sampled"
    job = scene.start(name, harm=Harm("kinema.distributed.engine:Engine.step", "slow", times=1000))
    scene.wait_for_step(job, name, 3)
    sampler = ["sample.py", f"run={scene.run(name)}", "prompt=a small red circle moves slowly left", "num_steps=2",
               "guidance_scale=2", "shape=[5,32,32]", f"out={scene.folder}/sampled"]  # fmt: skip
    for _ in range(2):
        scene.finish(scene.warm.start(sampler, scene.folder / "sample.log"))
    assert job.running()
    scene.finish(job)
    scene.check_as_undisturbed(name)
    show("B28", "the sampler reads while the run writes", Shown("a video of the newest published checkpoint", "-"))


def _as_format(seal: Path, version: int) -> None:
    import zlib

    content = json.loads(seal.read_text())
    content.pop("crc32")
    content["format_version"] = version
    content["crc32"] = zlib.crc32(json.dumps(content).encode())
    seal.write_text(json.dumps(content, indent=1) + "\n")

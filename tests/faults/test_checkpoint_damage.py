"""Damage to the checkpoint of several ranks, drawn at random: every one is found, and the newest whole one is used."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from kinema.training.checkpoints.store import SEAL, CheckpointStore, json_writer, tensor_writer
from kinema.training.verbs.convert import convert

RANKS = 3


def tensors(step):
    draw = torch.Generator().manual_seed(step)
    return {"w": torch.randn(9, 7, generator=draw), "b": torch.randn(5, generator=draw)}


@pytest.fixture(name="run")
def make_run(tmp_path):
    """A run with the checkpoints of steps 1 and 2, each in the parts of three ranks."""
    run = tmp_path / "run"
    for step in (1, 2):
        alone, split = CheckpointStore(tmp_path / f"alone{step}"), tmp_path / f"split{step}"
        manifest = {"task": "dit", "fingerprints": {}}
        writers = {f"{name}.safetensors": tensor_writer(tensors(step)) for name in ("model", "ema", "optimizer")}
        documents = {"training.json": json_writer({"step": step}), "manifest.json": json_writer(manifest)}
        made = convert(alone.publish(step, {**writers, **documents}), split, ranks=RANKS)
        shutil.copytree(made, run / "checkpoints" / made.name)
    return run


def flip(path: Path, folder: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, folder: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def extend(path: Path, folder: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 20)))


def blank(path: Path, folder: Path, draw: random.Random) -> None:
    """A block that never reached the disk."""
    content = bytearray(path.read_bytes())
    first = draw.randrange(len(content))
    content[first : first + 64] = bytes(len(content[first : first + 64]))
    path.write_bytes(content)


def miss(path: Path, folder: Path, draw: random.Random) -> None:
    path.unlink()


def swap(path: Path, folder: Path, draw: random.Random) -> None:
    """Two files have changed places."""
    other = draw.choice([one for one in sorted(folder.iterdir()) if one != path])
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def stale(path: Path, folder: Path, draw: random.Random) -> None:
    """One rank's file is of an earlier save."""
    shutil.copyfile(folder.with_name("step-00000001") / path.name, path)


def mixed(path: Path, folder: Path, draw: random.Random) -> None:
    """All of one rank's files are of an earlier save."""
    rank = draw.randint(1, RANKS)
    for one in folder.glob(f"*-{rank:05d}-of-*"):
        shutil.copyfile(folder.with_name("step-00000001") / one.name, one)


KINDS = (flip, cut, extend, blank, miss, swap, stale, mixed)


def damage(run: Path, number: int, draw: random.Random) -> str:
    """Damage step 2 in one way; its kind, or "harmless" if no byte that counts has changed."""
    folder = run / "checkpoints/step-00000002"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    kind = KINDS[number % len(KINDS)]
    kind(draw.choice(sorted(folder.iterdir())), folder, draw)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    same_seal = SEAL in after and same_json(before.pop(SEAL), after.pop(SEAL))
    return "harmless" if same_seal and before == after else kind.__name__


def same_json(a: bytes, b: bytes) -> bool:
    """White space is no damage."""
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def find_all(run: Path, mutations: int) -> Counter:
    """Damage the newest checkpoint again and again; how often each kind was found."""
    store, draw, found = CheckpointStore(run), random.Random(0), Counter()
    newest = store.at(2).folder
    kept = run.parent / "kept"
    shutil.copytree(newest, kept)
    for number in range(mutations):
        kind, told = damage(run, number, draw), []
        used = store.newest(told.append)
        assert used is not None
        assert used.step == (2 if kind == "harmless" else 1), (number, kind)
        assert len(told) == (kind != "harmless")
        for name in ("model", "ema", "optimizer"):
            read = used.tensors(name)
            assert all(torch.equal(read[key], value) for key, value in tensors(used.step).items()), (number, kind)
        found[kind] += 1
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)
    return found


def test_every_kind_of_damage_is_found_and_the_checkpoint_before_is_used(run):
    found = find_all(run, 160)
    assert set(found) >= {kind.__name__ for kind in KINDS}


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_five_thousand_mutations(run):
    found = find_all(run, 5000)
    print(f"{sum(found.values())} mutations, none used: {dict(sorted(found.items()))}")

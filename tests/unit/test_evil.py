"""Files and addresses made to run code when they are read: none does, however well they are sealed."""

import io
import json
import os
import pickle
import sys
from contextlib import suppress

import pytest
import torch

from kinema.data.config import DataConfig
from kinema.data.dataset.mixture import SourceConfig
from kinema.data.dataset.shards import DatasetIndex
from kinema.data.packs.latents import LatentCache
from kinema.data.storage.address import Address
from kinema.data.storage.place import StorageConfig, resolve_cache
from kinema.training.checkpoints.store import CheckpointStore

FOUND: list[tuple] = []
sys.addaudithook(lambda event, arguments: FOUND.append(arguments) if event == "pickle.find_class" else None)


class Bomb:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (os.system, (f"touch {self.canary}",))


def payloads(canary):
    zipped = io.BytesIO()
    torch.save({"weight": Bomb(canary)}, zipped)
    header = json.dumps({"__metadata__": {"format": "pt", "_target_": "os.system"}}).encode()
    return {
        "pickle": pickle.dumps(Bomb(canary)),
        "torch file": zipped.getvalue(),
        "old pickle": pickle.dumps(Bomb(canary), protocol=0),
        "safetensors with a pickle behind it": len(header).to_bytes(8, "little") + header + pickle.dumps(Bomb(canary)),
        "yaml": f"!!python/object/apply:os.system ['touch {canary}']".encode(),
        "target": json.dumps({"_target_": "os.system", "_args_": [f"touch {canary}"]}).encode(),
    }


def read_all(found):
    for name in ("model", "ema", "optimizer"):
        with suppress(Exception):
            found.tensors(name)
    for name in ("training", "manifest"):
        with suppress(Exception):
            found.document(name)


NAMES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "training.json", "manifest.json",
         "config.yaml", "seen.safetensors")  # fmt: skip


@pytest.mark.parametrize("kind", sorted(payloads("x")))
def test_a_sealed_checkpoint_of_evil_files_runs_nothing(tmp_path, kind):
    canary, evil = tmp_path / "canary", payloads(tmp_path / "canary")[kind]
    FOUND.clear()
    store = CheckpointStore(tmp_path)
    found = store.publish(1, {name: lambda path: path.write_bytes(evil) for name in NAMES})
    assert store.newest() is not None, "its seal is right, so it is opened"
    read_all(found)
    assert not canary.exists()
    assert FOUND == []


KNOWN = {"vae_hash": "v", "data_hash": "d", "shapes": [], "fps": 8.0}


@pytest.mark.parametrize("kind", sorted(payloads("x")))
def test_evil_indexes_and_caches_run_nothing(tmp_path, kind):
    canary = tmp_path / "canary"
    for name in ("dataset.json", "latents.json", "a.index.json", "a.tar", "a.npz"):
        (tmp_path / name).write_bytes(payloads(canary)[kind])
    FOUND.clear()
    for read in (lambda: DatasetIndex.load(tmp_path), lambda: LatentCache.load(tmp_path, **KNOWN)):
        with suppress(Exception):
            read()
    assert not canary.exists()
    assert FOUND == []


def test_the_hook_would_have_seen_it(tmp_path):
    FOUND.clear()
    pickle.loads(payloads(tmp_path / "canary")["pickle"])
    assert (tmp_path / "canary").exists()
    assert FOUND


def test_an_address_that_runs_a_command_is_refused(tmp_path):
    for address in (f"pipe:touch {tmp_path}/canary", f"pipe://touch {tmp_path}/canary", "exec:touch x"):
        with pytest.raises(ValueError, match=r"data\.path="):
            Address.parse(address)
        with pytest.raises(ValueError, match=r"data\.latents=.* must be a folder, or begin with one of file, http"):
            resolve_cache(address, "latents.json", tmp_path, StorageConfig(), "data.latents")
        with pytest.raises(ValueError, match=r"data\.mixture\.two\.path="):
            DataConfig(mixture={"two": SourceConfig(path=address)})
    assert not (tmp_path / "canary").exists()

"""One folder a run, shared by all ranks and found again by the same command; and trained VAEs in other runs."""

import enum
import fcntl
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from kinema.data.account.rights import RightsPolicy
from kinema.identity import digest, fingerprint, fingerprint_like, from_plain
from kinema.models.vae import CausalVAE, VAEConfig
from kinema.training.checkpoints.store import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    json_writer,
    link_writer,
    replace_text,
    tensor_writer,
)
from kinema.training.finetune import LoRA, assign, trained_parameters

RIGHTS = "rights.json"


class Weights(enum.Enum):
    """Which of a checkpoint's two sets of weights."""

    ema = "ema"
    raw = "raw"


@dataclass
class VAECheckpoint:
    """A trained VAE: the newest checkpoint of a `task=vae` run."""

    path: str = "runs/vae"
    """Its run folder."""
    weights: Weights = Weights.ema
    """ema or raw."""


def open_run_folder(run_dir: Path) -> TextIO:
    """Create the folder and lock it for this job; a second job on the same folder is refused."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("w")
    except OSError as error:
        raise ValueError(
            f"run_root={run_dir.parent}: no run can be written there ({error}). Type a folder that this user may "
            "write to."
        ) from None
    try:
        # A POSIX lock dies with this process; flock would live on in data workers that outlast a killed parent.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(
            f"name={run_dir.name}: another job is writing {run_dir}. Stop it, or choose another name."
        ) from None
    return lock


def check_changes(run_dir: Path, differences: list[str], allowed: bool) -> None:
    """Refuse a configuration that would make other numbers than the run began with.

    `differences` are those to the stored one, as `changed_keys` lists them.
    """
    if differences and not allowed:
        raise ValueError(
            f"name={run_dir.name}: this run began with another configuration ({'; '.join(differences)}). Choose "
            f"another name for a new run, or allow_config_change=true to continue with these changes."
        )


def keep_config(run_dir: Path, config_yaml: str) -> None:
    """Put the configuration beside a run that goes on with it."""
    replace_text(run_dir / "config.yaml", config_yaml)


def rights_of_plan(run_dir: Path, now: RightsPolicy, began: bool) -> RightsPolicy:
    """The policy that the plan of a run was made with, that of its first start: a plan never changes under a run."""
    path = run_dir / RIGHTS
    if began and path.exists():
        return RightsPolicy.from_dict(json.loads(path.read_text()))
    replace_text(path, json.dumps(now.to_dict(), indent=1) + "\n")
    return now


def remove_refused(run_dir: Path) -> None:
    """Take away the folder of a run that was refused before it wrote anything of its own."""
    written = {path.name for path in run_dir.iterdir()}
    if written <= {".lock", "config.yaml", RIGHTS}:
        shutil.rmtree(run_dir)


def checkpoint_of(path: str, key: str) -> Checkpoint:
    """The checkpoint that a run folder or a checkpoint folder stands for; `key` names the option in errors."""
    folder = Path(path)
    if (folder / "seal.json").exists():
        return CheckpointStore(folder.parent.parent).open(int(folder.name.removeprefix("step-")))
    found = CheckpointStore(folder).newest()
    if found is None:
        raise CheckpointError(f"{key}={path} holds no checkpoint; train one there first, or name another run.")
    return found


def load_vae(checkpoint: Checkpoint, weights: Weights) -> tuple[CausalVAE, dict[str, Any]]:
    """The frozen VAE of a checkpoint and its identity: configuration, fingerprint of the weights, hash of both."""
    manifest = checkpoint.document("manifest")
    if manifest["task"] != "vae":
        raise ValueError(f"vae.path: {checkpoint.folder} holds a {manifest['task']}, not a VAE.")
    vae = CausalVAE(from_plain(manifest["vae"]["config"], VAEConfig))
    tensors = checkpoint.tensors("model" if weights is Weights.raw else "ema")
    if fingerprint_like(mark := manifest["fingerprints"][weights.value], tensors) != mark:
        raise ValueError(f"{checkpoint.folder}: the weights are not those that its manifest names.")
    vae.load_state_dict(tensors)
    identity = {
        "config": manifest["vae"]["config"],
        "looks_ahead": vae.config.looks_ahead(),
        "weights": weights.value,
        "fingerprint": fingerprint(tensors),
        "hash": digest([manifest["vae"]["config"], fingerprint(tensors)]),
    }
    return vae.eval().requires_grad_(False), identity


def carry_vae(run_dir: Path, source: Checkpoint, weights: Weights) -> None:
    """Publish the VAE's weights inside the run, so that the run folder alone can be sampled anywhere."""
    store = CheckpointStore(run_dir / "vae")
    if source.step in store.steps():
        return
    name = "model" if weights is Weights.raw else "ema"
    writers = {
        f"{name}.safetensors": tensor_writer(source.tensors(name)),
        "manifest.json": json_writer(source.document("manifest")),
    }
    store.publish(source.step, writers)


def carry_base(run_dir: Path, init_from: str) -> None:
    """Publish the base inside a run of adapters, so that the run folder is complete; a link on the same disk."""
    store = CheckpointStore(run_dir / "base")
    if store.steps():
        return
    source = unadapted(init_from)
    links = {path.name: link_writer(path) for path in source.files("ema")}
    store.publish(source.step, {**links, "manifest.json": json_writer(source.document("manifest"))})


def unadapted(init_from: str) -> Checkpoint:
    """The checkpoint that a run starts from; ValueError for adapters, which are not weights of a whole model."""
    source = checkpoint_of(init_from, "init_from")
    if is_adapted(source.document("manifest")):
        raise ValueError(
            f"init_from={init_from} holds adapters. Merge them into their base first: kinema export {init_from} "
            "--format kinema --to DIR, then init_from=DIR."
        )
    return source


def open_base(run_dir: Path) -> Checkpoint:
    """The base inside a run of adapters."""
    found = CheckpointStore(run_dir / "base").newest()
    if found is None:
        raise ValueError(f"{run_dir / 'base'} is missing: the run folder is not complete.")
    return found


def is_adapted(manifest: dict[str, Any]) -> bool:
    """Whether a checkpoint holds adapters only, and its run their base."""
    return manifest.get("finetune", {}).get("type") == LoRA.__name__


def load_base(module: torch.nn.Module, checkpoint: Checkpoint, manifest: dict[str, Any]) -> None:
    """Give `module` the base of a checkpoint of adapters, and empty adapters; ValueError for another base."""
    base = open_base(checkpoint.folder.parent.parent)
    if (found := load_weights(module, base, Weights.ema, manifest["base"])) != manifest["base"]:
        raise ValueError(
            f"the base in {base.folder} (fingerprint {found}) is not the one that the adapters of {checkpoint.folder} "
            f"were trained on ({manifest['base']})."
        )
    from_plain(manifest["finetune"], LoRA).prepare(module)


def load_weights(module: torch.nn.Module, checkpoint: Checkpoint, weights: Weights, expected: str | None = None) -> str:
    """Give `module` a checkpoint's weights, all of them and no others; returns their fingerprint.

    It is of the kind of the `expected` one, by default the manifest's.

    Of a checkpoint of adapters: first their base, out of the same run, then the adapters, which stay beside it.
    """
    manifest = checkpoint.document("manifest")
    if is_adapted(manifest):
        load_base(module, checkpoint, manifest)
    tensors = checkpoint.tensors("model" if weights is Weights.raw else "ema")
    own = trained_parameters(module) if is_adapted(manifest) else module.state_dict()
    wrong = [k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape]
    if own.keys() != tensors.keys() or wrong:
        missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        raise ValueError(
            f"{checkpoint.folder} is a checkpoint of another model: {len(missing)} weights missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(wrong)} of another shape {wrong[:3]}."
        )
    assign(module, tensors)
    return fingerprint_like(expected or manifest["fingerprints"][weights.value], tensors)

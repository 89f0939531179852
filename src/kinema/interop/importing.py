"""`kinema import`: published weights become a Kinema checkpoint that `init_from`, `vae.path` and `sample.py` take."""

import argparse
import json
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor, nn

from kinema.diffusion.objective import DDPM
from kinema.identity import digest, fingerprint, to_plain
from kinema.interop.folders import published_folder
from kinema.interop.given import carry_image, has_image_encoder
from kinema.interop.inflating import Inflated
from kinema.interop.reading import is_pipeline, read_json
from kinema.interop.recognising import (
    Recognised,
    RecognisedPair,
    known_classes,
    recognise,
    recognise_transformers,
)
from kinema.interop.releases import Release, release_of
from kinema.interop.texts import carry_text, has_text
from kinema.models.dit import AttentionPattern, DiT, Experts
from kinema.models.vae import CausalVAE
from kinema.sampling.sample import geometry_of
from kinema.training.checkpoints.store import CheckpointStore, Writer, json_writer, tensor_writer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument("path", type=Path, help="a diffusers folder, the maker's own folder, or one .safetensors file")
    parser.add_argument("--to", type=Path, required=True, help="the folder to make")
    parser.add_argument("--vae", type=Path, default=None, help="the VAE that belongs to a transformer given alone")
    parser.add_argument(
        "--inflate",
        choices=["full", "factorised", "alternating"],
        default=None,
        help="make a model of videos of an image model, with this attention",
    )
    parser.add_argument("--prefix", default=None, help="part of a single file, for example model.diffusion_model.")


def run(arguments: argparse.Namespace) -> int:
    """Import, and say what came in."""
    attention = None if arguments.inflate is None else AttentionPattern[arguments.inflate]
    for line in import_model(arguments.path, arguments.to, arguments.vae, arguments.prefix, attention):
        print(line)
    return 0


def import_model(
    path: Path,
    to: Path,
    vae: Path | None = None,
    prefix: str | None = None,
    inflate: AttentionPattern | None = None,
) -> list[str]:
    """Write the Kinema checkpoint of a published model into the new folder `to`; returns lines that say what it is.

    Everything is checked on shapes before anything is written, and on any error nothing is left behind. With `inflate`
    an image model becomes one of videos with that attention.
    """
    found = recognise_all(path, vae, prefix)
    if inflate is not None:
        found = replace(found, dit=_inflated(found, inflate))
    place = to.absolute()  # what its files name must be found from any working directory
    with published_folder(to) as aside:
        lines = [*_import_vae(found, aside, place), *_import_dit(found, aside, place)]
    return [*lines, *found.pipeline_lines(), f"READY {to}"]


Transformer = Recognised | RecognisedPair | Inflated


@dataclass(frozen=True)
class Found:
    """What a path holds: a transformer, a VAE, or both."""

    path: Path
    dit: Transformer | None
    vae: Recognised | None
    release: Release | None
    """None for parts, and for pipelines that Kinema cannot sample yet."""
    other_vae: str | None = None
    """Class of a pipeline's VAE that Kinema cannot be; its latents can be sampled."""

    @property
    def can_sample(self) -> bool:
        """Whether all is there that `sample.py` needs."""
        if self.release is None:
            return False
        return has_text(self.path, self.release.text) and has_image_encoder(self.path, self.release.condition)

    def pipeline_lines(self) -> list[str]:
        """What a whole pipeline lacks for sampling, for people."""
        if self.other_vae is not None and self.can_sample:
            return [f"{self.path}/vae: Kinema's VAE cannot be {self.other_vae}; sample.py latents_only=true"]
        if not is_pipeline(self.path) or self.can_sample:
            return []
        missing = "its text or image encoder" if self.release else "a release that Kinema can sample"
        return [f"{self.path} lacks {missing}: its weights can be trained from, not sampled with sample.py"]


def recognise_all(path: Path, vae: Path | None = None, prefix: str | None = None) -> Found:
    """Recognise the models of a pipeline folder, or of a component and the VAE beside it."""
    if not is_pipeline(path):
        first = recognise(path, prefix)
        if isinstance(first.skeleton, CausalVAE):
            if vae is not None:
                raise ValueError(f"--vae {vae}: {path} is itself a VAE ({first.preset.name}). Leave --vae out.")
            return Found(path, None, first, None)
        second = recognise(vae) if vae is not None else None
        if second is not None and not isinstance(second.skeleton, CausalVAE):
            raise ValueError(f"--vae {vae} is a {second.preset.name}, which is no VAE.")
        return Found(path, first, second, None)
    release = release_of(path)
    other = None if vae is not None or release is None or release.strides is None else other_vae(path / "vae")
    found = recognise(vae or path / "vae") if other is None else None
    return Found(path, recognise_transformers(path), found, release, other)


def other_vae(folder: Path) -> str | None:
    """The class of a pipeline's VAE that no preset is of; None for one of ours."""
    name = str(read_json(folder / "config.json").get("_class_name"))
    return None if name in known_classes() else name


def _inflated(found: Found, attention: AttentionPattern) -> Inflated:
    if not isinstance(found.dit, Recognised):
        raise ValueError(f"--inflate {attention.name}: {found.path} holds no single transformer.")
    return Inflated(found.dit, attention)


def _import_vae(found: Found, aside: Path, to: Path) -> list[str]:
    """Publish the VAE: as the folder itself when it comes alone, in `vae/` beside a transformer otherwise."""
    if found.vae is None:
        return []
    tensors, config = found.vae.tensors(), _vae_config(found.vae)
    manifest = {"task": "vae", "vae": _vae_record(found.vae), **_common(found, found.vae, tensors)}
    publish(aside / "vae" if found.dit else aside, tensors, manifest)
    if found.dit is None:
        choices = [{"override /task": "vae"}, {"override /vae": "imported"}]
        write_group(aside, "vae", "causal", config, "The imported VAE; any key of it can be overridden.")
        write_experiment(aside, {"defaults": choices, "init_from": str(to)})
    return [_line(found.vae, tensors)]


def _import_dit(found: Found, aside: Path, to: Path) -> list[str]:
    if found.dit is None:
        return []
    tensors = found.dit.tensors()
    manifest = {**dit_manifest(found), **_common(found, found.dit, tensors)}
    if found.release is not None and found.can_sample:
        manifest["text"] = carry_text(found.path, aside, to, found.release.text)
        manifest |= carry_image(found.path, aside, to, found.release.condition)
    publish(aside, tensors, manifest)
    _write_configs(found, aside, to, manifest)
    return [_line(found.dit, tensors)]


def publish(folder: Path, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
    """One checkpoint of step 0. There is one set of weights, so `model` and `ema` are two names of the same file."""
    writers: dict[str, Writer] = {
        "model.safetensors": tensor_writer(tensors),
        "ema.safetensors": lambda path: path.hardlink_to(path.with_name("model.safetensors")),
        "training.json": json_writer({"step": 0}),
        "manifest.json": json_writer(manifest),
    }
    CheckpointStore(folder).publish(0, writers)


def dit_manifest(found: Found) -> dict[str, Any]:
    """What the sampler and the exporter must know of an imported transformer."""
    assert found.dit is not None
    manifest: dict[str, Any] = {
        "task": "dit",
        "model": model_record(found.dit.skeleton),
        **(found.release.manifest() if found.release else {}),
    }
    if found.other_vae is not None and found.release is not None and found.release.strides is not None:
        manifest["other_vae"] = {"class": found.other_vae, "strides": list(found.release.strides)}
    if found.vae is not None:
        record, mark = _vae_record(found.vae), fingerprint(found.vae.tensors())
        found_hash = digest([record["config"], mark])
        manifest["vae"] = {**record, "weights": "ema", "fingerprint": mark, "hash": found_hash}
        assert isinstance(found.vae.skeleton, CausalVAE)
        manifest["geometry"] = geometry_of(found.vae.skeleton.geometry_strides, found.dit.skeleton.config).describe()
    return manifest


def model_record(model: nn.Module) -> dict[str, Any]:
    """A DiT's configuration and what it is made for, as a manifest holds it."""
    assert isinstance(model, DiT | Experts)
    return {
        "config": to_plain(model.config),
        "latent_channels": model.latent_channels,
        "text_width": model.text_width,
    }


def _vae_config(vae: Recognised) -> dict[str, Any]:
    assert isinstance(vae.skeleton, CausalVAE)
    return to_plain(vae.skeleton.config)


def _vae_record(vae: Recognised) -> dict[str, Any]:
    """What a manifest says of a VAE: its config, and why it is not causal where it is not."""
    assert isinstance(vae.skeleton, CausalVAE)
    return {"config": _vae_config(vae), "looks_ahead": vae.skeleton.config.looks_ahead()}


def _common(found: Found, part: Transformer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    mark = fingerprint(tensors)
    return {
        "format_version": 1,
        "kinema": version("kinema"),
        "name": found.path.resolve().stem,
        "step": 0,
        "fingerprints": {"raw": mark, "ema": mark},
        "published": {
            "preset": part.preset.name,
            "class": part.preset.reference,
            "naming": part.naming,
            "config": json.loads(json.dumps(part.config)),
        },
        "data": {"hash": None, "kept": "published weights: what they were trained on is not known"},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _write_configs(found: Found, aside: Path, to: Path, manifest: dict[str, Any]) -> None:
    """Hydra groups of this model, for `python train.py --config-dir DIR/configs experiment=imported`."""
    assert found.dit is not None
    assert isinstance(found.dit.skeleton, DiT | Experts)
    choices = [{"override /task": "dit"}, {"override /model": "imported"}]
    experiment: dict[str, Any] = {"defaults": choices, "init_from": str(to)}
    model = to_plain(found.dit.skeleton.config)
    write_group(aside, "model", "dit", model, "The imported model; any key of it can be overridden.")
    if found.release is not None:
        choices.append({"override /objective": "imported"})
        objective = to_plain(found.release.objective)
        schema = "ddpm" if isinstance(found.release.objective, DDPM) else "rectified_flow"
        write_group(aside, "objective", schema, objective, "The objective that the release is sampled with.")
        condition = manifest["condition"]
        choices.append({"override /condition": "imported"})
        write_group(aside, "condition", found.release.condition.name, condition, "The frames that the release gives.")
        experiment["task"] = {"samples": _samples(found.release)}
    if (text := manifest.get("text")) is not None:
        choices.append({"override /text": "imported"})
        schema = "pretrained" if text["config"]["type"] == "PretrainedText" else "combined"
        write_group(aside, "text", schema, text["config"], "The text encoder of the release, by its own policy.")
    if found.vae is not None:
        experiment["vae"] = {"path": str(to / "vae")}
    write_experiment(aside, experiment)


def _samples(release: Release) -> dict[str, Any]:
    """`task.samples` of a training that samples as the release does; the seed is the training's own."""
    return {name: value for name, value in to_plain(release.sampling).items() if name not in ("type", "seed")}


def write_group(aside: Path, group: str, schema: str, plain: dict[str, Any], comment: str) -> None:
    """`GROUP=imported` for `train.py --config-dir DIR/configs`."""
    fields = {name: value for name, value in plain.items() if name != "type"}
    path = aside / "configs" / group / "imported.yaml"
    write_yaml(path, {"defaults": [f"schema_{schema}"], **fields}, comment)


def write_experiment(aside: Path, content: dict[str, Any]) -> None:
    """`experiment=imported`: everything that the import knows of a training."""
    comment = "@package _global_\n# Training from the imported weights: give name, data and steps."
    write_yaml(aside / "configs" / "experiment" / "imported.yaml", content, comment)


def write_yaml(path: Path, content: dict[str, Any], comment: str) -> None:
    """One Hydra file with a comment line on top."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {comment}\n{OmegaConf.to_yaml(OmegaConf.create(content))}")


def _line(part: Transformer, tensors: dict[str, Tensor]) -> str:
    published = part.published
    numbers = sum(tensor.numel() for tensor in tensors.values())
    left = f", {published.left_out} tensors of other parts left out" if published.left_out else ""
    return (
        f"{published.path}: {part.preset.name} ({part.preset.reference}, {part.naming} names), "
        f"{len(published.stored)} tensors, {numbers:,} parameters{left}"
    )

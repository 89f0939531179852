"""Modules from paths: a published model, or a run of Kinema's own."""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from kinema.conditioning.frames import FrameCondition
from kinema.diffusion.objective import DDPM, Objective, RectifiedFlow
from kinema.identity import from_plain, to_plain
from kinema.interop.importing import Found, import_model, recognise_all
from kinema.interop.origin import origin_of, remember
from kinema.interop.reading import is_pipeline
from kinema.interop.recognising import recognise
from kinema.models.dit import DiTConfig, Experts, make_denoiser, split_experts
from kinema.models.vae import CausalVAE
from kinema.sampling.pipeline import OtherVAE, Pipeline, SamplingConfig
from kinema.sampling.sample import condition_of, load_pipeline
from kinema.training.checkpoints.store import SEAL, Checkpoint, CheckpointStore
from kinema.training.finetune import adapters_of, base_weights, merged_weights
from kinema.training.run_folder import Weights, checkpoint_of, is_adapted, load_vae, load_weights

Model = tuple[nn.Module, dict[str, Tensor]]
"""A module in float32, with adapters if it was trained so, and its tensors in the types that they were stored in,
with adapters merged into them.
"""


@dataclass(frozen=True)
class Parts:
    """The models of a pipeline that Kinema cannot sample."""

    denoiser: nn.Module
    vae: nn.Module


@dataclass(frozen=True)
class Held:
    """The models that a source holds, `transformer` and `vae`, and what its manifest says of them."""

    models: dict[str, Model]
    manifest: dict[str, Any] | None
    vae_manifest: dict[str, Any] | None = None
    experts: Experts | None = None
    """Both transformers as our one model, where there are two."""
    other_vae: str | None = None
    """Class of the VAE that the release had and that Kinema cannot be."""

    def only(self, part: str) -> "Held":
        """This with one of its models, or with all."""
        if part == "all":
            return self
        if part not in self.models:
            raise ValueError(f"--part {part}: there is only {', '.join(self.models)}.")
        return Held({part: self.models[part]}, self.manifest, self.vae_manifest)

    def adapted(self, format: str) -> "Held":
        """This with its base alone, beside which the module has adapters; ValueError for a model without any."""
        model, _ = self.models.get("transformer", (None, None))
        if model is None or not adapters_of(model):
            raise ValueError(f"--format {format}: there are no adapters. Train with finetune=lora, or choose another.")
        if isinstance(model, Experts):
            raise ValueError(f"--format {format}: adapters of two experts are not written yet. Export merged weights.")
        return Held({"transformer": (model, base_weights(model))}, self.manifest)

    def apart(self) -> "Held":
        """This with two experts as two transformers, as the reference has them."""
        model, tensors = self.models.get("transformer", (None, {}))
        if not isinstance(model, Experts):
            return self
        high, low = split_experts(tensors)
        models = {**self.models, "transformer": (model.high, high), "transformer_2": (model.low, low)}
        return replace(self, models=models, experts=model)

    @property
    def denoiser(self) -> nn.Module:
        """The model that samples."""
        return self.experts or self.models["transformer"][0]

    def sampling(self) -> SamplingConfig:
        """How the training or the release samples; our defaults where nobody said."""
        plain = (self.manifest or {}).get("sampling")
        return SamplingConfig() if plain is None else from_plain(plain, SamplingConfig)

    def objective(self) -> Objective | None:
        """The objective of the training; None for a module without a manifest."""
        plain = (self.manifest or {}).get("objective")
        return None if plain is None else from_plain(plain, RectifiedFlow, DDPM)

    def condition(self) -> FrameCondition:
        """The frames that the training gave; none for a module without a manifest."""
        return condition_of(self.manifest or {})

    def published(self, name: str) -> dict[str, Any]:
        """What a model was imported or loaded as, its preset and config; nothing for one that was not."""
        manifest = (self.vae_manifest if name == "vae" else self.manifest) or {}
        return manifest.get("published") or origin_of(self.models[name][0])

    def manifest_of(self, name: str) -> dict[str, Any]:
        """The manifest of a model; ValueError for a module that was given itself."""
        manifest = self.vae_manifest if name == "vae" else self.manifest
        if manifest is None:
            raise ValueError("format=kinema: a module alone has no manifest. Export it as diffusers and import that.")
        return manifest


def load(path: "str | Path") -> Any:
    """A module with published weights, or with a run's: a `DiT`, a `CausalVAE`, or for a whole pipeline or run both.

    Takes a diffusers folder, the maker's own files, a single .safetensors file, or a run of Kinema. A whole one becomes
    a sampling `Pipeline`; a published pipeline without its text encoder becomes `Parts`, with `denoiser` and `vae`.
    Modules come in float32, in evaluation mode.
    """
    path = Path(path)
    if is_run(path):
        checkpoint = checkpoint_of(str(path), "path")
        if "text" in checkpoint.document("manifest"):
            return load_pipeline(checkpoint).pipeline
        models = held_of(path, Weights.ema).models
        return models["transformer" if "transformer" in models else "vae"][0].eval()
    if is_pipeline(path):
        return load_published_pipeline(path)
    return recognise(path).module()


def load_published_pipeline(path: Path) -> "Pipeline | Parts":
    """A pipeline's folder: ready to sample where it holds its text encoder, its denoiser and VAE otherwise."""
    found = recognise_all(path)
    if not found.can_sample and found.dit is not None and found.vae is not None:
        return Parts(found.dit.module(), found.vae.module())
    with TemporaryDirectory() as folder:
        import_model(path, Path(folder) / "run")
        pipeline = load_pipeline(checkpoint_of(f"{folder}/run", "path")).pipeline
    _remember_parts(pipeline, found)
    return pipeline


def _remember_parts(pipeline: Pipeline, found: Found) -> None:
    """Keep the published configs of a pipeline that was imported on the way here."""
    assert found.dit is not None
    model = pipeline.denoiser
    for part in (model.high, model.low) if isinstance(model, Experts) else (model,):
        remember(part, found.dit.preset, found.dit.config)
    if found.vae is not None:
        remember(pipeline.vae, found.vae.preset, found.vae.config)


def is_run(path: Path) -> bool:
    """Whether a folder is a run of Kinema or one of its checkpoints."""
    return (path / SEAL).is_file() or (path / "checkpoints").is_dir()


def held_of(source: "nn.Module | Pipeline | Parts | str | Path", weights: Weights) -> Held:
    """The models of a run, or of a module or a pipeline that is given itself."""
    if isinstance(source, Pipeline | Parts):
        given = {"vae": source.vae, "transformer": source.denoiser}
        models = {n: (model, merged_weights(model)) for n, model in given.items() if not isinstance(model, OtherVAE)}
        other = source.vae.name if isinstance(source.vae, OtherVAE) else None
        return Held(models, pipeline_manifest(source) if isinstance(source, Pipeline) else None, other_vae=other)
    if isinstance(source, nn.Module):
        name = "vae" if isinstance(source, CausalVAE) else "transformer"
        return Held({name: (source, merged_weights(source))}, None)
    if not is_run(Path(source)):
        raise ValueError(f"{source} is no run of Kinema: it holds no checkpoints. Import it first (kinema import).")
    checkpoint = checkpoint_of(str(source), "run")
    manifest = checkpoint.document("manifest")
    if manifest["task"] == "vae":
        return Held({"vae": vae_of(checkpoint, weights)}, manifest, manifest)
    models = {}
    carried = CheckpointStore(checkpoint.folder.parent.parent / "vae").newest()
    if carried is not None:
        models["vae"] = vae_of(carried, Weights(manifest["vae"]["weights"]))
    vae = models["vae"][0] if models else None
    models["transformer"] = transformer_of(checkpoint, manifest, weights, vae)
    other = manifest.get("other_vae", {}).get("class")
    return Held(models, manifest, carried.document("manifest") if carried else None, other_vae=other)


def pipeline_manifest(pipeline: Pipeline) -> dict[str, Any]:
    """What a pipeline in memory knows of its manifest."""
    return {
        "objective": to_plain(pipeline.objective),
        "sampling": to_plain(pipeline.sampling),
        "fps": pipeline.fps,
        "shapes": [list(shape) for shape in pipeline.shapes],
        "guidance_dropout": pipeline.guidance_dropout,
        "condition": to_plain(pipeline.condition),
        "text": {"policy": pipeline.text_encoder.policy()},
    }


def vae_of(checkpoint: Checkpoint, weights: Weights) -> Model:
    """The VAE of a checkpoint, its fingerprint verified."""
    return load_vae(checkpoint, weights)[0], checkpoint.tensors(file_of(weights))


def transformer_of(checkpoint: Checkpoint, manifest: dict[str, Any], weights: Weights, vae: nn.Module | None) -> Model:
    """The DiT of a checkpoint, its fingerprint verified."""
    config = from_plain(manifest["model"]["config"], DiTConfig)
    model = make_denoiser(config, *dit_widths(manifest, vae))
    if load_weights(model, checkpoint, weights) != manifest["fingerprints"][weights.value]:
        raise ValueError(f"{checkpoint.folder}: the weights are not those that its manifest names.")
    return model, merged_weights(model) if is_adapted(manifest) else checkpoint.tensors(file_of(weights))


def dit_widths(manifest: dict[str, Any], vae: nn.Module | None) -> tuple[int, int]:
    """Latent channels and width of the text: of an import by its manifest, of a training by its VAE and encoder."""
    record = manifest["model"]
    if "latent_channels" in record:
        return record["latent_channels"], record["text_width"]
    assert isinstance(vae, CausalVAE)
    return vae.config.latent_channels, manifest["text"]["policy"]["width"]


def file_of(weights: Weights) -> str:
    """Name of a checkpoint's file of these weights, as `Checkpoint.tensors` takes it."""
    return "model" if weights is Weights.raw else "ema"

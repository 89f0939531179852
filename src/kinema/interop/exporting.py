"""`kinema export`: weights as another library loads them, loaded by it and compared before they count."""

import argparse
import enum
import json
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from kinema.conditioning.frames import CleanFrame
from kinema.diffusion.objective import Objective, RectifiedFlow
from kinema.identity import fingerprint
from kinema.interop.adapters import DIFFUSERS_FILE, comfyui_tensors, diffusers_tensors, load_into, patched, placed
from kinema.interop.card import model_card
from kinema.interop.comparing import LIMIT, difference
from kinema.interop.folders import published_folder
from kinema.interop.importing import publish
from kinema.interop.loading import Held, Parts, held_of
from kinema.interop.origin import as_published
from kinema.interop.pipelines import LIMIT as SAMPLING_LIMIT
from kinema.interop.pipelines import RUNS, sampled
from kinema.interop.preset import Preset, Record
from kinema.interop.presets import PRESETS
from kinema.interop.reading import HEADER_CONFIG, read_json, read_published
from kinema.interop.recognising import build_on_meta, recognise, shapes_of
from kinema.interop.reference import is_installed, reference_class
from kinema.interop.schedulers import published_scheduler
from kinema.models.vae import CausalVAE
from kinema.sampling.pipeline import Pipeline
from kinema.training.checkpoints.store import write_json
from kinema.training.finetune import Adapter, adapters_of, base_weights
from kinema.training.run_folder import Weights

WEIGHTS_NAME = "diffusion_pytorch_model"
MAX_SHARD_BYTES = 10 * 10**9
COMFY_PREFIX = "model.diffusion_model."

TEXT = ("text_encoder", "tokenizer")
PIPELINES: dict[tuple[str, str, bool], tuple[str, tuple[str, ...]]] = {
    ("WanTransformer3DModel", "AutoencoderKLWan", False): ("WanPipeline", (*TEXT, "transformer_2")),
    ("WanTransformer3DModel", "AutoencoderKLWan", True): (
        "WanImageToVideoPipeline",
        (*TEXT, "transformer_2", "image_encoder", "image_processor"),
    ),
    ("HunyuanVideoTransformer3DModel", "AutoencoderKLHunyuanVideo", False): (
        "HunyuanVideoPipeline",
        (*TEXT, "text_encoder_2", "tokenizer_2"),
    ),
    ("LTXVideoTransformer3DModel", "AutoencoderKLLTXVideo", False): ("LTXPipeline", (*TEXT, "vae")),
    ("CogVideoXTransformer3DModel", "AutoencoderKLCogVideoX", False): ("CogVideoXPipeline", (*TEXT, "vae")),
}
"""Transformer, VAE, whether channels are given -> the reference's pipeline, and its parts that an export lacks."""

TABLES = {"CogVideoXPipeline": "CogVideoXDDIMScheduler"}
"""Pipelines that sample a table of noise levels, and the class of their scheduler; others sample flows."""

SINGLE_FILE = {"WanTransformer3DModel", "WanVACETransformer3DModel"}
"""Classes of which the reference reads the maker's files of any size; of others it knows the released size or none."""


LORA_READERS = {"WanTransformer3DModel": "WanPipeline"}
"""Classes of which a pipeline of the reference reads adapters in the maker's names, at any size."""


class Format(enum.Enum):
    """What is written."""

    diffusers = "diffusers"
    single_file = "single-file"
    kinema = "kinema"
    lora_diffusers = "lora-diffusers"
    lora_comfyui = "lora-comfyui"


class Part(enum.Enum):
    """Which models of a run are written."""

    all = "all"
    transformer = "transformer"
    vae = "vae"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument("run", type=Path, help="a run folder (its newest checkpoint) or one checkpoint folder")
    parser.add_argument("--to", type=Path, required=True, help="the folder to make")
    parser.add_argument("--format", choices=[f.value for f in Format], default=Format.diffusers.value)
    parser.add_argument("--weights", choices=[w.value for w in Weights], default=Weights.ema.value)
    parser.add_argument("--part", choices=[p.value for p in Part], default=Part.all.value)
    parser.add_argument("--preset", default=None, help="the published model to be, where several fit")


def run(arguments: argparse.Namespace) -> int:
    """Export, and say how near the target library comes."""
    for line in export(
        arguments.run, arguments.to, arguments.format, arguments.weights, arguments.part, arguments.preset
    ):
        print(line)
    return 0


def export(
    source: "nn.Module | Pipeline | Parts | str | Path",
    to: "str | Path",
    format: str = "diffusers",
    weights: str = "ema",
    part: str = "all",
    preset: str | None = None,
) -> list[str]:
    """Write a module, or a run's weights, into the new folder `to`; returns lines, the last with the difference.

    Nothing is left of a model that no preset describes, or that the target library computes otherwise.
    """
    check_choices(format=(format, Format), weights=(weights, Weights), part=(part, Part))
    held = held_of(source, Weights(weights)).only(part)
    kind = weights if isinstance(source, str | Path) else "as given"
    if Format(format) is Format.kinema:
        with published_folder(Path(to)) as aside:
            return write_kinema(aside, held)
    if Format(format) in (Format.lora_diffusers, Format.lora_comfyui):
        held = held.adapted(format)
    held = held.apart()
    chosen = {name: Described.of(name, model, tensors, held, preset) for name, (model, tensors) in held.models.items()}
    write = WRITERS[Format(format)]
    with published_folder(Path(to)) as aside:
        lines = write(aside, held, chosen)
        if held.manifest is not None:
            exported = {"weights": kind, "format": format, "compared": lines}
            write_json(aside / "manifest.json", {**held.manifest, "exported": exported})
        (aside / "README.md").write_text(model_card(held, {n: d.preset for n, d in chosen.items()}, kind, lines))
    return lines


def check_choices(**choices: tuple[str, type[enum.Enum]]) -> None:
    """ValueError with the choices, for a value that is none of them."""
    for name, (value, kind) in choices.items():
        known = [choice.value for choice in kind]
        if value not in known:
            raise ValueError(f"{name}={value}: type one of {', '.join(known)}.")


@dataclass(frozen=True)
class Described:
    """One of our models as the row of the table that it is."""

    model: nn.Module
    """float32, on the CPU."""
    preset: Preset
    config: Record
    theirs: dict[str, Tensor]
    """In the reference's names, and in the types of the checkpoint."""
    original: dict[str, Tensor]
    """In the maker's own names, where a single file uses those."""

    @classmethod
    def of(cls, name: str, model: nn.Module, tensors: dict[str, Tensor], held: Held, wanted: str | None) -> "Described":
        """Find the preset; ValueError names, for each that is near, the axis that the reference lacks."""
        published = held.published(name)
        preset, config = find_preset(model, wanted if name != "vae" else None, published.get("preset"))
        if preset.name == published.get("preset"):  # also what the model does not read, and only pipelines do
            config = as_published(published, config)
        skeleton = build_on_meta(preset, config, Path(name))
        assert shapes_of(skeleton.state_dict()) == shapes_of(tensors), f"{preset.name}: describe is not build's inverse"
        theirs = preset.key_map(config).to_theirs(tensors)
        table = preset.original_key_map
        return cls(model, preset, config, theirs, table(config).to_theirs(tensors) if table else theirs)


def find_preset(model: nn.Module, wanted: str | None, imported_as: str | None) -> tuple[Preset, Record]:
    """The published model that ours is, and the reference's config of it."""
    fitting: dict[str, tuple[Preset, Record]] = {}
    reasons: list[str] = []
    for preset in PRESETS:
        if is_vae(preset) is not isinstance(model, CausalVAE) or wanted not in (None, preset.name):
            continue
        try:
            config = preset.describe(model)
            preset.check(config)
        except ValueError as error:
            reasons.append(f"{preset.name}: {error}")
            continue
        fitting[preset.name] = (preset, config)
    if not fitting:
        raise ValueError(f"no published model is built like this one. {' '.join(reasons) or f'{wanted} is unknown.'}")
    if imported_as in fitting:
        return fitting[imported_as]
    if len(fitting) > 1:
        raise ValueError(f"this model is {' as well as '.join(fitting)}: choose one with --preset {min(fitting)}")
    return next(iter(fitting.values()))


def is_vae(preset: Preset) -> bool:
    """Whether a preset is of an autoencoder."""
    return preset.reference.startswith("Autoencoder")


def write_diffusers(folder: Path, held: Held, models: dict[str, Described]) -> list[str]:
    """A component's folder for one model; a pipeline's for a transformer with its VAE."""
    whole = len(models) > 1 or held.other_vae is not None
    lines, parts = [], {}
    for name, model in models.items():
        where = folder / name if whole else folder
        write_component(where, model)
        parts[name] = reload(where, model)
        lines.append(check_difference(name, model, parts[name]))
    if not whole or not ("vae" in models or held.other_vae):
        return lines
    first = write_pipeline(folder, held, models)
    if (folder / "model_index.json").exists():
        lines += check_sampling(folder, held, models["transformer"].config, parts)
    return [first, *lines]


def write_component(folder: Path, model: Described) -> None:
    """config.json and the tensors, in shards where they are large."""
    folder.mkdir(exist_ok=True)
    write_config(folder, model)
    shards = split_shards(model.theirs, MAX_SHARD_BYTES)
    if len(shards) == 1:
        save(shards[0], folder / f"{WEIGHTS_NAME}.safetensors")
        return
    names = [f"{WEIGHTS_NAME}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save(shard, folder / name)
    total = sum(tensor.nbytes for tensor in model.theirs.values())
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / f"{WEIGHTS_NAME}.safetensors.index.json", index)


def write_config(folder: Path, model: Described) -> None:
    """The reference's config.json."""
    write_json(folder / "config.json", published_config(model))


def published_config(model: Described) -> Record:
    """The reference's config, with the name of its class."""
    header = {"_class_name": model.preset.reference, "_diffusers_version": version("diffusers")}
    return {**header, **{k: v for k, v in model.config.items() if not k.startswith("_")}}


def split_shards(tensors: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Tensors in their order, in as few pieces as stay below the limit; one tensor is never cut."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def save(tensors: dict[str, Tensor], path: Path, header: dict[str, str] | None = None) -> None:
    """A safetensors file that other libraries read; `header` is what it says beside its tensors."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(plain, path, metadata={"format": "pt", **(header or {})})


def reload(folder: Path, model: Described) -> Any:
    """The folder through the reference library, float32."""
    target = reference_class(model.preset.reference)
    if is_installed("accelerate"):
        return target.from_pretrained(folder, torch_dtype=torch.float32)
    reference = target.from_config(target.load_config(folder))  # without accelerate it refuses some of its own classes
    reference.load_state_dict(read_published(folder).tensors())
    return reference


def check_difference(name: str, model: Described, reference: Any) -> str:
    """The line that says how far the reference is from us; ValueError above the limit."""
    found = difference(model.model, reference, model.config)
    what = f"{name}: {model.preset.name}, loaded by diffusers as {model.preset.reference}"
    line = f"{what}, largest difference {found:.1e}"
    if not found <= LIMIT:
        raise ValueError(f"{line} (relative) is above {LIMIT:.0e}: nothing was written.")
    return line


def check_sampling(folder: Path, held: Held, config: Record, parts: dict[str, Any]) -> list[str]:
    """The line that says how far a short sampling through the target pipeline is from ours; ValueError if too far."""
    index = read_json(folder / "model_index.json")
    objective, shift = held.objective(), held.sampling().timestep_shift
    if index["_class_name"] not in RUNS or objective is None:
        return []
    missing = {name: None for name, value in index.items() if value == [None, None]}
    settings, found = sampled(folder, {**missing, **parts}, held.denoiser, config, objective, shift)
    line = f"{index['_class_name']}: {settings.describe()}, largest difference {found:.1e}"
    if not found <= SAMPLING_LIMIT:
        raise ValueError(f"{line} (relative) is above {SAMPLING_LIMIT:.0e}: nothing was written.")
    return [line]


def write_pipeline(folder: Path, held: Held, models: dict[str, Described]) -> str:
    """The scheduler and model_index.json, where the reference has a pipeline of these models; the line that says so."""
    transformer = models["transformer"]
    vae = models["vae"].preset.reference if "vae" in models else held.other_vae
    is_given = transformer.config["out_channels"] not in (None, transformer.config["in_channels"])
    key = (transformer.preset.reference, vae, is_given)
    if key not in PIPELINES:
        return f"diffusers has no pipeline of {key[0]} with {key[1]}: its parts are in transformer/ and vae/"
    pipeline, absent = PIPELINES[key]
    objective, sampling = held.objective(), held.sampling()
    if objective is None:
        return f"no model_index.json: the shift that a {pipeline} needs is known only of a training or a pipeline"
    scheduler = published_scheduler(
        objective, sampling, gives_mu=pipeline.startswith("LTX"), table=TABLES.get(pipeline)
    )
    scheduler.save_pretrained(folder / "scheduler")
    boundary = {} if held.experts is None else {"boundary_ratio": held.experts.config.expert_boundary}
    index = {
        "_class_name": pipeline,
        "_diffusers_version": version("diffusers"),
        **{name: ["diffusers", model.preset.reference] for name, model in models.items()},
        "scheduler": ["diffusers", type(scheduler).__name__],
        **{name: [None, None] for name in absent if name not in models},
        **boundary,
        **({"expand_timesteps": True} if isinstance(held.condition(), CleanFrame) else {}),
    }
    write_json(folder / "model_index.json", index)
    shift = f"shift {objective.shift_for(None):g}" if is_one_shift(objective) else type(scheduler).__name__
    return f"model_index.json: {pipeline}, {shift}; give it {', '.join(absent[:2])} when you load it"


def is_one_shift(objective: Objective) -> bool:
    """Whether clips of all sizes have one shift."""
    return isinstance(objective, RectifiedFlow) and objective.shift_base_tokens is None


def write_single_file(folder: Path, held: Held, models: dict[str, Described]) -> list[str]:
    """One file a model in the maker's own names, as ComfyUI reads them, compared after reading it back."""
    lines = []
    for name, model in models.items():
        prefix = "" if name == "vae" else COMFY_PREFIX
        path = folder / f"{name}.safetensors"
        header = {HEADER_CONFIG: json.dumps(published_config(model))}
        save({f"{prefix}{key}": tensor for key, tensor in model.original.items()}, path, header)
        lines.append(check_difference(name, model, reload_single_file(path, model)))
    return lines


def reload_single_file(path: Path, model: Described) -> Any:
    """The file as an import reads it, in the reference library: by its own table of names where that fits any size."""
    found = recognise(path)
    target = reference_class(model.preset.reference)
    if model.preset.reference in SINGLE_FILE:
        with TemporaryDirectory() as folder:
            write_config(Path(folder), replace(model, config=found.config))
            return target.from_single_file(str(path), config=folder)
    reference = target(**found.config)
    reference.load_state_dict(found.preset.key_map(found.config).to_theirs(found.tensors()))
    return reference


def write_lora_diffusers(folder: Path, held: Held, models: dict[str, Described]) -> list[str]:
    """The adapters alone in the names of the reference, loaded by it onto the base."""
    model = models["transformer"]
    found = placed(adapters_of(model.model), base_weights(model.model), model.preset.key_map(model.config))
    save(diffusers_tensors(found), folder / DIFFUSERS_FILE)
    reference = reference_of(model, model.theirs)
    effect = difference(model.model, reference, model.config)
    load_into(reference, folder, len(found))
    return [check_difference(adapters_line(found, effect), model, reference)]


def write_lora_comfyui(folder: Path, held: Held, models: dict[str, Described]) -> list[str]:
    """The adapters alone in the maker's names, applied as ComfyUI does, and by the reference where it reads those."""
    model = models["transformer"]
    table = (model.preset.original_key_map or model.preset.key_map)(model.config)
    found = placed(adapters_of(model.model), base_weights(model.model), table)
    path = folder / "lora.safetensors"
    save(comfyui_tensors(found), path)
    effect = difference(model.model, reference_of(model, model.theirs), model.config)
    applied = table.to_ours(patched(model.original, safetensors.torch.load_file(path)))
    reference = reference_of(model, model.preset.key_map(model.config).to_theirs(applied))
    lines = [check_difference(f"{adapters_line(found, effect)}, applied as ComfyUI does", model, reference)]
    reader = LORA_READERS.get(model.preset.reference)
    if reader and all(name.startswith("blocks.") for name in found):  # it knows no alpha elsewhere
        reference = reference_of(model, model.theirs)
        load_into(reference, reference_class(reader).lora_state_dict(str(path)), len(found))
        lines.append(check_difference(f"the same by load_lora_weights of {reader}", model, reference))
    return lines


def reference_of(model: Described, theirs: dict[str, Tensor]) -> Any:
    """The reference's class with these weights, float32."""
    reference = reference_class(model.preset.reference)(**model.config)
    reference.load_state_dict(theirs)
    return reference


def adapters_line(adapters: dict[str, Adapter], effect: float) -> str:
    """How many adapters there are, and how far they move the output from the base's."""
    return f"{len(adapters)} adapters, which change the output by {effect:.1e}"


WRITERS = {
    Format.diffusers: write_diffusers,
    Format.single_file: write_single_file,
    Format.lora_diffusers: write_lora_diffusers,
    Format.lora_comfyui: write_lora_comfyui,
}


def whole_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest of weights that have taken in their adapters."""
    return {key: value for key, value in manifest.items() if key not in ("finetune", "base")}


def write_kinema(folder: Path, held: Held) -> list[str]:
    """Only the chosen weights, in a folder that `init_from`, `vae.path` and `sample.py` take."""
    lines = []
    for name, (_, tensors) in held.models.items():
        manifest, mark = whole_manifest(held.manifest_of(name)), fingerprint(tensors)
        alone = name == "transformer" or len(held.models) == 1
        publish(folder if alone else folder / "vae", tensors, {**manifest, "fingerprints": {"raw": mark, "ema": mark}})
        lines.append(f"{name}: {len(tensors)} tensors, fingerprint {mark}")
    return lines

"""Which preset a set of tensors is, and whether every one of them fits: decided on shapes, before a number is read."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kinema.interop.inferring import assumed, infer_config
from kinema.interop.keymap import KeyMap
from kinema.interop.preset import Preset, Record
from kinema.interop.presets import PRESETS
from kinema.interop.reading import Published, Shape, dtype_of, read_json, read_published
from kinema.interop.reference import unknown_keys, with_defaults
from kinema.models.dit import DiT, Experts, join_experts

LISTED = 8
"""Names that an error shows of each kind."""


@dataclass(frozen=True)
class Recognised:
    """A published model with the preset, the config and the naming that account for all of its tensors."""

    published: Published
    preset: Preset
    config: Record
    """The reference's config, defaults filled in."""
    naming: str
    """reference or original."""
    skeleton: nn.Module
    """Our module, without numbers (on the meta device)."""

    @property
    def key_map(self) -> KeyMap:
        """The table of this naming."""
        return key_maps(self.preset, self.config)[self.naming]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of our module, in the type that it was stored in."""
        ours = self.key_map.to_ours(self.published.tensors())
        return {name: ours[name] for name in self.skeleton.state_dict()}

    def module(self) -> nn.Module:
        """Our module with these weights, float32, in evaluation mode."""
        module = self.preset.build(self.config)
        module.load_state_dict(self.tensors())
        return module.eval()


@dataclass(frozen=True)
class RecognisedPair:
    """Two published transformers that share the way from noise to data, as if they were one."""

    high: Recognised
    low: Recognised
    boundary: float
    """Timestep from which on the first of them is used."""

    @property
    def preset(self) -> Preset:
        """That of both."""
        return self.high.preset

    @property
    def config(self) -> Record:
        """The reference's config of each."""
        return self.high.config

    @property
    def naming(self) -> str:
        """reference or original."""
        return self.high.naming

    @property
    def published(self) -> Published:
        """Both as one."""
        high, low = self.high.published, self.low.published
        stored = {f"{name}.{key}": x for name, part in (("high", high), ("low", low)) for key, x in part.stored.items()}
        return replace(high, path=high.path.parent, stored=stored)

    @property
    def skeleton(self) -> Experts:
        """Our module, without numbers."""
        alone = self.high.skeleton
        assert isinstance(alone, DiT)
        with torch.device("meta"):
            return Experts(
                replace(alone.config, expert_boundary=self.boundary), alone.latent_channels, alone.text_width
            )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of both, in the type that it was stored in."""
        return join_experts(self.high.tensors(), self.low.tensors())

    def module(self) -> Experts:
        """Both with their weights, float32, in evaluation mode."""
        skeleton = self.skeleton
        module = Experts(skeleton.config, skeleton.latent_channels, skeleton.text_width)
        module.load_state_dict(self.tensors())
        return module.eval()


def recognise_transformers(pipeline: Path) -> Recognised | RecognisedPair:
    """The transformer of a pipeline's folder, or its two."""
    high = recognise(pipeline / "transformer")
    if not (pipeline / "transformer_2").is_dir():
        return high
    low, boundary = (
        recognise(pipeline / "transformer_2"),
        read_json(pipeline / "model_index.json").get("boundary_ratio"),
    )
    if high.config != low.config:
        keys = [key for key in high.config if high.config[key] != low.config.get(key)]
        raise ValueError(f"{pipeline}: transformer and transformer_2 differ in {', '.join(keys)}; experts are alike.")
    if boundary is None:
        raise ValueError(
            f"{pipeline}/model_index.json has no boundary_ratio, from which on transformer is used and below which "
            "transformer_2: write it there (Wan 2.2 has 0.875 for text to video and 0.9 for image to video)."
        )
    return RecognisedPair(high, low, float(boundary))


def recognise(path: Path, prefix: str | None = None) -> Recognised:
    """Read and recognise one model; ValueError lists all tensors that are missing, unknown or of another shape."""
    published = read_published(path, prefix)
    class_name, config = _described(published)
    check_known(class_name)
    config = _without_unknown(published.path, class_name, config)
    config = with_defaults(class_name, config)
    preset = preset_of(class_name, config)
    skeleton = build_on_meta(preset, config, published.path)
    tables, tensors = key_maps(preset, config), skeleton.state_dict()
    expected = {naming: shapes_of(table.to_theirs(tensors)) for naming, table in tables.items()}
    naming = max(expected, key=lambda name: len(expected[name].keys() & published.shapes.keys()))
    _compare(published, preset, expected[naming], tables[naming].unread)
    for stored in published.stored.values():
        dtype_of(stored)
    return Recognised(published, preset, config, naming, skeleton)


def known_classes() -> list[str]:
    """The reference's classes that presets are of."""
    return sorted({preset.reference for preset in PRESETS})


def check_known(class_name: str) -> None:
    """Refuse a class that no preset is of."""
    known = known_classes()
    if class_name not in known:
        raise ValueError(f"{class_name} is a model of another kind: Kinema has presets of {', '.join(known)}.")


def preset_of(class_name: str, config: Record) -> Preset:
    """The one preset of that class that accepts this config; ValueError shows the config that none does."""
    rows = [preset for preset in PRESETS if preset.reference == class_name]
    fitting = [preset for preset in rows if preset.accepts(config)]
    if not fitting:
        names = ", ".join(preset.name for preset in rows)
        raise ValueError(f"none of the presets of {class_name} ({names}) is made with {config}.")
    assert len(fitting) == 1, f"{[preset.name for preset in fitting]} all accept {config}"
    return fitting[0]


def key_maps(preset: Preset, config: Record) -> dict[str, KeyMap]:
    """Naming -> its table."""
    tables = {"reference": preset.key_map(config)}
    if preset.original_key_map is not None:
        tables["original"] = preset.original_key_map(config)
    return tables


def build_on_meta(preset: Preset, config: Record, path: Path) -> nn.Module:
    """Our module without numbers; ValueError when the config lacks a key that the preset needs."""
    try:
        with torch.device("meta"):
            return preset.build(config)
    except KeyError as error:
        raise ValueError(
            f"{path}: config.json has no {error} and does not say which default it means. Install diffusers, which "
            f"knows them (pip install diffusers), or add the key."
        ) from None


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Shape of each."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _described(published: Published) -> tuple[str, Record]:
    """The reference's class and config: as its config.json says, or told from the shapes."""
    config = published.config
    if published.class_name is not None and not _is_vendors(published):
        return published.class_name, {k: v for k, v in (config or {}).items() if not k.startswith("_")}
    if config is not None and "architectures" in config:
        raise ValueError(
            f"{published.path} is a model of another kind ({', '.join(config['architectures'])} of transformers); "
            "Kinema imports diffusion transformers and video VAEs."
        )
    found = infer_config(published.path, published.shapes, config)
    if (assumption := assumed(published.shapes, config)) is not None:
        print(f"{published.path}: {assumption}", file=sys.stderr)
    return found


def _without_unknown(path: Path, class_name: str, config: Record) -> Record:
    """The config without keys that the reference's class does not have; ValueError where one of them is set."""
    unknown = unknown_keys(class_name, config)
    if wrong := [f"{key}={config[key]!r}" for key in unknown if config[key] is not None and config[key] is not False]:
        raise ValueError(
            f"{path}: its config has {', '.join(wrong)}, which {class_name} of diffusers does not have, so that nobody "
            "knows what it means. Take the key out if the weights do not need it, or install a newer diffusers."
        )
    if unknown:
        print(f"{path}: {class_name} does not have {', '.join(unknown)}, which is off and left out", file=sys.stderr)
    return {key: value for key, value in config.items() if key not in unknown}


def _is_vendors(published: Published) -> bool:
    """Wan's own config.json has a `_class_name` too, of a class in Wan's own code."""
    return published.class_name in ("WanModel", "VaceWanModel")


def _compare(published: Published, preset: Preset, expected: Mapping[str, Shape], unread: Sequence[str]) -> None:
    found = {name: shape for name, shape in published.shapes.items() if name not in unread}
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in found]
    unknown = [f"{name} {shape}" for name, shape in found.items() if name not in expected]
    wrong = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    kinds = {"missing": missing, "that the model does not have": unknown, "of another shape": wrong}
    problems = [
        f"{len(names)} {what}: {', '.join(names[:LISTED])}{', ...' if len(names) > LISTED else ''}"
        for what, names in kinds.items()
        if names
    ]
    if problems:
        raise ValueError(
            f"{published.path} does not fit {preset.name} ({preset.reference}, {len(expected)} tensors): "
            f"{'; '.join(problems)}. Nothing was written."
        )

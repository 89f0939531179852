"""What a module in memory was published as: the part of its config that no model of ours needs, kept for its export."""

from typing import Any

from torch import nn

from kinema.interop.preset import Preset, Record

ATTRIBUTE = "published_as"


def remember(module: nn.Module, preset: Preset, config: Record) -> None:
    """Keep the config of a module that was just built of it."""
    setattr(module, ATTRIBUTE, {"preset": preset.name, "config": config, "described": preset.describe(module)})


def origin_of(module: nn.Module) -> dict[str, Any]:
    """Preset, config, and what `describe` made of the module when it was loaded; nothing for one that was not."""
    return getattr(module, ATTRIBUTE, {})


def as_published(origin: dict[str, Any], described: Record) -> Record:
    """The config described now, with the published values wherever the module still is as it was loaded."""
    before = origin.get("described", described)
    kept = {key: value for key, value in origin["config"].items() if key in described}
    return described | {key: value for key, value in kept.items() if before[key] == described[key]}

"""The published models, one file for each family."""

from kinema.interop.preset import Preset

PRESETS: list[Preset] = []

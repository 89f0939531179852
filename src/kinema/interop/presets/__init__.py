"""The published models, one file for each family."""

from kinema.interop.preset import Preset
from kinema.interop.presets.wan import WAN

PRESETS: list[Preset] = [
    WAN,
]

"""What a published model is here: our module at its sizes, and the names its tensors have elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from kinema.interop.keymap import KeyMap

Record = dict[str, Any]
Names = tuple[str, str]
"""Of a tensor or a module: theirs and ours."""


@dataclass(frozen=True)
class Preset:
    """One published architecture: a row of the table of models, not a class of its own.

    `config` below is always the content of the reference's `config.json`, with the defaults of its class filled in.
    """

    name: str
    """E.g. `wan_t2v`."""
    reference: str
    """Class in `diffusers` that has these weights, as `_class_name` in its config.json."""
    check: Callable[[Record], None]
    """ValueError when this config is not of this preset: the key, its value, and what it can be. Exactly one preset of
    a class takes a config, or none.
    """
    build: Callable[[Record], nn.Module]
    """config -> our module with fresh weights; cheap under `torch.device("meta")`."""
    describe: Callable[[nn.Module], Record]
    """The inverse: our module -> the config that the reference's class is made from. ValueError when our module has a
    choice that the reference lacks, naming it.
    """
    key_map: Callable[[Record], KeyMap]
    """config -> table between the reference's tensor names and ours."""
    original_key_map: Callable[[Record], KeyMap] | None = None
    """config -> table between the vendor's own tensor names and ours, where they differ from the reference's."""

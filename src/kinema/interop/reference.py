"""The reference library, `diffusers`: an optional package, used to read and to check what it defines."""

import inspect
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from kinema.interop.preset import Record


def is_installed(library: str = "diffusers") -> bool:
    """Whether the reference library, or one that it needs, is there."""
    return find_spec(library) is not None


def reference_class(name: str) -> Any:
    """A class of the reference library; ValueError when the library or the class is not there."""
    if not is_installed():
        raise ValueError("diffusers is not installed, and this needs it. Type: pip install diffusers")
    try:
        return getattr(import_module("diffusers"), name)
    except AttributeError:
        raise ValueError(f"diffusers {import_module('diffusers').__version__} has no class {name}.") from None


def with_defaults(class_name: str, config: Record) -> Record:
    """The config with what an older version of the library did not write yet; as it is where that is not installed.

    A key that is then missing is an error of the preset that reads it, never a guess.
    """
    if not is_installed():
        return dict(config)
    defaults = {p.name: p.default for p in _parameters(class_name) if p.default is not inspect.Parameter.empty}
    return {**defaults, **config}


def unknown_keys(class_name: str, config: Record) -> list[str]:
    """Keys that the class is not made from; none where the library is not installed. Those with `_` are its own."""
    if not is_installed():
        return []
    known = {parameter.name for parameter in _parameters(class_name)}
    return [key for key in config if key not in known and not key.startswith("_")]


def _parameters(class_name: str) -> list[inspect.Parameter]:
    return list(inspect.signature(reference_class(class_name).__init__).parameters.values())[1:]

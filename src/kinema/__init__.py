"""Kinema: trains video diffusion transformers, and takes published ones in and out."""

from typing import Any

__all__ = ["export", "load"]

DOORS = {"load": "kinema.interop.loading", "export": "kinema.interop.exporting"}
"""Public function -> the module that holds it, imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    """`kinema.load` and `kinema.export`, without which `import kinema` stays quick."""
    from importlib import import_module

    if name not in DOORS:
        raise AttributeError(f"module 'kinema' has no attribute {name!r}")
    return getattr(import_module(DOORS[name]), name)

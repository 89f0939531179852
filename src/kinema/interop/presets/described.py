"""Whether a model of ours is one that a reference can be, too."""

import dataclasses
from enum import Enum
from typing import Any

from kinema.models.dit import DiTConfig


def check_described(reference: str, ours: DiTConfig, theirs: DiTConfig) -> None:
    """Refuse a config with a choice that the reference's own config cannot express; the kernel is nobody's choice."""
    different = [
        f"model.{field.name}={_shown(getattr(ours, field.name))} (it has {_shown(getattr(theirs, field.name))})"
        for field in dataclasses.fields(DiTConfig)
        if field.name != "attention_kernel" and getattr(ours, field.name) != getattr(theirs, field.name)
    ]
    if different:
        raise ValueError(f"{reference} cannot be {'; '.join(different)}: no config of that class makes such a model.")


def _shown(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else value

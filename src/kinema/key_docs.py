"""What the docstrings under a dataclass's fields say, for a command's --help."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from enum import Enum
from itertools import pairwise
from typing import Any

WIDTH = 120
INDENT = 6


def field_docs(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass and its bases, in one line; fields without one are missing."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= _docs_in(textwrap.dedent(inspect.getsource(base)))
    return docs


def key_lines(config: Any, prefix: str = "") -> Iterator[str]:
    """Each key of a tree of dataclasses as `group.key=value`, and below it what it is for."""
    docs = field_docs(type(config))
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from key_lines(value, f"{key}.")
            continue
        yield f"  {key}={_shown(value)}"
        indent = " " * INDENT
        yield from textwrap.wrap(docs.get(field.name, ""), WIDTH, initial_indent=indent, subsequent_indent=indent)


def summary(kind: type) -> str:
    """The first sentence of a class's docstring, in one line."""
    text = " ".join((kind.__doc__ or "").split())
    return text.partition(". ")[0].rstrip(".") + "."


def _docs_in(source: str) -> dict[str, str]:
    [definition] = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    return {
        line.target.id: " ".join(after.value.value.split())
        for line, after in pairwise(definition.body)
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
    }


def _shown(value: Any) -> str:
    """A value as it would be typed."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_shown(inner)}" for key, inner in value.items()) + "}"
    if dataclasses.is_dataclass(value):
        return _shown({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    return str(value)

"""Tensor names and layouts of another project to ours and back: one invertible table for each naming."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor


class Layout(Protocol):
    """How the tensors of one rule are laid out differently; moves numbers about and never computes with them."""

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Their tensors of one rule, in its order -> ours."""
        ...

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inverse."""
        ...


@dataclass(frozen=True)
class Same:
    """The very tensors."""

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """As they are."""
        return list(tensors)

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """As they are."""
        return list(tensors)


@dataclass(frozen=True)
class Reshaped:
    """Other axes over the same numbers: theirs has shape `theirs`, ours has shape `ours`; -1 is the rest."""

    theirs: tuple[int, ...]
    ours: tuple[int, ...]

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """(theirs) -> (ours)"""
        return [tensor.reshape(self.ours) for tensor in tensors]

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """(ours) -> (theirs)"""
        return [tensor.reshape(self.theirs) for tensor in tensors]


@dataclass(frozen=True)
class PermutedRows:
    """The first axis is a product of `sizes` in their order; ours counts the same axes in the order `axes`.

    `PermutedRows((1, 2, 2, 16), (3, 0, 1, 2))` turns rows (t, h, w, c) into rows (c, t, h, w).
    """

    sizes: tuple[int, ...]
    axes: tuple[int, ...]

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Rows in the order of `sizes` -> rows in the order of `axes`."""
        return [_permute_rows(tensor, self.sizes, self.axes) for tensor in tensors]

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inverse."""
        sizes = tuple(self.sizes[axis] for axis in self.axes)
        back = tuple(self.axes.index(axis) for axis in range(len(self.axes)))
        return [_permute_rows(tensor, sizes, back) for tensor in tensors]


@dataclass(frozen=True)
class Fused:
    """One tensor of theirs holds several of ours, `sizes` rows each, one after the other along the first axis."""

    sizes: tuple[int, ...]

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """[(sum of sizes, ...)] -> one tensor for each size."""
        (fused,) = tensors
        return list(fused.split(self.sizes))

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inverse."""
        return [torch.cat(list(tensors))]


@dataclass(frozen=True)
class Unsqueezed:
    """Ours has one more axis, of size 1: a convolution of images as one over a single frame."""

    axis: int

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """(..) -> (.., 1, ..)"""
        return [tensor.unsqueeze(self.axis) for tensor in tensors]

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inverse."""
        return [tensor.squeeze(self.axis) for tensor in tensors]


@dataclass(frozen=True)
class Along:
    """A layout of rows, applied to another axis."""

    axis: int
    layout: Layout

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """With the axis in the place of the rows."""
        return [t.transpose(0, self.axis).contiguous() for t in self.layout.to_ours(self._rows(tensors))]

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inverse."""
        return [t.transpose(0, self.axis).contiguous() for t in self.layout.to_theirs(self._rows(tensors))]

    def _rows(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.transpose(0, self.axis) for tensor in tensors]


@dataclass(frozen=True)
class Inverse:
    """A layout with the two sides exchanged: `Inverse(Fused(...))` is for several of theirs in one of ours."""

    layout: Layout

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """As the layout's way to theirs."""
        return self.layout.to_theirs(tensors)

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """As the layout's way to ours."""
        return self.layout.to_ours(tensors)


@dataclass(frozen=True)
class ReorderedRows:
    """The first axis is cut into `len(order)` equal parts; ours holds their part `order[i]` at place i.

    `ReorderedRows((1, 0))` turns (scale, shift) into (shift, scale).
    """

    order: tuple[int, ...]

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Parts in their order -> parts in ours."""
        return [_reorder(tensor, self.order) for tensor in tensors]

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inverse."""
        back = tuple(self.order.index(place) for place in range(len(self.order)))
        return [_reorder(tensor, back) for tensor in tensors]


@dataclass(frozen=True)
class PairedHeads:
    """Rows of heads whose first `turning` channels theirs holds as two halves, ours as pairs; the rest stay."""

    heads: int
    turning: int

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """(x0, x1, .., y0, y1, .., rest) -> (x0, y0, x1, y1, .., rest) in each head."""
        return [self._permuted(tensor, (2, -1)) for tensor in tensors]

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inverse."""
        return [self._permuted(tensor, (-1, 2)) for tensor in tensors]

    def _permuted(self, tensor: Tensor, sizes: tuple[int, int]) -> Tensor:
        heads = tensor.unflatten(0, (self.heads, -1))
        turned = heads[:, : self.turning].unflatten(1, sizes).transpose(1, 2).flatten(1, 2)
        return torch.cat([turned, heads[:, self.turning :]], dim=1).flatten(0, 1)


@dataclass(frozen=True)
class MovedRows:
    """The first axis is cut into parts of `sizes` rows; ours holds their part `order[i]` at place i."""

    sizes: tuple[int, ...]
    order: tuple[int, ...]

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Parts in their order -> parts in ours."""
        return [_move(tensor, self.sizes, self.order) for tensor in tensors]

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inverse."""
        sizes = tuple(self.sizes[place] for place in self.order)
        back = tuple(self.order.index(place) for place in range(len(self.order)))
        return [_move(tensor, sizes, back) for tensor in tensors]


@dataclass(frozen=True)
class Chain:
    """Layouts one after the other, from theirs to ours."""

    layouts: tuple[Layout, ...]

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Through all, first to last."""
        found = list(tensors)
        for layout in self.layouts:
            found = layout.to_ours(found)
        return found

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Through all, last to first."""
        found = list(tensors)
        for layout in reversed(self.layouts):
            found = layout.to_theirs(found)
        return found


@dataclass(frozen=True)
class Rule:
    """Names of theirs, names of ours, and how the layout differs.

    A name may hold placeholders such as `{i}`, which stand for one part without a dot and must be the same on both
    sides: `Rule("blocks.{i}.attn1.to_q.{p}", "blocks.{i}.sublayers.0.operation.query.{p}")`.
    """

    theirs: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    layout: Layout = field(default_factory=Same)

    @property
    def all_theirs(self) -> tuple[str, ...]:
        """Their names, be it one or several."""
        return _names(self.theirs)

    def renamed(self, words: Mapping[str, str]) -> "Rule":
        """The same tensors where each part of their names that `words` holds is called otherwise."""
        theirs = (".".join(words.get(part, part) for part in name.split(".")) for name in self.all_theirs)
        return replace(self, theirs=tuple(theirs))


@dataclass(frozen=True)
class Place:
    """Tensors of ours and those of theirs that hold the same numbers: one rule at one place of the model."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    layout: Layout


class KeyMap:
    """A table of rules that names every tensor of a model exactly once, in both directions.

    `constants` are tensors of ours whose numbers their config holds, not their weights: added on the way to ours, taken
    out on the way to theirs, which refuses other numbers. `unread` are tensors of theirs that no model reads: they may
    be there, and do not come back.
    """

    def __init__(
        self, rules: Iterable[Rule], constants: Mapping[str, Tensor] | None = None, unread: Sequence[str] = ()
    ) -> None:
        self.rules = list(rules)
        self.constants = dict(constants or {})
        self.unread = tuple(unread)

    def to_ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their state dict -> ours; ValueError lists keys that no rule, or more than one, names."""
        read = {name: tensor for name, tensor in tensors.items() if name not in self.unread}
        found = self._apply(read, [(_names(r.theirs), _names(r.ours), r.layout.to_ours) for r in self.rules])
        return found | {name: constant.clone() for name, constant in self.constants.items()}

    def to_theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict -> theirs; the inverse of `to_ours`, bit for bit."""
        left = dict(tensors)
        for name, constant in self.constants.items():
            _check_constant(name, left.pop(name, None), constant)
        return self._apply(left, [(_names(r.ours), _names(r.theirs), r.layout.to_theirs) for r in self.rules])

    def places(self, ours: Iterable[str]) -> list[Place]:
        """Where theirs has these tensors of ours, each place once; ValueError for a name that no rule names."""
        return list(dict.fromkeys(self._place(name) for name in ours))

    def _place(self, name: str) -> Place:
        for rule in self.rules:
            for pattern in map(_pattern, _names(rule.ours)):
                if match := pattern.fullmatch(name):
                    names = (_names(rule.ours), _names(rule.theirs))
                    ours, theirs = (tuple(each.format(**match.groupdict()) for each in side) for side in names)
                    return Place(ours, theirs, rule.layout)
        raise ValueError(f"{name} is named by no rule.")

    def _apply(self, tensors: Mapping[str, Tensor], table: "list[Direction]") -> dict[str, Tensor]:
        left, found = dict(tensors), dict[str, Tensor]()
        problems: list[str] = []
        for sources, targets, move in table:
            pattern = _pattern(sources[0])
            for key in [key for key in left if pattern.fullmatch(key)]:
                parts = pattern.fullmatch(key).groupdict()  # type: ignore[union-attr]  # filtered above
                keys = [name.format(**parts) for name in sources]
                if missing := [name for name in keys if name not in left]:
                    problems.append(f"{', '.join(missing)} missing beside {key}")
                    continue
                moved = move([left.pop(name) for name in keys])
                found |= zip([name.format(**parts) for name in targets], moved, strict=True)
        problems += [f"{key} {tuple(tensor.shape)} is named by no rule" for key, tensor in left.items()]
        if problems:
            more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise ValueError(f"{len(problems)} tensors do not fit this model: {'; '.join(problems[:20])}{more}.")
        return found


Direction = tuple[tuple[str, ...], tuple[str, ...], Callable[[Sequence[Tensor]], list[Tensor]]]


def _check_constant(name: str, found: Tensor | None, constant: Tensor) -> None:
    if found is None or found.shape != constant.shape:
        raise ValueError(f"{name} is missing or has another shape than the {tuple(constant.shape)} of the config")
    if not (found.is_meta or torch.equal(found.cpu(), constant.to(found.dtype))):
        raise ValueError(f"{name} has other numbers than the config that is exported: describe the model again")


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _pattern(name: str) -> re.Pattern[str]:
    """`a.{i}.b` -> a regular expression with a named group for each placeholder."""
    pieces = re.split(r"\{(\w+)\}", name)
    text = "".join(re.escape(piece) if n % 2 == 0 else f"(?P<{piece}>[^.]+)" for n, piece in enumerate(pieces))
    return re.compile(text)


def _permute_rows(tensor: Tensor, sizes: tuple[int, ...], axes: tuple[int, ...]) -> Tensor:
    rest = tensor.shape[1:]
    parts = tensor.reshape(*sizes, *rest)
    order = (*axes, *range(len(sizes), parts.ndim))
    return parts.permute(order).reshape(-1, *rest).contiguous()


def _reorder(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    parts = tensor.chunk(len(order))
    return torch.cat([parts[place] for place in order])


def _move(tensor: Tensor, sizes: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    parts = tensor.split(sizes)
    return torch.cat([parts[place] for place in order])

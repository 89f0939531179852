"""The sublayer around each operation of the DiT, and the block that lists them."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from kinema.models.dit.compiled import Compiler, TokenRows, compilable, laid_out
from kinema.models.dit.conditioning import Condition, LinearModulation, LowRankModulation, TableModulation
from kinema.models.dit.layers import Counts, Read
from kinema.models.dit.modulating import gated_sum
from kinema.models.dit.segments import Rows, Segments, Tokens

Slots = tuple[str, ...]
"""Some of `shift`, `scale` and `gate`."""


class Sublayer(nn.Module):
    """tokens + gate * operation(modulated norm of tokens), for some segments; the others pass through.

    `slots` names the vectors of the condition that modulate a group of segments: shift, scale and gate, no gate where
    they are only read, a gate alone, or none. `after` is a second norm, behind the operation.
    """

    def __init__(
        self,
        slots: Mapping[tuple[str, ...], Slots],
        operation: nn.Module,
        norm: nn.Module,
        *,
        after: nn.Module | None = None,
        tanh_gates: bool = False,
    ) -> None:
        super().__init__()
        self.groups = dict(slots)
        self.norm = norm
        self.operation = operation
        self.after, self.tanh_gates = after, tanh_gates
        self.is_compiled = False

    def compile_around_attention(self, compiler: Compiler) -> None:
        """Compile all but the attention: what lies before it and what lies behind it, or all of an MLP."""
        self.is_compiled = True
        for part in ("_ask", "_answer") if hasattr(self.operation, "attend") else ("_all",):
            setattr(self, part, compiler(getattr(self, part)))

    @property
    def slots(self) -> int:
        """Vectors of modulation that it takes."""
        return sum(map(len, self.groups.values()))

    @property
    def asks(self) -> list[str]:
        """The segments that it reads through its norm."""
        return [name for group in self.groups for name in group]

    def forward(self, tokens: Tokens, segments: Segments, modulation: Sequence[Tensor]) -> Tokens:
        """Tokens of all segments and the modulation, `slots` times (R, D) -> tokens of all segments."""
        if self.is_compiled:
            return self._by_compiled_parts(tokens, segments, modulation)
        return {**tokens, **self._all(tokens, segments, modulation)}

    def _by_compiled_parts(self, tokens: Tokens, segments: Segments, modulation: Sequence[Tensor]) -> Tokens:
        """The same, where what is compiled sees tensors alone."""
        rows, device = len(modulation[0]) if modulation else 0, next(iter(tokens.values())).device
        read = laid_out({name: compilable(segment, rows, device) for name, segment in segments.items()})
        tokens, modulation = laid_out(tokens), laid_out(modulation)
        if not hasattr(self.operation, "attend"):
            return {**tokens, **self._all(tokens, read, modulation)}
        again, asked = self._ask(tokens, read, modulation)
        found = laid_out(self.operation.attend(asked, segments))
        return {**tokens, **self._answer(tokens, again, found, read, modulation)}

    def _ask(self, tokens: Tokens, segments: Read, modulation: Sequence[Tensor]) -> tuple[Tokens, Any]:
        asking = self._asking(tokens, segments, modulation)
        return asking if self.operation.asks_again else {}, self.operation.ask(asking, tokens, segments)

    def _answer(
        self, tokens: Tokens, asking: Tokens, found: Tokens, segments: Read, modulation: Sequence[Tensor]
    ) -> Tokens:
        return self._summed(tokens, self.operation.answer(asking, found), segments, modulation)

    def _all(self, tokens: Tokens, segments: Read, modulation: Sequence[Tensor]) -> Tokens:
        updates = self.operation(self._asking(tokens, segments, modulation), tokens, segments)
        return self._summed(tokens, updates, segments, modulation)

    def _asking(self, tokens: Tokens, segments: Read, modulation: Sequence[Tensor]) -> Tokens:
        parts = {name: part for name, part in self._parts(modulation).items() if name in tokens}
        return {name: self._input(tokens[name], segments[name].rows, part) for name, part in parts.items()}

    def _summed(self, tokens: Tokens, updates: Tokens, segments: Read, modulation: Sequence[Tensor]) -> Tokens:
        parts = self._parts(modulation)
        return {name: self._sum(tokens[name], x, segments[name].rows, parts[name]) for name, x in updates.items()}

    def _parts(self, modulation: Sequence[Tensor]) -> dict[str, dict[str, Tensor]]:
        """Segment -> slot -> its vectors."""
        vectors = iter(modulation)
        return {
            name: part
            for group, slots in self.groups.items()
            for part in [{slot: next(vectors) for slot in slots}]
            for name in group
        }

    def _input(self, x: Tensor, rows: Rows | TokenRows | None, part: Mapping[str, Tensor]) -> Tensor:
        if "scale" not in part:
            return self.norm(x)
        assert rows is not None
        shift = rows.of(part["shift"]) if "shift" in part else None
        return self.norm.modulated(x, shift, rows.of(part["scale"]), rows.lengths)

    def _sum(self, x: Tensor, update: Tensor, rows: Rows | TokenRows | None, part: Mapping[str, Tensor]) -> Tensor:
        update = update if self.after is None else self.after(update)
        if "gate" not in part:
            return x + update
        assert rows is not None
        gate = rows.of(part["gate"])
        return gated_sum(x, gate.tanh() if self.tanh_gates else gate, update, rows.lengths)

    def products(self, counts: Counts) -> int:
        """Multiplications on one clip."""
        return self.operation.products(counts, self.asks)


class Block(nn.Module):
    """A list of sublayers and the source of their modulation; an architecture is a choice of that list.

    `sizes` are the widths of its vectors of modulation, one for each slot. A `placed` block first adds the positions
    of the video's segment to its tokens.
    """

    def __init__(
        self,
        sublayers: Sequence[Sublayer],
        modulation: TableModulation | LinearModulation | LowRankModulation,
        sizes: Sequence[int],
        *,
        placed: bool = False,
    ) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)
        self.modulation, self.sizes = modulation, list(sizes)
        self.placed = placed

    def forward(self, tokens: Tokens, segments: Segments, condition: Condition, some: slice = slice(None)) -> Tokens:
        """Tokens of all segments -> tokens of all segments, of the same shapes; by all its sublayers, or some."""
        slots = [sublayer.slots for sublayer in self.sublayers]
        vectors = self.modulation(condition).split(self.sizes, dim=-1)
        if self.placed and not some.start:
            tokens = {**tokens, "video": tokens["video"] + segments["video"].places}
        ends = list(accumulate(slots))
        for sublayer, count, end in list(zip(self.sublayers, slots, ends, strict=True))[some]:
            tokens = sublayer(tokens, segments, vectors[end - count : end])
        return tokens

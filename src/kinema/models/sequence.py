"""What a model asks of the ranks that work on one pack together, each on its share of the tokens."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import NamedTuple, Protocol

from torch import Tensor

from kinema.models.attention import Lengths

Segmented = dict[str, Tensor]
"""Tokens of some segments by name."""

Mixing = Callable[[Segmented, Segmented, Segmented], Segmented]
"""Queries, keys and values (N, h, d) of whole segments, by name -> what those that ask found, (N, h, d) each."""


class Share(NamedTuple):
    """The tokens of a segment that lie here: those from `start` to `end`, all clips laid end to end."""

    start: int
    end: int

    def of(self, x: Tensor) -> Tensor:
        """x (N, ...) of all tokens -> (n, ...) of these."""
        return x if len(x) == self.end - self.start else x[self.start : self.end]

    def pieces(self, lengths: Lengths) -> tuple[int, Lengths]:
        """Pieces of these lengths laid end to end -> the first that lies here, and how much of it and those behind it.

        A share without tokens has nothing of one piece: every rank then computes with the same layers.
        """
        ends = list(accumulate(lengths))
        first = min(bisect_right(ends, self.start), len(ends) - 1)
        last = max(bisect_left(ends, self.end), first)
        pieces = zip(ends[first : last + 1], lengths[first : last + 1], strict=True)
        return first, tuple(min(self.end, end) - max(self.start, end - length) for end, length in pieces)


class SequenceGroup(Protocol):
    """The ranks that work on one pack; all of them call the same methods in the same order.

    Every rank knows the whole pack and has the same loss of it, of which it differentiates its own tokens: the sum of
    the gradients of all ranks is that of the loss.
    """

    def share(self, tokens: int) -> tuple[int, int]:
        """Which of so many tokens are this rank's: the first, and the first behind them."""
        ...

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        """x (n, ...) of this rank's share -> (N, ...) of all; the gradient of x is that of its own part alone."""
        ...

    def attend(self, mix: Mixing, q: Segmented, k: Segmented, v: Segmented, tokens: Mapping[str, int]) -> Segmented:
        """`mix` on whole segments, of so many tokens, and some of the heads; here (n, h, d) with all heads, in and out.

        `mix` takes any number of heads. Segments need not all ask, nor all answer; keys and values are of the same.
        """
        ...


class Alone:
    """One rank that has all tokens."""

    def share(self, tokens: int) -> tuple[int, int]:
        """All of them."""
        return 0, tokens

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        """x itself."""
        return x

    def attend(self, mix: Mixing, q: Segmented, k: Segmented, v: Segmented, tokens: Mapping[str, int]) -> Segmented:
        """`mix` itself."""
        return mix(q, k, v)


ALONE = Alone()

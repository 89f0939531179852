"""The segments of a pack: what a block knows of each one besides its tokens."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kinema.models.attention import Lengths, Order
from kinema.models.sequence import ALONE, SequenceGroup, Share

Grid = tuple[int, int, int]
"""Tokens of a clip along time, height and width."""

Tokens = dict[str, Tensor]
"""Tokens of each segment by its name: `video` (N, D), `text` (M, D), clip after clip."""


Turns = tuple[Tensor, Tensor]
"""cos and sin of every token: (N, d / 2) each, or (N, h, d / 2) where heads differ."""


class Span(Enum):
    """Which tokens of a clip attend to one another."""

    clip = "clip"
    """All of them."""
    frame = "frame"
    """Those of the same frame."""
    place = "place"
    """Those of the same place, over time."""
    window = "window"
    """Those of the same box of frames, rows and columns."""
    shifted = "shifted"
    """The same with boxes moved by half their sides, across the borders of the others."""


class Cut(NamedTuple):
    """A span written as lengths, which is all that the attention door understands.

    Tokens of one place do not lie together, so `order` brings them together first.
    """

    lengths: Lengths
    order: Order | None = None


class Rows(NamedTuple):
    """The rows of the condition that modulate a segment: one for each of these numbers of tokens, from `first` on."""

    lengths: Lengths
    first: int = 0

    def of(self, vectors: Tensor) -> Tensor:
        """vectors (all rows, D) -> (rows of this segment, D)"""
        count = len(self.lengths)
        return vectors if len(vectors) == count else vectors[self.first : self.first + count]

    def held(self, share: Share) -> "Rows":
        """Those of a share of the tokens."""
        skipped, lengths = share.pieces(self.lengths)
        return Rows(lengths, self.first + skipped)


@dataclass(frozen=True)
class Segment:
    """One modality of a pack: where its clips begin and end, its cuts, and its rotary table."""

    lengths: Lengths
    """Of whole clips, as are the cuts; everything else is of the tokens that lie here."""
    rows: Rows
    """One a clip, or one a frame of tokens."""
    cuts: dict[Span, Cut]
    rope: Turns | None = None
    """None for text, whose encoder has placed the words."""
    places: Tensor | None = None
    """(N, D), what blocks add to the tokens that are `placed`."""
    clock: Turns | None = None
    """Where a token lies in time alone, for a stream that another one looks at."""
    told: Tensor | None = None
    """(B, 2, D), of each clip the shift and scale behind which all blocks read its tokens."""
    group: SequenceGroup = ALONE
    """The ranks that share its tokens."""

    @property
    def count(self) -> int:
        """Tokens of all clips, wherever they lie."""
        return sum(self.lengths)

    @property
    def clips(self) -> Rows:
        """One row a clip, for what is `told`."""
        return Rows(self.lengths)

    @property
    def share(self) -> Share:
        """Which of them lie here."""
        return Share(*self.group.share(self.count))

    def spread(self, group: SequenceGroup) -> "Segment":
        """The same, of which this rank of the group holds its share."""
        made = replace(self, group=group)
        share = made.share
        rope = None if self.rope is None else (share.of(self.rope[0]), share.of(self.rope[1]))
        places = None if self.places is None else share.of(self.places)
        return replace(made, rows=self.rows.held(share), rope=rope, places=places)

    def of_clips(self, first: int, count: int) -> "tuple[Segment, Share]":
        """The same of some clips alone, for a segment without a grid, and where their tokens lie."""
        part = slice(first, first + count)
        told = None if self.told is None else self.told[part]
        start, tokens = sum(self.lengths[:first]), sum(self.lengths[part])
        segment = replace(clip_segment(self.lengths[part], self.rows.first + first), told=told)
        return segment, Share(start, start + tokens)

    def pieces(self, span: Span) -> list[int]:
        """Number of pieces that a span cuts each clip into."""
        ends = set(accumulate(self.lengths))
        closes = [number for number, end in enumerate(accumulate(self.cuts[span].lengths), 1) if end in ends]
        return [last - first for first, last in pairwise([0, *closes])]


Segments = dict[str, Segment]


def video_segment(
    grids: Sequence[Grid],
    rows: Rows,
    rope: Turns | None,
    places: Tensor | None,
    spans: Iterable[Span],
    window: Sequence[int],
    device: torch.device,
) -> Segment:
    """The segment of clips with these token grids, with only the cuts that the model asks for."""
    cuts = {span: _cut(span, grids, window, device) for span in spans}
    return Segment(tuple(t * h * w for t, h, w in grids), rows, cuts, rope, places)


def clip_segment(lengths: Lengths, first_row: int = 0) -> Segment:
    """The segment of captions or images with these numbers of tokens, which have no grid."""
    return Segment(lengths, Rows(lengths, first_row), {Span.clip: Cut(lengths)})


def repeated(lengths: Lengths, copies: Sequence[int]) -> Lengths:
    """The length of each clip as many times as it has copies."""
    return tuple(length for length, count in zip(lengths, copies, strict=True) for _ in range(count))


def seen(span: Span, grid: Grid, window: Sequence[int]) -> int:
    """Pairs of tokens of one clip that attend to one another."""
    t, h, w = grid
    if span in (Span.window, Span.shifted):
        return math.prod(sum(side**2 for side in sides) for sides in _sides(span, grid, window))
    return {Span.clip: (t * h * w) ** 2, Span.frame: t * (h * w) ** 2, Span.place: h * w * t**2}[span]


def lengths_of(parts: Sequence[Tensor]) -> Lengths:
    """Tokens of each clip."""
    return tuple(len(part) for part in parts)


def joined(parts: Sequence[Tensor], lengths: Sequence[Lengths]) -> Tensor:
    """Tokens of several segments, clip after clip in each -> clip after clip, segment after segment in each."""
    clips = zip(*(part.split(list(n)) for part, n in zip(parts, lengths, strict=True)), strict=True)
    return torch.cat([piece for clip in clips for piece in clip])


def totals(lengths: Sequence[Lengths]) -> Lengths:
    """Tokens of each clip in all of several segments."""
    return tuple(sum(clip) for clip in zip(*lengths, strict=True))


def _cut(span: Span, grids: Sequence[Grid], window: Sequence[int], device: torch.device) -> Cut:
    if span in (Span.window, Span.shifted):
        return _window_cut(span, grids, window, device)
    if span is Span.clip:
        return Cut(tuple(t * h * w for t, h, w in grids))
    if span is Span.frame:  # tokens lie frame after frame already
        return Cut(tuple(h * w for t, h, w in grids for _ in range(t)))
    return Cut(tuple(t for t, h, w in grids for _ in range(h * w)), _place_order(grids, device))


def _window_cut(span: Span, grids: Sequence[Grid], window: Sequence[int], device: torch.device) -> Cut:
    """One length for each window of each clip; those of equal length lie together, which is one call of a kernel."""
    windows, start = list[Tensor](), 0
    for t, h, w in grids:
        clip = torch.arange(start, start + t * h * w).view(t, h, w)
        boxes = [clip]
        for axis, sides in enumerate(_sides(span, (t, h, w), window)):
            boxes = [part for box in boxes for part in box.split(sides, dim=axis)]
        windows += [box.flatten() for box in boxes]
        start += t * h * w
    windows.sort(key=len)
    return Cut(tuple(len(tokens) for tokens in windows), Order.of(torch.cat(windows).to(device)))


def _sides(span: Span, grid: Grid, window: Sequence[int]) -> list[list[int]]:
    """Sides of the windows along each axis: whole ones, and at the edges what is left.

    An axis that one window spans is not cut. Equal to the cyclic shift and mask of Liu et al. 2021 (Swin), section 3.2.
    """
    cuts = []
    for size, side in zip(grid, window, strict=True):
        first = side // 2 if span is Span.shifted and side < size else 0
        borders = [0, *range(first or side, size, side), size]
        cuts.append([end - start for start, end in itertools.pairwise(borders)])
    return cuts


def _place_order(grids: Sequence[Grid], device: torch.device) -> Order:
    """Time innermost within each clip, instead of outermost."""
    parts, start = [], 0
    for (t, h, w), group in groupby(grids):
        clips = len(list(group))
        tokens = torch.arange(start, start + clips * t * h * w, device=device)
        parts.append(tokens.view(clips, t, h * w).transpose(1, 2).flatten())
        start += len(tokens)
    return Order.of(torch.cat(parts))

"""Dropping captions in training, so that the network also learns the null text that guidance needs."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

from torch import Tensor


class DroppedText(NamedTuple):
    """The text of a pack after dropping: `dropped[i]` says whether clip i has the null text."""

    text: list[Tensor]
    dropped: list[bool]


def drop_text(text: Sequence[Tensor], null_text: Tensor, rate: float, seeds: Sequence[int | str]) -> DroppedText:
    """Text (L_i, D) of each clip -> the same, or the null text (L0, D) with probability `rate`.

    `seeds[i]` alone decides for clip i (a keyed number such as the hash of seed and position), so the
    choice depends neither on the other clips of the pack nor on the number of ranks (Ho and Salimans 2022,
    algorithm 1).
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"text_dropout={rate} must be a share of the captions from 0 to 1, usually 0.1.")
    dropped = [uniform_from(seed) < rate for seed, _ in zip(seeds, text, strict=True)]
    return DroppedText([null_text if drop else t for drop, t in zip(dropped, text, strict=True)], dropped)


def uniform_from(seed: int | str) -> float:
    """A seed -> its own number in [0, 1), the same on every machine."""
    digest = blake2b(f"text dropout {seed}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53

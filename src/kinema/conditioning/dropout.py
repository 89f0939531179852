"""Dropping captions in training, so that the network also learns the null text that guidance needs."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Generic, NamedTuple, TypeVar

Text = TypeVar("Text")


class DroppedText(NamedTuple, Generic[Text]):
    """The text of a pack after dropping: `dropped[i]` says whether clip i has the null text."""

    text: list[Text]
    dropped: list[bool]


def drop_text(text: Sequence[Text], null_text: Text, rate: float, seeds: Sequence[int | str]) -> DroppedText[Text]:
    """The text of each clip, whatever it consists of -> the same, or the null text with probability `rate`.

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

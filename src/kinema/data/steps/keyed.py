"""Seeds by name: what is drawn depends on nothing but what it is for."""

import hashlib


def keyed_seed(*parts: int | str) -> int:
    """Mix named parts into 64 bits, the same on every machine and version: the one source of keyed
    randomness.

    `keyed_seed(seed, "noise", position)` seeds a generator. Parts are told apart by type and length, so
    ("ab", "c") and ("a", "bc"), or 1 and "1", differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise TypeError(f"keyed_seed takes int and str, not {type(part).__name__} {part!r}.")
        text = str(part).encode()
        digest.update(f"{'i' if isinstance(part, int) else 's'}{len(text)}:".encode() + text)
    return int.from_bytes(digest.digest(), "little")

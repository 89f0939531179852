"""Copies of one clip, found by perceptual hash, at a cost far below comparing all with all."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.scores.sample import Sample

HASH_FRAMES = 4
"""Frames that a signature is made of, spread evenly over the clip."""
WORD_BITS = 64
BITS = HASH_FRAMES * WORD_BITS
BANDS = 16
LIMIT = 24
"""Bits of 256 up to which two clips are one: docs/filtering.md says what lies on either side."""
LARGEST_LIMIT = 63
BLOCK_PAIRS = 1 << 20
"""Pairs that are compared at once, which bounds the memory."""


@dataclass(frozen=True)
class Duplicate:
    """A clip that shows what another one shows."""

    number: int
    of: int
    """The clip that is kept."""
    distance: int
    """Bits in which their signatures differ, of 256."""


def signature(sample: Sample) -> NDArray[np.uint64]:
    """(4,) perceptual hashes of 64 bits each (imagehash's pHash: signs of the lowest cosine frequencies).

    Scaling and encoding again change a few bits, other clips differ in about half of them. Mirrored, turned,
    strongly cropped copies and other stretches of one scene differ as other clips do.
    """
    import imagehash
    from PIL import Image

    places = np.rint((np.arange(HASH_FRAMES) + 0.5) / HASH_FRAMES * len(sample.frames) - 0.5).astype(int)
    hashes = [imagehash.phash(Image.fromarray(sample.frames[place])).hash for place in places]
    return np.packbits(np.stack(hashes).reshape(HASH_FRAMES, -1), axis=1).view(np.uint64)[:, 0]


def find_duplicates(signatures: NDArray[np.uint64], limit: int, preference: Sequence[Any]) -> list[Duplicate]:
    """Which clips to leave out: those within `limit` bits of one that is kept.

    signatures (N, 4). Clips are gone through from the smallest `preference` on (with the key as its last part the
    answer depends on nothing else), and each is kept unless a kept one is that near: a chain of small steps
    never joins clips that differ. Exact: no pair within the limit is missed.
    """
    if len(preference) != len(signatures):
        raise ValueError(f"preference has {len(preference)} entries for {len(signatures)} signatures.")
    unique, group_of = np.unique(signatures, axis=0, return_inverse=True)
    best = dict[int, int]()  # of each group of equal signatures, so that a thousand black clips cost no million pairs
    for number in sorted(range(len(signatures)), key=preference.__getitem__):
        best.setdefault(int(group_of.ravel()[number]), number)
    keeper = _keepers(unique, limit, list(best))
    found = []
    for number, group in enumerate(group_of.ravel().tolist()):
        of, distance = keeper.get(group, (group, 0))
        if number != best[of]:
            found.append(Duplicate(number, best[of], distance))
    return found


def _keepers(unique: NDArray[np.uint64], limit: int, order: list[int]) -> dict[int, tuple[int, int]]:
    """For each signature that goes: the nearest one that stays, and their distance."""
    rank = {number: place for place, number in enumerate(order)}
    neighbours = defaultdict[int, list[tuple[int, int]]](list)
    for first, second, distance in near_pairs(unique, limit):
        neighbours[first].append((distance, second))
        neighbours[second].append((distance, first))
    goes = dict[int, tuple[int, int]]()
    for number in order:
        near = [(d, rank[other], other) for d, other in neighbours[number] if rank[other] < rank[number]]
        near = [one for one in near if one[2] not in goes]
        if near:
            distance, _, other = min(near)
            goes[number] = other, distance
    return goes


def near_pairs(signatures: NDArray[np.uint64], limit: int) -> list[tuple[int, int, int]]:
    """(first, second, distance) of all pairs of signatures (N, 4) that differ in at most `limit` bits, sorted.

    Multi-index hashing (Norouzi et al. 2012): of two signatures cut into 16 bands, one band differs in at most
    limit // 16 bits; only pairs that agree so in some band are compared.
    """
    if not 0 <= limit <= LARGEST_LIMIT:
        raise ValueError(f"limit={limit} must be from 0 to {LARGEST_LIMIT} of {BITS} bits; {LIMIT} is usual.")
    found = dict[tuple[int, int], int]()
    for first, second in _candidates(_bands(signatures), limit // BANDS):
        distances = np.bitwise_count(signatures[first] ^ signatures[second]).sum(axis=1)
        near = distances <= limit
        pairs = zip(first[near].tolist(), second[near].tolist(), strict=True)
        found.update(zip(pairs, distances[near].tolist(), strict=True))
    return sorted((*pair, distance) for pair, distance in found.items())


def _bands(signatures: NDArray[np.uint64]) -> NDArray[np.uint16]:
    """(N, 16) bands of 16 bits, mixed: neighbouring bits of a hash go together, and would fill few buckets."""
    bits = np.unpackbits(signatures.view(np.uint8), axis=1)
    mixed = np.random.default_rng(0).permutation(BITS)
    return np.ascontiguousarray(np.packbits(bits[:, mixed], axis=1)).view(np.uint16)


def _candidates(bands: NDArray[np.uint16], radius: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Blocks of pairs (first < second) with a band that differs in at most `radius` bits; a pair may come again."""
    flips = [sum(1 << bit for bit in bits) for count in range(radius + 1) for bits in combinations(range(16), count)]
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        ends = np.cumsum(np.bincount(band, minlength=1 << 16))
        for flip in flips:
            bucket = band ^ np.uint16(flip)
            stops = ends[bucket]
            starts = np.where(bucket > 0, ends[bucket - np.uint16(1)], 0)
            for block in _blocks(stops - starts):
                yield _pairs_of(block, order, starts[block], stops[block])


def _blocks(counts: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Numbers of the clips, in blocks that have about `BLOCK_PAIRS` pairs."""
    cuts = np.searchsorted(np.cumsum(counts), np.arange(BLOCK_PAIRS, counts.sum(), BLOCK_PAIRS))
    yield from np.split(np.arange(len(counts)), np.unique(cuts))


def _pairs_of(
    firsts: NDArray[np.int64], order: NDArray[np.int64], starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each of `firsts` with what lies in its bucket, order[start:stop]."""
    counts = stops - starts
    first = np.repeat(firsts, counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    second = order[np.repeat(starts, counts) + within]
    rising = first < second
    return first[rising], second[rising]

"""How evenly a step's work falls on its ranks: Kinema's plan, buckets, token packing and padding on one list of clips.

python -m benchmarks.balance            # prints the table; --write puts it and the plot into docs/
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kinema.data.geometry import ClipShape, Geometry
from kinema.data.steps.candidates import Candidates
from kinema.data.steps.plan import Plan
from kinema.data.steps.stages import Stage

WAN = Geometry(temporal_stride=4, spatial_stride=8, patch_size=(1, 2, 2))
IMAGES = [(256, 256), (512, 512), (768, 768), (1024, 1024)]
VIDEOS = [(256, 448), (480, 832), (720, 1280)]
SHARES = {"images": 0.4, "256p": 0.3, "480p": 0.2, "720p": 0.1}
FPS = 16
RANKS = (8, 16, 32, 64, 128, 256)
PACKS = 8
"""Packs of a rank in a step: its gradient accumulation."""
CAP = 1 << 18
TOKENS_PER_RANK = 900_000
MARKS = "<!-- balance: written by benchmarks/balance.py -->\n", "<!-- end of balance -->"

Numbers = NDArray[np.float64]


def published_mixture(clips: int, seed: int = 0) -> Candidates:
    """40 % images of four sizes, 30 % 256p, 20 % 480p and 10 % 720p, videos of 1 to 10 s by halves; Wan 2.1's tokens.

    The cost is that of Wan 2.1 1.3B's blocks: 24 D^2 n + 4 D n^2 operations forward, D = 1536.
    """
    rng = np.random.default_rng(seed)
    shapes = [ClipShape(1, *size) for size in IMAGES]
    shapes += [ClipShape(8 * halves + 1, *size) for size in VIDEOS for halves in range(2, 21)]
    kind = rng.choice(4, clips, p=list(SHARES.values()))
    ids = np.where(kind == 0, rng.integers(0, 4, clips), 4 + 19 * (kind - 1) + rng.integers(0, 19, clips))
    tokens = np.array([WAN.num_tokens(shape) for shape in shapes])
    shards = (np.arange(clips) // 500).astype(np.int32)
    costs = tokens * (1 + tokens / (6 * 1536))
    return Candidates(shapes, tokens, costs, np.arange(clips, dtype=np.int32), ids.astype(np.int32), shards)


class Found(NamedTuple):
    """What one way of filling steps comes to."""

    balance: float
    """Mean over largest cost of a rank: the share of the time in which ranks do not wait for each other."""
    worst: float
    """The same of the worst step."""
    after_each_pack: float
    """The same for ranks that wait for each other after every pack, as under ZeRO-3."""
    padding: float
    """Share of the tokens that are no clip's."""
    useful: float
    """Balance without the padding."""


def kinema(clips: Candidates, ranks: int, steps: int) -> Iterator[tuple[Numbers, float, float]]:
    """Costs of the ranks' packs (ranks, packs), tokens computed and tokens of clips, step by step."""
    stage = Stage(clips, CAP, tokens_per_step=ranks * TOKENS_PER_RANK)
    plan = Plan([stage], seed=0, lanes=ranks * PACKS, shuffle_block_shards=16, balanced_lanes=PACKS)
    for step in range(steps):
        lanes = plan.step(step)
        tokens = float(clips.tokens[lanes.ids].sum())
        yield lanes.costs.reshape(ranks, PACKS), tokens, tokens


def token_packing(clips: Candidates, ranks: int, steps: int) -> Iterator[tuple[Numbers, float, float]]:
    """Packs of fixed length are filled in the order of the clips, as far as the next one fits."""
    order = iter(np.random.default_rng(1).permutation(len(clips)).tolist())
    tokens, costs = clips.tokens.tolist(), clips.costs.tolist()
    clip = next(order)
    for _ in range(steps):
        packs, held = np.zeros(ranks * PACKS), 0.0
        for pack in range(len(packs)):
            room = CAP
            while tokens[clip] <= room:
                room, packs[pack] = room - tokens[clip], packs[pack] + costs[clip]
                clip = next(order)
            held += CAP - room
        yield packs.reshape(ranks, PACKS), float(len(packs) * CAP), held


def buckets(clips: Candidates, ranks: int, steps: int) -> Iterator[tuple[Numbers, float, float]]:
    """Every batch has one shape, drawn by its share of the tokens, and as many clips as the cap allows."""
    rng = np.random.default_rng(1)
    share = clips.shape_counts * clips.shape_tokens
    fitting = CAP // clips.shape_tokens
    for _ in range(steps):
        shapes = rng.choice(len(share), (ranks, PACKS), p=share / share.sum())
        tokens = float((fitting * clips.shape_tokens)[shapes].sum())
        yield (fitting * clips.shape_costs)[shapes], tokens, tokens


def padding(clips: Candidates, ranks: int, steps: int) -> Iterator[tuple[Numbers, float, float]]:
    """Batches in the order of the clips, all brought to the longest of the batch, as many as the cap allows."""
    order = iter(np.random.default_rng(1).permutation(len(clips)).tolist())
    tokens, costs = clips.tokens.tolist(), clips.costs.tolist()
    clip = next(order)
    for _ in range(steps):
        packs, computed, held = np.zeros(ranks * PACKS), 0, 0
        for pack in range(len(packs)):
            count, longest, total, dearest = 0, 0, 0, 0.0
            while (count + 1) * max(longest, tokens[clip]) <= CAP:
                count, longest, dearest = count + 1, max(longest, tokens[clip]), max(dearest, costs[clip])
                total, clip = total + tokens[clip], next(order)
            packs[pack], computed, held = count * dearest, computed + count * longest, held + total
        yield packs.reshape(ranks, PACKS), float(computed), float(held)


WAYS = {"Kinema": kinema, "buckets": buckets, "token packing": token_packing, "padding": padding}


def measure(way: str, clips: Candidates, ranks: int, steps: int) -> Found:
    """Means over the steps; the balance of a step is that of its slowest rank."""
    balance, after_each, computed, held = [], [], 0.0, 0.0
    for costs, all_tokens, clip_tokens in WAYS[way](clips, ranks, steps):
        of_ranks = costs.sum(axis=1)
        balance.append(of_ranks.mean() / of_ranks.max())
        after_each.append(of_ranks.mean() / costs.max(axis=0).sum())
        computed, held = computed + all_tokens, held + clip_tokens
    mean, useful = float(np.mean(balance)), held / computed
    return Found(mean, min(balance), float(np.mean(after_each)), 1 - useful, mean * useful)


def table(found: dict[str, list[Found]]) -> str:
    """Markdown, in percent: balance for each number of ranks, and the other figures at the most ranks."""
    last = RANKS[-1]
    heads = ["", *(f"{ranks} ranks" for ranks in RANKS), f"worst step, {last}", f"after each pack, {last}", "padding",
             f"useful, {last}"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for way, row in found.items():
        numbers = [*(each.balance for each in row), *row[-1][1:]]
        lines.append(f"| {' | '.join([way, *(f'{100 * number:.2f}' for number in numbers)])} |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, list[Found]], path: Path) -> None:
    """Balance by number of ranks."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for way, row in found.items():
        axes.plot(RANKS, [100 * each.balance for each in row], marker="o", label=way)
    axes.set_xscale("log", base=2)
    axes.set(xticks=RANKS, xticklabels=RANKS, ylim=(0, 103), xlabel="ranks", ylabel="mean / dearest rank, %")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the table, and with --write put it and the plot into the docs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=400_000)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    clips = published_mixture(arguments.clips)
    found = {way: [measure(way, clips, ranks, arguments.steps) for ranks in RANKS] for way in WAYS}
    text = table(found)
    print(text)
    if arguments.write:
        docs = Path(__file__).parents[1] / "docs"
        draw(found, docs / "pictures" / "balance.png")
        before, _, rest = (docs / "packing.md").read_text(encoding="utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        (docs / "packing.md").write_text(before + MARKS[0] + text + MARKS[1] + after, encoding="utf-8")


if __name__ == "__main__":
    main()

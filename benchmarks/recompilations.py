"""Compiled blocks over packs as a real data set gives them: how often they are compiled, and what a step takes.

python -m benchmarks.recompilations [--preset wan_tiny ...] [--steps 300] [--threads 1] [--seconds 20]

With --seconds 0 nothing is timed. The clips are those of docs/packing.md, an eighth as large along each side.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmarks.balance import WAN, published_mixture
from benchmarks.pairing import paired
from benchmarks.saved import saved_bytes
from kinema.distributed.compiling import Compilations, compiler
from kinema.models.dit import DiT, DiTConfig
from kinema.models.dit.segments import Grid

CHANNELS, TEXT = 16, 64
MOST_TOKENS, MOST_WORDS = 1500, 40
SCALE = 8
TIMED = {
    "cross": DiTConfig(width=384, depth=4, num_heads=6, rope_axes=[24, 20, 20]),
}
PRESETS = {path.stem: path for path in sorted(Path("configs/model").glob("*_tiny.yaml"))}
HEADER = "| model | steps | clips in a pack | patterns of lengths | compiled in the first step | later | compiling, s |"

Pack = list[Grid]


def packs(seed: int = 0) -> Iterator[Pack]:
    """Clips in a random order, as many in each pack as fit; latent frames, rows and columns of each."""
    clips = published_mixture(100_000, seed)
    pack, room = Pack(), MOST_TOKENS
    for number in clips.shape_ids.tolist():
        frames, height, width = WAN.latent_shape(clips.shapes[number])
        rows, columns = (max(2, 2 * round(side / SCALE / 2)) for side in (height, width))
        grid = -(-frames // 4), rows, columns
        tokens = grid[0] * grid[1] * grid[2] // 4
        if tokens > room:
            yield pack
            pack, room = [], MOST_TOKENS
        pack, room = [*pack, grid], room - tokens


def step(model: DiT, pack: Pack, number: int) -> Tensor:
    """The loss of one pack; captions have 1 to 40 tokens."""
    generator = torch.Generator().manual_seed(number)
    patch = model.config.patch_size[0]
    latents = [torch.randn(CHANNELS, frames * patch, *sides, generator=generator) for frames, *sides in pack]
    words = torch.randint(1, MOST_WORDS + 1, (len(pack),), generator=generator).tolist()
    text = [torch.randn(count, TEXT, generator=generator) for count in words]
    found = model(latents, torch.rand(len(pack), generator=generator), text)
    return torch.stack([clip.square().mean() for clip in found]).mean()


def random_model(config: DiTConfig) -> DiT:
    """With gates that are open, which a new model's are not."""
    torch.manual_seed(0)
    model = DiT(config, CHANNELS, TEXT)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def recompilations(config: DiTConfig, steps: int) -> str:
    """The rest of a row of the table: training steps on packs that all differ."""
    torch._dynamo.reset()
    model, seen = random_model(config), list(itertools.islice(packs(), steps))
    moves, counted, counts = torch.optim.AdamW(model.parameters(), 1e-4), Compilations(), []
    model.compile_blocks(compiler())
    started = time.perf_counter()
    for number, pack in enumerate(seen):
        moves.zero_grad()
        step(model, pack, number).backward()
        moves.step()
        counts.append(counted.count())
        if not number:
            seconds = time.perf_counter() - started
    fewest, most = min(map(len, seen)), max(map(len, seen))
    patterns = len({tuple(pack) for pack in seen})
    return f"{steps} | {fewest} to {most} | {patterns} | {counts[0]} | **{counts[-1] - counts[0]}** | {seconds:.0f} |"


def timed(name: str, config: DiTConfig, seconds: float) -> None:
    """Rows of the second table: forward and backward, compiled beside uncompiled."""
    plain, compiled = random_model(config), random_model(config)
    compiled.compile_blocks(compiler())
    cases: dict[str, list[Pack]] = {
        "4 clips alike": [[(5, 24, 32)] * 4],
        "mixed packs": list(itertools.islice(packs(), 4)),
    }

    def run(model: DiT, of: list[Pack]) -> Callable[[], None]:
        def passes() -> None:
            model.zero_grad(set_to_none=True)
            for number, pack in enumerate(of):
                step(model, pack, number).backward()

        return passes

    for case, of in cases.items():
        off = max(float((step(compiled, pack, 0) - step(plain, pack, 0)).detach().abs()) for pack in of)
        assert off < 1e-5, f"{name}: losses differ by {off:.1e}"
        row = paired(run(compiled, of), run(plain, of), seconds).row(f"{name}, {case}")
        kept, other = (saved_bytes(partial(step, model, of[0], 0), model) for model in (compiled, plain))
        print(f"{row} {kept / other:.2f} |", flush=True)


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="*", default=["wan_tiny", "hunyuan_tiny"], choices=list(PRESETS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20, help="time for the pairs of one row")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n{HEADER}\n{'|---' * 7}|")
    for name in arguments.preset:
        values = OmegaConf.load(PRESETS[name])
        del values["defaults"]
        config = OmegaConf.to_object(OmegaConf.merge(DiTConfig, values))
        print(f"| {name} | {recompilations(config, arguments.steps)}", flush=True)
    if arguments.seconds:
        print("\n| model, packs | compiled, s | uncompiled, s | times as fast (quartiles) | kept, of uncompiled |")
        print("|---" * 5 + "|")
        for name, config in TIMED.items():
            timed(name, config, arguments.seconds)


if __name__ == "__main__":
    main()

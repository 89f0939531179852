"""Steps of a DiT on gloo ranks: each ZeRO stage beside ZeRO 0, and the engine on one rank beside a bare loop.

python -m benchmarks.scaling [--ranks 2] [--pairs 20] [--width 256] [--tokens 390] [--stages 1 2 3]
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.pairing import Paired
from kinema.distributed.engine import Engine, Precision
from kinema.models.dit import DiT, DiTConfig, Extras
from kinema.training.optimizers.optim import AdamW
from tests.ranks import run_ranks

CHANNELS, TEXT, WORDS = 16, 256, 32
HEADER = "| what | the latter, s | the former, s | times the time (quartiles) |\n|---|---|---|---|"
KINDS = ("wall", "CPU")
WARM_UP = 3
"""Steps that are not counted: ZeRO 3 learns in them what to fetch ahead."""
Step = Callable[[], object]


def model(width: int) -> DiT:
    """Four blocks of Wan's kind."""
    torch.manual_seed(0)
    axes = [16, 24, 24]
    return DiT(DiTConfig(width=width, depth=4, num_heads=width // sum(axes), rope_axes=axes), CHANNELS, TEXT)


def loss_of(module: Callable[..., list[torch.Tensor]], tokens: int) -> Callable[[], torch.Tensor]:
    """The loss of one clip of so many tokens, in one row of patches."""
    latents = torch.randn(CHANNELS, 1, 2, 2 * tokens)
    words, times = torch.randn(WORDS, TEXT), torch.tensor([0.5])
    return lambda: module([latents], times, [words], Extras())[0].square().mean()


def engine_step(zero_stage: int, width: int, tokens: int) -> Step:
    """One step of the engine, gradient clipping and AdamW included."""
    module, optim = model(width), AdamW()
    engine = Engine(
        module, optim.build(module), zero_stage=zero_stage, precision=Precision.float32, accumulation=1,
        gradient_clipping=optim.gradient_clipping, blocks=module.all_blocks(),
    )  # fmt: skip
    loss = loss_of(engine, tokens)

    def step() -> None:
        engine.backward(loss())
        engine.step(1e-4)

    return step


def bare_step(width: int, tokens: int) -> Step:
    """The same by PyTorch alone."""
    module, optim = model(width), AdamW()
    optimizer, loss = optim.build(module), loss_of(module, tokens)

    def step() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(module.parameters(), optim.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()

    return step


def rows_of(name: str, former: Step, latter: Step, pairs: int) -> list[str]:
    """Both in turn, each first every other time; every rank does the same number. By the clock, and by CPU seconds."""
    spent: dict[Step, list[tuple[float, float]]] = {former: [], latter: []}
    for number in range(pairs + WARM_UP):
        for step in (former, latter) if number % 2 else (latter, former):
            dist.barrier()
            before = time.perf_counter(), time.process_time()
            step()
            after = time.perf_counter(), time.process_time()
            spent[step].append((after[0] - before[0], after[1] - before[1]))
    clocks = [zip(*spent[step][WARM_UP:], strict=True) for step in (latter, former)]
    return [Paired(*pair).row(f"{name}, {kind}") for kind, pair in zip(KINDS, zip(*clocks, strict=True), strict=True)]


def stages(chosen: list[int], width: int, tokens: int, pairs: int) -> list[str]:
    """On every rank: rows of the table."""
    replicated = engine_step(0, width, tokens)
    return [
        row
        for stage in chosen
        for row in rows_of(f"ZeRO {stage} over ZeRO 0", engine_step(stage, width, tokens), replicated, pairs)
    ]


def alone(width: int, tokens: int, pairs: int) -> list[str]:
    """On one rank."""
    return rows_of("engine over bare PyTorch", engine_step(0, width, tokens), bare_step(width, tokens), pairs)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 2), ("pairs", 20), ("width", 256), ("tokens", 390)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--stages", type=int, nargs="*", default=[1, 2, 3])
    given = parser.parse_args()
    sizes = (given.width, given.tokens, given.pairs)
    print(HEADER)
    print(*run_ranks(alone, 1, *sizes, timeout_seconds=3600)[0], sep="\n", flush=True)
    print(*run_ranks(stages, given.ranks, given.stages, *sizes, timeout_seconds=3600)[0], sep="\n")


if __name__ == "__main__":
    main()

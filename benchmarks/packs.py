"""A training step of the DiT on a pack in one pass, beside the same clip by clip.

python -m benchmarks.packs [--threads 1] [--seconds 20]
"""

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.pairing import paired
from kinema.models.dit import DiT, DiTConfig, ModulationSource, TextEdge
from kinema.models.dit.segments import Grid

CHANNELS, TEXT = 16, 256
SIZE = {"width": 384, "depth": 2, "num_heads": 6, "rope_axes": [24, 20, 20], "patch_size": [1, 2, 2]}
MODELS = {
    "cross": DiTConfig(**SIZE),
    "joint": DiTConfig(**SIZE, text=TextEdge.joint, modulation=ModulationSource.linear),
}
PACKS: dict[str, list[tuple[Grid, int]]] = {
    "4 alike": [((5, 12, 16), 40)] * 4,
    "mixed": [((1, 16, 16), 12), ((1, 32, 24), 70), ((3, 20, 32), 33), ((9, 16, 16), 51), ((2, 24, 12), 8)],
}
"""Name -> latent frames, rows and columns of each clip, and words of its caption."""

HEADER = (
    "| model, pack | tokens | in one pass, s | clip by clip, s | times as fast (quartiles) |\n|---|---|---|---|---|"
)


def step(model: DiT, clips: Sequence[tuple[Grid, int]], groups: Sequence[Sequence[int]]) -> Callable[[], None]:
    """Forward and backward of these clips, one group after the other."""
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(CHANNELS, *grid, generator=generator) for grid, _ in clips]
    text = [torch.randn(words, TEXT, generator=generator) for _, words in clips]
    times = torch.rand(len(clips), generator=generator)

    def loss(group: Sequence[int]) -> Tensor:
        found = model([latents[i] for i in group], times[list(group)], [text[i] for i in group])
        return torch.stack([clip.square().mean() for clip in found]).sum()

    def run() -> None:
        model.zero_grad(set_to_none=True)
        for group in groups:
            loss(group).backward()

    return run


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20, help="time for the pairs of one row")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n{HEADER}")
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = DiT(config, CHANNELS, TEXT)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
        for kind, clips in PACKS.items():
            everyone = range(len(clips))
            together, alone = step(model, clips, [everyone]), step(model, clips, [[i] for i in everyone])
            tokens = sum(t * h * w // 4 for (t, h, w), _ in clips)
            print(paired(together, alone, arguments.seconds).row(f"{name}, {kind} | {tokens:,}"), flush=True)


if __name__ == "__main__":
    main()

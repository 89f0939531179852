"""Forward and backward of each published transformer: ours beside diffusers' with the same weights.

python -m benchmarks.dit_step [--preset wan] [--tokens 780] [--threads 1] [--compile] [--seconds 20]
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from benchmarks.pairing import HEADER, paired
from benchmarks.saved import saved_bytes
from kinema.interop.comparing import CALLS, Sample, relative, words_of
from kinema.interop.preset import Preset
from kinema.interop.presets import PRESETS
from kinema.models.dit import DiT

SIZES: dict[str, dict[str, Any]] = {
    "wan": {"num_attention_heads": 3, "attention_head_dim": 128, "ffn_dim": 2240, "num_layers": 4, "text_dim": 1024},
    "ltx": {"num_attention_heads": 6, "num_layers": 4, "cross_attention_dim": 384, "caption_channels": 1024},
    "hunyuan": {
        "num_attention_heads": 3,
        "num_layers": 2,
        "num_single_layers": 4,
        "text_embed_dim": 1024,
    },
    "hunyuan15": {
        "num_attention_heads": 3,
        "num_layers": 4,
        "text_embed_dim": 1024,
        "text_embed_2_dim": 512,
        "image_embed_dim": 512,
    },
    "cogvideox": {"num_attention_heads": 6, "num_layers": 4, "time_embed_dim": 256, "text_embed_dim": 1024},
    "cosmos": {
        "num_attention_heads": 3,
        "num_layers": 4,
        "in_channels": 17,
        "text_embed_dim": 1024,
        "adaln_lora_dim": 64,
        "extra_pos_embed_type": None,
        "rope_scale": (1.0, 3.0, 3.0),
    },
}
"""Preset -> the released config made narrower and shallower; all else is as released."""

GRIDS = {780: (5, 12, 13), 1950: (5, 15, 26)}
"""Tokens of a clip -> their grid."""


@dataclass(frozen=True)
class Pair:
    """One step of each model: forward, a sum against fixed weights, and backward."""

    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    models: tuple[DiT, nn.Module]

    def step(self, forward: Callable[[], Tensor]) -> Callable[[], None]:
        """Forward and backward of one of them; gradients begin anew each time."""

        def step() -> None:
            for model in self.models:
                model.zero_grad(set_to_none=True)
            forward().square().mean().backward()

        return step


def make_pair(preset: Preset, tokens: int, compiled: bool) -> Pair:
    """Both models with the same random weights, on the same clip."""
    torch.manual_seed(0)
    reference = getattr(diffusers, preset.reference)(**SIZES[preset.name])
    config = dict(reference.config)
    for parameter in reference.parameters():  # a gate that starts at zero would leave no backward to time
        nn.init.normal_(parameter, std=0.02)
    ours = preset.build(config)
    assert isinstance(ours, DiT)
    ours.load_state_dict(preset.key_map(config).to_ours(reference.state_dict()))
    sample = one_clip(Sample.of(ours, max(words_of(config), 128), tokens=GRIDS[tokens]))
    call = CALLS[preset.reference]
    run_ours: Any = torch.compile(ours) if compiled else ours
    run_theirs: Any = torch.compile(reference) if compiled else reference
    extras = sample.extras()
    return Pair(
        lambda: torch.stack(run_ours(list(sample.latents), sample.timesteps, list(sample.text), extras)),
        lambda: call(run_theirs, config, sample),
        (ours, reference),
    )


def one_clip(sample: Sample) -> Sample:
    """The first of the two."""
    given = {field.name: getattr(sample, field.name) for field in fields(sample)}
    return Sample(**{name: None if value is None else value[:1] for name, value in given.items()})


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="both under torch.compile")
    parser.add_argument("--seconds", type=float, default=20, help="time for the pairs of one row")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads")
    print(HEADER.replace("|\n", "| saved B a token | of diffusers' |\n") + "---|---|")
    for name in arguments.preset:
        (preset,) = (preset for preset in PRESETS if preset.name == name)
        for tokens in arguments.tokens:
            pair = make_pair(preset, tokens, arguments.compile)
            difference = relative(pair.ours(), pair.theirs())
            assert difference < 1e-5, f"{name}: outputs differ by {difference:.1e}"
            kept, other = saved_bytes(pair.ours, pair.models[0]), saved_bytes(pair.theirs, pair.models[1])
            row = paired(pair.step(pair.ours), pair.step(pair.theirs), arguments.seconds).row(f"{name}, {tokens}")
            print(f"{row} {kept // tokens:,} | {kept / other:.2f} |", flush=True)


if __name__ == "__main__":
    main()

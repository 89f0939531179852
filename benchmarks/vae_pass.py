"""Encoding and decoding with published autoencoders: ours beside diffusers' with the same weights.

    python -m benchmarks.vae_pass [--frames 9] [--side 128] [--threads 1] [--seconds 20]

Both work through the clip in chunks of one latent frame, the only way that diffusers has. Time is of pairs in turn;
memory is the growth of the process' peak in a fork of its own, with all that a kernel borrows for itself.
"""

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks.pairing import HEADER, paired
from kinema.interop.comparing import relative
from kinema.interop.presets import PRESETS
from kinema.models.vae import CausalVAE

WAN = {"base_dim": 32, "z_dim": 16}
"""The released shape at a third of its width."""


def make_pair() -> tuple[CausalVAE, Any]:
    """Both autoencoders with the same random weights."""
    torch.manual_seed(0)
    (preset,) = (preset for preset in PRESETS if preset.name == "wan_vae")
    theirs = getattr(diffusers, preset.reference)(**WAN).eval()
    config = dict(theirs.config)
    ours = preset.build(config)
    assert isinstance(ours, CausalVAE)
    ours.load_state_dict(preset.key_map(config).to_ours(theirs.state_dict()))
    return ours.eval(), theirs


def encode(ours: CausalVAE, video: Tensor) -> Tensor:
    """Frame 0 alone, then four by four -> normalised means."""
    stride = ours.config.temporal_stride
    plan = [1] + [stride] * ((video.shape[2] - 1) // stride)
    return torch.cat([part.mean for part in ours.encode_chunks(video.split(plan, dim=2))], dim=2)


def decode(ours: CausalVAE, latents: Tensor) -> Tensor:
    """Latent frame by latent frame -> video."""
    return torch.cat(list(ours.decode_chunks(latents.split(1, dim=2))), dim=2)


def peak_growth(function: Callable[[], object]) -> int:
    """Bytes by which the resident memory of a fork grows at most while it calls the function."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        before = _status("VmRSS")
        function()
        os.write(write, str(_status("VmHWM") - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(read, 100))


def _status(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


@torch.inference_mode()
def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20, help="time for the pairs of one row")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ours, theirs = make_pair()
    video = torch.rand(1, 3, arguments.frames, arguments.side, arguments.side) * 2 - 1
    mean, std = ours.latent_mean.view(-1, 1, 1, 1), ours.latent_std.view(-1, 1, 1, 1)
    latents = torch.randn(1, *ours.latent_shape(*video.shape[2:]))
    rows: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "encode": (lambda: encode(ours, video), lambda: (theirs.encode(video).latent_dist.mean - mean) / std),
        "decode": (lambda: decode(ours, latents), lambda: theirs.decode(latents * std + mean).sample),
    }
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads")
    print(HEADER.replace("|\n", "| peak MB | of diffusers' |\n") + "---|---|")
    # Before anything else has run: what a process has freed but kept would hide in the growth.
    memory = {name: [peak_growth(function) for function in both] for name, both in rows.items()}
    for name, both in rows.items():
        difference = relative(both[0](), both[1]())
        assert difference < 1e-5, f"{name}: outputs differ by {difference:.1e}"
        row = paired(*both, arguments.seconds).row(name)
        mine, other = memory[name]
        print(f"{row} {mine / 1e6:.0f} | {mine / other:.2f} |", flush=True)


if __name__ == "__main__":
    main()

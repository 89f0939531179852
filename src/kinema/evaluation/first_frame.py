"""`kinema first-frame`: held-out clips sampled from their captions and first frames, and how well they begin."""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kinema.conditioning.frames import CleanFrame
from kinema.data.dataset.shards import DatasetIndex, read_member
from kinema.data.decode.decoding import Decoder, decode_clip
from kinema.data.geometry import ClipShape
from kinema.data.pixels import to_model_range, to_uint8
from kinema.data.verbs.contact_sheet import contact_sheet
from kinema.models.vae import CausalVAE
from kinema.sampling.pipeline import SamplingConfig
from kinema.sampling.sample import load_pipeline
from kinema.training.records.pictures import psnr_per_frame
from kinema.training.run_folder import Weights, checkpoint_of

SHOWN = 6
"""Clips that the picture shows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("run", help="run folder or checkpoint of a task=dit training with given frames")
    parser.add_argument("data", help="folder of shards, for example data/toy")
    parser.add_argument("--split", default="heldout", help="split of the clips (default %(default)s)")
    parser.add_argument("--clips", type=int, default=24, help="how many (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of the solver (default %(default)s)")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance scale (default %(default)s)")
    parser.add_argument("--out", required=True, help="picture to write")
    parser.add_argument("--at-least", type=float, default=30.0, help="decibels that pass (default %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Sample with the first frame and without, write strips; the verdict is PASS or FAIL."""
    loaded = load_pipeline(checkpoint_of(arguments.run, "run"), Weights.ema)
    pipeline, shape = loaded.pipeline, loaded.pipeline.shapes[0]
    if not isinstance(pipeline.condition, CleanFrame) or not isinstance(pipeline.vae, CausalVAE):
        raise ValueError(f"run={arguments.run} was trained with condition={pipeline.condition.name}, not clean_frame.")
    captions, clips = heldout(Path(arguments.data), arguments.split, arguments.clips, shape, pipeline.fps)
    config = SamplingConfig(num_steps=arguments.steps, guidance_scale=arguments.guidance)
    pipeline.check(config, shape, images=1)
    given = pipeline.videos(captions, shape, config, images=[clip[:1] for clip in clips])
    free = pipeline.videos(captions, shape, config)
    firsts = [psnr(video[:1], reconstruction(pipeline.vae, clip[:1])) for video, clip in zip(given, clips, strict=True)]
    after, without = ([psnr(x[1:], y[1:]) for x, y in zip(videos, clips, strict=True)] for videos in (given, free))
    rows = []
    for caption, clip, video, decibels in zip(captions, clips, given, after, strict=True):
        rows += [
            (clip.numpy(), f"the clip: {caption}"),
            (video.numpy(), f"from its first frame, {decibels:.1f} dB after it"),
        ]
    contact_sheet(rows[: 2 * SHOWN], arguments.out, columns=2, title=f"held-out clips, {loaded.describe()}")
    passed = min(firsts) >= arguments.at_least
    print(
        f"{len(clips)} held-out clips: the first frame against the given image through the VAE, PSNR at worst "
        f"{min(firsts):.1f} dB (needed {arguments.at_least:g}); the frames after it against the clip's "
        f"{np.mean(after):.1f} dB, without the image {np.mean(without):.1f} dB "
        f"{'PASS' if passed else 'FAIL'} {arguments.out}"
    )
    return 0 if passed else 1


def heldout(data: Path, split: str, count: int, shape: ClipShape, fps: float) -> tuple[list[str], list[Tensor]]:
    """Captions and clips uint8 (T, H, W, 3) of the first `count` clips of a split that have this aspect ratio."""
    index = DatasetIndex.load(data, split=split)
    fitting = [e for e in index.entries if e.record.width * shape.height == e.record.height * shape.width][:count]
    clips = [decode_clip(read_member(index.folder, entry, "mp4"), shape, fps, 0.0, Decoder.decord) for entry in fitting]
    return [entry.record.caption for entry in fitting], clips


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over frames uint8 (T, H, W, 3) of their PSNR in dB; 100 where they are equal."""
    return float(np.mean(psnr_per_frame(a, b)))


@torch.no_grad()
def reconstruction(vae: CausalVAE, image: Tensor) -> Tensor:
    """An image uint8 (1, H, W, 3) through the VAE."""
    return to_uint8(vae.decode(vae.encode(to_model_range(image)[None]).mean)[0])

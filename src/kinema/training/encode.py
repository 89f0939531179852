"""`kinema data encode`: every training clip's posterior, computed once, so that the DiT trains without the VAE."""

import argparse

import torch
from torch import Tensor
from tqdm import tqdm

from kinema.data.dataset.shards import DatasetIndex
from kinema.data.decode.decoding import Decoder
from kinema.data.geometry import ClipShape, Geometry
from kinema.data.packs.latents import write_latents
from kinema.data.pixels import to_model_range
from kinema.data.steps.candidates import plan_clips
from kinema.training.run_folder import Weights, checkpoint_of, load_vae


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("data", help="folder of shards, for example data/toy")
    parser.add_argument("--vae", required=True, help="run folder of the trained VAE")
    parser.add_argument("--weights", choices=[w.value for w in Weights], default="ema", help="which weights of it")
    parser.add_argument("--out", required=True, help="folder to write, a new one; data.latents names it in training")
    parser.add_argument(
        "--shape", action="append", required=True, metavar="FxHxW", help="clip shape; repeat for several"
    )
    parser.add_argument("--fps", type=float, default=8.0, help="frames per second (default %(default)s)")
    parser.add_argument("--split", default="train", help="split to encode (default %(default)s)")
    parser.add_argument(
        "--windows", type=int, default=1, help="windows a clip, spread over its length (default 1, its start)"
    )
    parser.add_argument("--decoder", choices=[d.value for d in Decoder], default="decord")


def run(arguments: argparse.Namespace) -> int:
    """Encode, with a progress bar; the verdict says how many clips could not be read."""
    vae, identity = load_vae(checkpoint_of(arguments.vae, "--vae"), Weights(arguments.weights))
    shapes = [ClipShape(*map(int, shape.split("x"))) for shape in arguments.shape]
    index = DatasetIndex.load(arguments.data, split=arguments.split)
    clips, kept = plan_clips(index, shapes, arguments.fps, Geometry(*vae.geometry_strides, (1, 1, 1)))

    @torch.no_grad()
    def encode(frames: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(to_model_range(frames)[None])
        return posterior.mean[0], posterior.logvar[0]

    failures = write_latents(
        arguments.out,
        index,
        tqdm(clips, desc="encoding", unit="clip", dynamic_ncols=True),  # type: ignore[arg-type]
        encode,
        vae_hash=identity["hash"],
        shapes=shapes,
        fps=arguments.fps,
        decoder=Decoder(arguments.decoder),
        windows_per_clip=arguments.windows,
    )
    for key, reason in failures.items():
        print(f"could not encode {key}: {reason}")
    print(f"{kept.line()}; encoded {len(clips) - len(failures)}/{len(clips)} READY {arguments.out}")
    return 0

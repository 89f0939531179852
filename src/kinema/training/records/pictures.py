"""Pictures of a run that a person must judge: samples, reconstructions, and where the training timesteps lie."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kinema.data.decode.encoding import write_video
from kinema.data.geometry import ClipShape, Geometry
from kinema.data.packs.pack import Pack
from kinema.data.pixels import to_model_range, to_uint8
from kinema.data.verbs.contact_sheet import contact_sheet
from kinema.diffusion.objective import Objective
from kinema.diffusion.solvers import visited_timesteps
from kinema.diffusion.timesteps import realised_histogram
from kinema.models.vae import CausalVAE
from kinema.sampling.conditioner import shown_frames
from kinema.sampling.images import fit_images, read_image
from kinema.sampling.pipeline import Pipeline
from kinema.training.checkpoints.store import write_json
from kinema.training.dit_task import SamplesConfig
from kinema.training.finetune import assign


@dataclass
class SampleMaker:
    """Samples from the averaged weights through the sampler's own pipeline, whose denoiser is a float32 twin."""

    pipeline: Pipeline
    config: SamplesConfig
    run_dir: Path
    shape: ClipShape = field(init=False)
    settings: str = field(init=False)
    """One line for the run's header."""
    images: list[Tensor] | None = field(init=False, default=None)
    """What each video is given."""

    def __post_init__(self) -> None:
        of = self.config
        self.settings = f"samples every {of.every_steps} steps: {of.describe()}, seed {of.seed}"
        self.shape = ClipShape(*self.config.shape) if self.config.shape else self.pipeline.shapes[0]
        if self.config.prompts and self.config.every_steps:
            count = len(of.images) // len(of.prompts)
            self.pipeline.check(self.config, self.shape, images=count)  # before training, not at the first sample
        if of.images:
            read = [[read_image(path, "task.samples.images") for path in paths] for paths in of.images_of_prompts()]
            self.images = [fit_images(pictures, self.shape, tqdm.write) for pictures in read]

    def __call__(self, step: int, weights: dict[str, Tensor]) -> dict[str, Any] | None:
        """Write one video a prompt and a contact sheet; returns the record for the metrics."""
        prompts = list(self.config.prompts)
        if not prompts:
            return None
        assign(self.pipeline.denoiser, weights)
        videos = self.pipeline.videos(prompts, self.shape, self.config, images=self.images)
        folder = self.run_dir / "samples" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{i:02d}.mp4" for i in range(len(videos))]
        for path, frames, prompt in zip(paths, videos, prompts, strict=True):
            write_video(path, frames, self.pipeline.fps, metadata={"title": prompt})
        rows = [(frames.numpy(), prompt) for frames, prompt in zip(videos, prompts, strict=True)]
        contact_sheet(rows, folder / "sheet.png")
        return {
            "kind": "sample",
            "videos": [str(path.relative_to(self.run_dir)) for path in paths],
            "sheet": str((folder / "sheet.png").relative_to(self.run_dir)),
            "prompts": prompts,
        }


@dataclass
class StripMaker:
    """Original, reconstruction and difference of held-out clips, with PSNR by frame."""

    vae: CausalVAE
    packs: list[list[Pack]]
    run_dir: Path
    clips: int

    @torch.no_grad()
    def __call__(self, step: int, weights: dict[str, Tensor]) -> dict[str, Any] | None:
        """Write the strips; returns the record for the metrics."""
        frames = [clip for packs in self.packs for pack in packs for clip in pack.frames or []][: self.clips]
        if not frames:
            return None
        self.vae.load_state_dict(weights)
        device = next(self.vae.parameters()).device
        rows, psnrs = [], []
        for original in frames:
            latents = self.vae.encode(to_model_range(original.to(device))[None]).mean
            restored = to_uint8(self.vae.decode(latents)[0]).cpu()
            difference = (restored.float() - original.float()).abs()
            psnrs.append(psnr_per_frame(restored, original))
            mean = float(np.mean(psnrs[-1]))
            rows += [
                (original.numpy(), "original"),
                (restored.numpy(), f"reconstruction, PSNR {mean:.1f} dB"),
                ((difference * 10).clamp(0, 255).to(torch.uint8).numpy(), "difference x 10"),
            ]
        sheet = self.run_dir / "vae_strips" / f"step-{step:08d}.png"
        sheet.parent.mkdir(exist_ok=True)
        contact_sheet(rows, sheet)
        shortest = min(len(values) for values in psnrs)
        return {
            "kind": "reconstruction",
            "sheet": str(sheet.relative_to(self.run_dir)),
            "psnr": float(np.mean([np.mean(values) for values in psnrs])),
            "psnr_per_frame": np.mean([values[:shortest] for values in psnrs], axis=0).tolist(),
        }


@dataclass
class OverfitCheck:
    """Whether a model that saw one clip only samples that clip: is everything wired correctly?"""

    pipeline: Pipeline
    config: SamplesConfig
    caption: str
    clip: Tensor
    """uint8 (T, H, W, 3)."""
    run_dir: Path
    samples: int = 4
    tolerance_db: float = 2.0

    @torch.no_grad()
    def __call__(self, weights: dict[str, Tensor]) -> tuple[bool, str]:
        """Passed, and the verdict in words: PSNR of samples beside that of the VAE's own reconstruction."""
        assign(self.pipeline.denoiser, weights)
        frames, height, width, _ = self.clip.shape
        shape, count = ClipShape(frames, height, width), self.pipeline.condition.num_images()
        images = [shown_frames(self.clip, count)] * self.samples
        videos = self.pipeline.videos([self.caption] * self.samples, shape, self.config, images=images)
        device = next(self.pipeline.vae.parameters()).device
        latents = self.pipeline.vae.encode(to_model_range(self.clip.to(device))[None]).mean
        restored = to_uint8(self.pipeline.vae.decode(latents)[0]).cpu()
        ceiling = float(np.mean(psnr_per_frame(restored, self.clip)))
        reached = min(float(np.mean(psnr_per_frame(video, self.clip))) for video in videos)
        rows = [
            (self.clip.numpy(), "the clip"),
            (restored.numpy(), f"through the VAE, PSNR {ceiling:.1f} dB"),
        ]
        rows += [(video.numpy(), f"sample, seed {self.config.seed + i}") for i, video in enumerate(videos)]
        contact_sheet(rows, self.run_dir / "overfit.png")
        passed = reached >= ceiling - self.tolerance_db
        return passed, (
            f"{'PASS' if passed else 'FAIL'} worst of {self.samples} samples against the clip: PSNR {reached:.1f} dB; "
            f"the VAE itself reaches {ceiling:.1f} dB, and {self.tolerance_db:g} dB less would pass. "
            f"{self.run_dir / 'overfit.png'}"
        )


def psnr_per_frame(a: Tensor, b: Tensor) -> list[float]:
    """Peak signal-to-noise ratio in dB of each frame of uint8 clips (T, H, W, 3); 100 where they are equal."""
    error = (a.float() - b.float()).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(255.0**2 / error.clamp(min=255.0**2 / 1e10))).tolist()


def save_timesteps(
    run_dir: Path,
    objective: Objective,
    samples: SamplesConfig,
    geometry: Geometry,
    shapes: list[ClipShape],
    timestep_range: tuple[float, float],
) -> None:
    """`timesteps.json`: the realised histogram of training timesteps in a range beside the sampler's grid."""
    tokens = geometry.num_tokens(shapes[0])
    grid = visited_timesteps(
        objective,
        samples.solver,
        samples.num_steps,
        shift=samples.timestep_shift,
        spacing=samples.timestep_spacing,
        terminal=samples.timestep_terminal,
        scheduler=samples.scheduler,
        num_tokens=tokens,
    )
    histogram = realised_histogram(objective, grid, timestep_range=timestep_range, num_tokens=tokens)
    write_json(run_dir / "timesteps.json", histogram)

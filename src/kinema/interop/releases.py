"""What a release says beside its weights: schedule and shift, frame rate, and the shapes that it was made for."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kinema.conditioning.frames import FrameCondition
from kinema.conditioning.text import CombinedText, PretrainedText
from kinema.diffusion.objective import Objective
from kinema.identity import to_plain
from kinema.interop.captions import CAPTIONS
from kinema.interop.given import published_condition
from kinema.interop.preset import Record
from kinema.interop.reading import read_json
from kinema.interop.schedulers import scheduled
from kinema.sampling.pipeline import SamplingConfig


@dataclass(frozen=True)
class Release:
    """How a published pipeline is meant to be sampled."""

    objective: Objective
    sampling: SamplingConfig
    fps: float
    shapes: tuple[tuple[int, int, int], ...]
    guidance_dropout: float
    strides: tuple[int, int] | None
    """Of a VAE that Kinema cannot be."""
    text: PretrainedText | CombinedText
    """How captions are encoded; `path` is what its encoders are called."""
    condition: FrameCondition
    """Frames that its pipeline gives; the path of an image encoder is what it is called."""

    def manifest(self) -> dict[str, Any]:
        """Its part of a manifest."""
        return {
            "objective": to_plain(self.objective),
            "sampling": to_plain(self.sampling),
            "fps": self.fps,
            "shapes": [list(shape) for shape in self.shapes],
            "guidance_dropout": self.guidance_dropout,
            "condition": to_plain(self.condition),
        }


@dataclass(frozen=True)
class Habits:
    """What no file of a pipeline says: these are facts of its paper or its model card."""

    fps: float
    shapes: tuple[tuple[int, int, int], ...]
    num_steps: int
    guidance_scale: float
    gives_sigmas: bool
    """Whether the pipeline hands the scheduler evenly spaced timesteps, or leaves them to it."""
    embedded_guidance: float | None = None
    guidance_scale_low: float | None = None
    """Of the second transformer, where there are two."""
    strides: tuple[int, int] | None = None
    """Frames and pixels a side of a latent, of a VAE that Kinema cannot be: its latents are sampled, no frames."""


WAN = Habits(
    fps=16.0,
    shapes=((81, 480, 832), (81, 720, 1280)),
    num_steps=50,
    guidance_scale=5.0,
    gives_sigmas=False,
)
WAN_PAIR = replace(WAN, num_steps=40, guidance_scale=4.0, guidance_scale_low=3.0)
WAN_IMAGE_PAIR = replace(WAN, num_steps=40, guidance_scale=3.5, guidance_scale_low=3.5)
WAN_SMALL = replace(WAN, fps=24.0, shapes=((121, 704, 1280),))
HABITS = {
    "WanPipeline": WAN,
    "WanImageToVideoPipeline": WAN,
    "HunyuanVideoPipeline": Habits(
        fps=24.0,
        shapes=((129, 720, 1280), (129, 544, 960)),
        num_steps=50,
        guidance_scale=1.0,
        gives_sigmas=True,
        embedded_guidance=6.0,
    ),
    "LTXPipeline": Habits(
        fps=25.0,
        shapes=((161, 512, 704), (121, 480, 704)),
        num_steps=50,
        guidance_scale=3.0,
        gives_sigmas=True,
        strides=(8, 32),
    ),
    "LattePipeline": Habits(
        fps=8.0,
        shapes=((16, 512, 512),),
        num_steps=50,
        guidance_scale=7.5,
        gives_sigmas=False,
        strides=(1, 8),
    ),
    "CogVideoXPipeline": Habits(
        fps=8.0,
        shapes=((49, 480, 720),),
        num_steps=50,
        guidance_scale=6.0,
        gives_sigmas=False,
        strides=(4, 8),
    ),
}
"""Pipeline class of the reference -> its habits."""


def habits_of(index: Record) -> Habits:
    """The habits of a pipeline by its model_index.json: Wan 2.2 has classes in common with Wan 2.1."""
    name = index["_class_name"]
    if index.get("boundary_ratio") is not None:
        return {"WanPipeline": WAN_PAIR, "WanImageToVideoPipeline": WAN_IMAGE_PAIR}[name]
    return WAN_SMALL if index.get("expand_timesteps") else HABITS[name]


def release_of(pipeline: Path) -> Release | None:
    """The release of a pipeline's folder: its own scheduler decides the shift. None for one that we cannot sample."""
    index = read_json(pipeline / "model_index.json")
    name = index.get("_class_name", "")
    if name not in HABITS:
        return None
    habits = habits_of(index)
    config = read_json(pipeline / "scheduler" / "scheduler_config.json")
    objective, sampling = scheduled(config, gives_sigmas=habits.gives_sigmas)
    settings = SamplingConfig(
        num_steps=habits.num_steps,
        guidance_scale=habits.guidance_scale,
        guidance_scale_low=habits.guidance_scale_low,
        embedded_guidance=habits.embedded_guidance,
        **sampling,
    )
    condition = published_condition(index, read_json(pipeline / "transformer" / "config.json"))
    return Release(objective, settings, habits.fps, habits.shapes, 0.1, habits.strides, CAPTIONS[name], condition)

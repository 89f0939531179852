"""What a job trains on and with, as far as its configuration and the files that it names tell before it starts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinema.conditioning.text import CombinedText, HashText, PretrainedText, build_text_encoder
from kinema.config import Config
from kinema.data.geometry import Geometry
from kinema.data.steps.plan import lanes_of
from kinema.distributed.mesh import data_ranks
from kinema.identity import from_plain
from kinema.models.vae import VAEConfig
from kinema.training.dit_task import DiTTaskConfig
from kinema.training.run_folder import checkpoint_of


@dataclass(frozen=True)
class Given:
    """A pack's clips, and what a configuration leaves to the files that it names; defaults are what is assumed."""

    shape: Sequence[int] | None = None
    """Frames, height, width; None is the first of `data.shapes`."""
    clips: int | None = None
    """None is as many as `data.max_pack_tokens` allows."""
    strides: Sequence[int] = (4, 8)
    """Of the VAE, in time and space."""
    latent_channels: int = 16
    text_width: int = 4096
    text_tokens: int = 512


def given_by(config: Config, typed: Mapping[str, Any] | None = None, assumed: list[str] | None = None) -> Given:
    """The largest clips, as many as come to a lane, and what the files that the job reads say of their latents.

    `typed` are fields of Given that need not be looked for. What is not there raises ValueError; with a list
    `assumed` it is assumed instead, and told in it. What is there but damaged raises always.
    """
    found, largest = dict(typed or {}), max(config.data.shapes, key=math.prod)
    if not isinstance(config.task, DiTTaskConfig):
        geometry = Geometry(config.vae.temporal_stride, config.vae.spatial_stride, (1, 1, 1))
        shape = found.get("shape") or config.task.crop or largest
        return Given(shape, found.get("clips") or _clips(config, geometry, found.get("shape") or largest))
    found.setdefault("shape", largest)
    if missing := {"strides", "latent_channels"} - found.keys():
        found |= _latents(config, missing, assumed)
    if "text_width" not in found:
        found["text_width"] = text_width(config, assumed)
    found.setdefault("text_tokens", config.text.max_tokens)
    if "clips" not in found:
        geometry = Geometry(found["strides"][0], found["strides"][1], tuple(config.model.patch_size))
        found["clips"] = _clips(config, geometry, found["shape"])
    return Given(**found)


def lanes_of_rank(config: Config, ranks: int) -> int:
    """How many lanes each of so many ranks serves; ValueError where a run would not start with them."""
    return len(lanes_of(0, data_ranks(ranks, config.parallel.sequence_degree), config.data.lanes))


def text_width(config: Config, assumed: list[str] | None = None) -> int:
    """Width of the embeddings; raises ValueError, or assumes one, where only the loaded encoder tells it."""
    text = config.text
    if isinstance(text, HashText):
        return build_text_encoder(text).width
    if isinstance(text, PretrainedText) and (assumed is None or Path(text.path).is_dir()):
        from transformers import AutoConfig

        told = AutoConfig.from_pretrained(text.path)
        return int(getattr(told, "text_config", told).hidden_size)
    if assumed is None:
        raise ValueError("several text encoders at once: their width is known when they are loaded, at the start.")
    why = "several encoders" if isinstance(text, CombinedText) else "text.path is no folder"
    assumed.append(f"--text-width {Given.text_width} ({why})")
    return Given.text_width


def _latents(config: Config, missing: set[str], assumed: list[str] | None) -> dict[str, Any]:
    """What is missing of strides and channels of the VAE that the job reads."""
    if assumed is not None and not Path(config.vae.path).exists():
        words = {"strides": f"--strides {Given.strides[0]} {Given.strides[1]}",
                 "latent_channels": f"--latent-channels {Given.latent_channels}"}  # fmt: skip
        assumed += [f"{words[name]} (vae.path={config.vae.path} is not there)" for name in sorted(missing)]
        return {name: getattr(Given, name) for name in missing}
    manifest = checkpoint_of(config.vae.path, "vae.path").document("manifest")
    vae = from_plain(manifest["vae"]["config"], VAEConfig)
    told = {"strides": (vae.temporal_stride, vae.spatial_stride), "latent_channels": vae.latent_channels}
    return {name: told[name] for name in missing}


def _clips(config: Config, geometry: Geometry, shape: Sequence[int]) -> int:
    """Clips of this shape in a lane of a step."""
    fitting = config.data.max_pack_tokens // math.prod(geometry.token_grid(geometry.check(shape)))
    clips = fitting if config.data.tokens_per_step else math.ceil(config.data.clips_per_step / config.data.lanes)
    return max(1, min(clips, fitting))

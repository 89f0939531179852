"""What a model is given, held against what it was built for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kinema.models.dit.config import DiTConfig
from kinema.models.dit.extras import Extras, Sound
from kinema.models.dit.packed import EARS
from kinema.models.dit.timesteps import Timesteps

GIVEN = {"condition_channels": "channels", "control_channels": "control"}
"""Key of the config -> latents of a clip's own size that it makes the model demand."""

EXTRAS = {
    **GIVEN,
    "image_width": "image",
    "glyph_width": "glyphs",
    "pooled_width": "pooled",
    "guidance": "guidance",
    "audio": "audio",
    "ofs_channels": "ofs",
}
"""Key of the config -> what it makes the model demand."""


def check_pack(
    config: DiTConfig,
    channels: int,
    text_width: int,
    latents: Sequence[Tensor],
    timesteps: Timesteps,
    text: Sequence[Tensor],
) -> None:
    """Refuse latents of other `channels`, captions of another width, and timesteps of another shape or precision."""
    if not len(latents) == len(timesteps) == len(text) > 0:
        raise ValueError(
            f"the model got {len(latents)} clips, {len(timesteps)} timesteps, {len(text)} captions: it "
            "needs one timestep and one caption for each clip, and at least one clip."
        )
    for clip in latents:
        if clip.ndim != 4 or clip.shape[0] != channels:
            raise ValueError(
                f"a clip of latents has shape {tuple(clip.shape)} where the model was built for "
                f"(C={channels}, T, H, W)."
            )
    for times in [timesteps] if isinstance(timesteps, Tensor) else timesteps:
        if times.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"timesteps have dtype {times.dtype}: keep them float32, half precision merges some.")
    if not isinstance(timesteps, Tensor):
        for clip, times in zip(latents, timesteps, strict=True):
            frames = clip.shape[1] // config.patch_size[0]
            if times.shape != (frames,):
                raise ValueError(
                    f"timesteps of shape {tuple(times.shape)} for a clip of {clip.shape[1]} latent frames: each "
                    f"frame of tokens needs one, ({frames},) with model.patch_size={config.patch_size}."
                )
    for caption in text:
        if caption.ndim != 2 or caption.shape[1] != text_width or len(caption) == 0:
            raise ValueError(
                f"text embeddings have shape {tuple(caption.shape)}, the model was built for "
                f"(L >= 1, {text_width}). An empty caption is the encoder's null text, never empty."
            )


def check_extras(config: DiTConfig, latents: Sequence[Tensor], extras: Extras) -> None:
    """Refuse conditions that are missing, that the model was not built for, or of another shape than the clips'."""
    for key, name in EXTRAS.items():
        built, given = getattr(config, key), getattr(extras, name)
        may = name == "audio" and config.audio_channels
        if bool(built) != (given is not None) and not may:
            raise ValueError(
                f"model.{key}={built} but extras.{name} is {'missing' if built else 'given'}: a model reads "
                "exactly the conditions that it was built for."
            )
        if given is not None and len(given) != len(latents):
            raise ValueError(f"extras.{name} has {len(given)} entries for {len(latents)} clips.")
    if extras.fps is not None and (not config.rope_fps or len(extras.fps) != len(latents)):
        raise ValueError(
            f"extras.fps has {len(extras.fps)} entries for {len(latents)} clips and model.rope_fps="
            f"{config.rope_fps}: only a model with rope_fps above zero reads rates, one a clip."
        )
    _check_sound(config, extras.audio)
    for key, name in GIVEN.items():
        for clip, given in zip(latents, getattr(extras, name) or [], strict=getattr(extras, name) is not None):
            expected = (getattr(config, key), *clip.shape[1:])
            if given.shape != expected:
                raise ValueError(f"extras.{name} has shape {tuple(given.shape)} for a clip that needs {expected}.")
    for image in extras.image or []:
        if config.image_positions not in (0, len(image)):
            raise ValueError(
                f"extras.image has {len(image)} tokens, the model has places for exactly model.image_positions="
                f"{config.image_positions}."
            )
        least = 0 if "image" in config.caption_sources else 1
        if image.ndim != 2 or image.shape[1] != config.image_width or len(image) < least:
            raise ValueError(
                f"extras.image has shape {tuple(image.shape)} where the model was built for "
                f"(L >= {least}, {config.image_width})."
            )
    for glyphs in extras.glyphs or []:
        if glyphs.ndim != 2 or glyphs.shape[1] != config.glyph_width:
            raise ValueError(
                f"extras.glyphs has shape {tuple(glyphs.shape)} where the model was built for "
                f"(L >= 0, {config.glyph_width})."
            )


def _check_sound(config: DiTConfig, sound: Sound | None) -> None:
    """Refuse sound of another kind than the model's; the tower of model.audio looks at the rest itself."""
    channels = config.audio_channels
    if sound is None:
        return
    if (sound.text is None) is not bool(channels):
        raise ValueError(
            f"extras.audio.text is {'missing' if sound.text is None else 'given'}: a tower (model.audio) has "
            "captions of its own, model.audio_channels reads the clip's."
        )
    if not channels:
        return
    for clip in sound.latents:
        if clip.ndim != 3 or clip.shape[0] != channels or clip.shape[2] != EARS or not clip.numel():
            raise ValueError(
                f"extras.audio has latents of shape {tuple(clip.shape)} where the model was built for "
                f"(model.audio_channels={channels}, T >= 1, {EARS})."
            )
    if not isinstance(sound.timesteps, Tensor) or sound.timesteps.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "extras.audio.timesteps must be one tensor (B,) of float32 or float64: with model.audio_channels all "
            "sound of a clip has one timestep."
        )

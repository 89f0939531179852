"""What some models are told of a clip beside its latents, timestep and caption."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Sound:
    """The second stream of a pack: one entry for each clip, as the model takes the video."""

    latents: Sequence[Tensor]
    """(channels, T) each; (audio_channels, T, 2), left and right, with model.audio_channels."""
    timesteps: Tensor | Sequence[Tensor]
    """(B,), or (T,) for each clip."""
    text: Sequence[Tensor] | None = None
    """What the sound is told, (L, text_width) each; None with model.audio_channels, which reads the clip's caption."""

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, clips: Sequence[int]) -> "Sound":
        """The same for these clips, in this order."""
        times = self.timesteps[list(clips)] if isinstance(self.timesteps, Tensor) else _take(self.timesteps, clips)
        return Sound(_take(self.latents, clips), times, None if self.text is None else _take(self.text, clips))


@dataclass(frozen=True)
class Extras:
    """One entry for each clip of the pack; a model demands those that its config names and refuses the others."""

    channels: Sequence[Tensor] | None = None
    """Given latents (condition_channels, T, H, W), concatenated to the noisy ones."""
    image: Sequence[Tensor] | None = None
    """Image tokens (L, image_width); none at all, (0, image_width), only where they join the caption."""

    pooled: Sequence[Tensor] | None = None
    """One vector (pooled_width,) for the caption."""
    guidance: Sequence[float] | None = None
    """Strength of guidance, for example 6.0."""
    glyphs: Sequence[Tensor] | None = None
    """Words that shall be seen in the picture, letter by letter (L, glyph_width); (0, glyph_width) for none."""
    control: Sequence[Tensor] | None = None
    """Given latents (control_channels, T, H, W) that the control tower reads."""
    ofs: Sequence[float] | None = None
    """A number that CogVideoX 1.5 embeds like a timestep; its release was made with 2.0."""
    fps: Sequence[float] | None = None
    """Frames a second of the clip, for a model with `rope_fps`, which may do without."""

    audio: Sound | None = None
    """What is heard."""

    def take(self, clips: Sequence[int]) -> "Extras":
        """The same for these clips, in this order."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return Extras(**{name: _take(values, clips) for name, values in named.items() if values is not None})


def _take(values: Any, clips: Sequence[int]) -> Any:
    return values.take(clips) if isinstance(values, Sound) else [values[clip] for clip in clips]

"""The timesteps of a pack: one a clip, or one a frame of tokens where some frames are given."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kinema.models.dit.segments import Grid, Rows

Timesteps: TypeAlias = Tensor | Sequence[Tensor]
"""(B,), or for each clip one of every frame of tokens (T / patch_size[0],); in [0, 1].

Where frames have their own, the clip's, which captions are modulated with, is the largest: that of the noisiest frame.
"""


def of_clips(timesteps: Timesteps) -> Tensor:
    """One timestep a clip (B,): the largest of its frames'."""
    return timesteps if isinstance(timesteps, Tensor) else torch.stack([times.max() for times in timesteps])


def of_rows(timesteps: Timesteps) -> Tensor:
    """One timestep for each row of the condition (R,): the clips', behind those of frames where they have their own."""
    return timesteps if isinstance(timesteps, Tensor) else torch.cat([*timesteps, of_clips(timesteps)])


def for_rows(clips: Tensor, timesteps: Timesteps) -> Tensor:
    """One row a clip -> the same; where frames have timesteps, one for each of its frames, and then the clips' own."""
    if isinstance(timesteps, Tensor):
        return clips
    frames = torch.tensor([len(times) for times in timesteps], device=clips.device)
    return torch.cat([clips.repeat_interleave(frames, dim=0), clips])


def first_given(timesteps: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """(B,) -> for each clip one for each of its frames of tokens, 0 for the first."""
    pairs = zip(timesteps, grids, strict=True)
    return [torch.cat([time.new_zeros(1), time.expand(frames - 1)]) for time, (frames, _, _) in pairs]


def video_rows(grids: Sequence[Grid], count: int, ahead: int = 0) -> Rows:
    """The video's of `count` rows of the condition, behind those of its sound: one a clip, or one a frame."""
    if count - ahead == len(grids):
        return clip_rows(grids, count)
    return Rows(tuple(h * w for t, h, w in grids for _ in range(t)), ahead)


def clip_rows(grids: Sequence[Grid], count: int) -> Rows:
    """The same with one row a clip in any case: the last ones."""
    return Rows(tuple(t * h * w for t, h, w in grids), count - len(grids))

"""Classifier-free guidance: the prediction with the text, pushed away from the prediction without it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kinema.diffusion.objective import Clips, Model
from kinema.diffusion.solvers import Predict

Scales = Callable[[Tensor], list[float]]
"""scales(timesteps (B,) as the model is told them) -> the guidance scale of each clip."""


def guided(model: Model, conditions: Sequence[Any], nulls: Sequence[Any], guidance_scale: float | Scales) -> Predict:
    """A model, what it is told of each clip with the text and without -> predict(noisy, timesteps) for `solve`.

    prediction = null + guidance_scale * (with_text - null), in float32 (Ho and Salimans 2022, equation 6,
    whose w is guidance_scale - 1). One call of 2B clips; where every guidance_scale is 1 the null text would
    cancel, and is not computed.
    """

    def predict(noisy: Clips, timesteps: Tensor) -> Clips:
        scales = guidance_scale(timesteps) if callable(guidance_scale) else [guidance_scale] * len(noisy)
        if all(scale == 1 for scale in scales):
            return model(noisy, timesteps, list(conditions))
        both = model([*noisy, *noisy], torch.cat([timesteps, timesteps]), [*conditions, *nulls])
        with_text, without = both[: len(noisy)], both[len(noisy) :]
        return [guide(a, b, scale) for a, b, scale in zip(with_text, without, scales, strict=True)]

    return predict


def by_noise(high: float, low: float, boundary: float) -> Scales:
    """One scale from a timestep on, another below it: Wan 2.2 leads its two experts so."""
    return lambda timesteps: [high if is_high else low for is_high in (timesteps >= boundary).tolist()]


def by_row(scale: float, num_steps: int, num_rows: int) -> Scales:
    """What CogVideoX's pipelines call dynamic: 1 + scale * (1 - cos(pi * ((N - row) / N) ** 5)) / 2.

    N is the number of steps and `row` that of the noise table, both as the reference has them.
    """

    def scales(timesteps: Tensor) -> list[float]:
        rows = (timesteps.double() * num_rows).round().tolist()
        turns = [((num_steps - row) / num_steps) ** 5 for row in rows]
        return [1 + scale * (1 - math.cos(math.pi * turn)) / 2 for turn in turns]

    return scales


def guide(with_text: Tensor, without: Tensor, guidance_scale: float) -> Tensor:
    """Two predictions of one clip -> the guided one, at least float32."""
    dtype = torch.promote_types(with_text.dtype, torch.float32)
    with_text, without = with_text.to(dtype), without.to(dtype)
    return without + guidance_scale * (with_text - without)


def check_guidance(guidance_scale: float, text_dropout: float) -> None:
    """Refuse guidance that training never prepared: without dropped captions the null text is unknown."""
    if guidance_scale < 0:
        raise ValueError(f"guidance_scale={guidance_scale} must be 0 (no text), 1 (no guidance) or above.")
    if guidance_scale != 1 and text_dropout == 0:
        raise ValueError(
            f"guidance_scale={guidance_scale} needs a model that was trained with dropped captions, and this "
            "one saw none (text dropout 0): its answer to the null caption means nothing. "
            "Type guidance_scale=1."
        )

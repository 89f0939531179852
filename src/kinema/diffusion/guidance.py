"""Classifier-free guidance: the prediction with the text, pushed away from the prediction without it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kinema.diffusion.objective import Clips, Model
from kinema.diffusion.solvers import Predict


def guided(model: Model, conditions: Sequence[Any], nulls: Sequence[Any], guidance_scale: float) -> Predict:
    """A model, what it is told of each clip with the text and without -> predict(noisy, timesteps) for `solve`.

    prediction = null + guidance_scale * (with_text - null), in float32 (Ho and Salimans 2022, equation 6,
    whose w is guidance_scale - 1). One call of 2B clips; at guidance_scale 1 the null text would cancel, and
    is not computed.
    """

    def predict(noisy: Clips, timesteps: Tensor) -> Clips:
        if guidance_scale == 1:
            return model(noisy, timesteps, list(conditions))
        both = model([*noisy, *noisy], torch.cat([timesteps, timesteps]), [*conditions, *nulls])
        with_text, without = both[: len(noisy)], both[len(noisy) :]
        return [guide(a, b, guidance_scale) for a, b in zip(with_text, without, strict=True)]

    return predict


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

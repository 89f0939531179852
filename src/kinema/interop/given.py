"""The given frames of a published pipeline, and its image encoder, carried along."""

import dataclasses
from pathlib import Path
from typing import Any

from kinema.conditioning.frames import CleanFrame, FrameCondition, GivenFrames, PaddedClip
from kinema.conditioning.image import ImageEncoder, ImageTokens
from kinema.identity import to_plain
from kinema.interop.preset import Record
from kinema.interop.texts import carry_parts, stored_type

IMAGE = ("image_encoder", "image_processor")
"""Folders of a pipeline that become one."""


def published_condition(index: Record, transformer: Record) -> FrameCondition:
    """The frames that a pipeline gives, told by its model_index.json and its transformer's config."""
    if index.get("expand_timesteps"):
        return CleanFrame()  # Wan 2.2 TI2V-5B, which also makes videos from captions alone
    if index["_class_name"] != "WanImageToVideoPipeline":
        return FrameCondition()
    tokens = ImageTokens(path="image") if transformer.get("image_dim") else None
    return PaddedClip(dropout=0.0, image=tokens, last=transformer.get("pos_embed_seq_len") is not None)


def has_image_encoder(pipeline: Path, condition: FrameCondition) -> bool:
    """Whether a pipeline's folder holds the image encoder, if it needs one."""
    needed = isinstance(condition, GivenFrames) and condition.image is not None
    return not needed or all((pipeline / part).is_dir() for part in IMAGE)


def carry_image(pipeline: Path, aside: Path, to: Path, condition: FrameCondition) -> dict[str, Any]:
    """Copy the image encoder, if there is one, into `aside/image`; returns the manifest's parts of given frames."""
    if not isinstance(condition, GivenFrames) or condition.image is None:
        return {"condition": to_plain(condition), "image": None}
    carry_parts(pipeline, IMAGE, aside / "image")
    tokens = dataclasses.replace(condition.image, path=str(aside / "image"), dtype=stored_type(aside / "image"))
    policy = ImageEncoder(tokens).policy()
    moved = dataclasses.replace(tokens, path=str(to / "image"))
    return {"condition": to_plain(dataclasses.replace(condition, image=moved)), "image": policy}

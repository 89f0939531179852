"""The text encoder of an imported pipeline: carried along, with the policy that the release encodes captions by."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from kinema.conditioning.text import PretrainedText, TextDtype, build_text_encoder
from kinema.identity import to_plain
from kinema.interop.reading import read_published

PARTS = ("text_encoder", "tokenizer")
"""Folders of a pipeline that become one: `transformers` reads both from the same place."""


def has_text(pipeline: Path) -> bool:
    """Whether a pipeline's folder holds its text encoder; many come without, since it is the same for all sizes."""
    return all((pipeline / part).is_dir() for part in PARTS)


def stored_type(folder: Path) -> TextDtype:
    """What an encoder computes in: the type that its weights are stored in."""
    types = {stored.dtype for stored in read_published(folder).stored.values()}
    return TextDtype.float32 if "F32" in types else TextDtype.bfloat16


def carry_text(pipeline: Path, aside: Path, to: Path, policy: PretrainedText) -> dict[str, Any]:
    """Copy encoder and tokenizer into `aside/text`; returns the manifest's part, with the place that `to` will be."""
    folder = aside / "text"
    folder.mkdir()
    for part in PARTS:
        for file in sorted((pipeline / part).iterdir()):
            if (folder / file.name).exists():
                raise ValueError(
                    f"{pipeline}: {file.name} is in {' and in '.join(PARTS)}; one folder cannot hold both."
                )
            shutil.copyfile(file, folder / file.name)
    policy = dataclasses.replace(policy, path=str(folder), dtype=stored_type(folder))
    encoder = build_text_encoder(policy)
    config = dataclasses.replace(policy, path=str(to / "text"))
    return {"config": to_plain(config), "policy": encoder.policy()}

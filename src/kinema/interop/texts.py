"""The text encoders of an imported pipeline: carried along, with the policy that the release encodes captions by."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from kinema.conditioning.text import CombinedText, PretrainedText, TextDtype, build_text_encoder
from kinema.identity import to_plain
from kinema.interop.reading import read_published

Policy = PretrainedText | CombinedText

FIRST, SECOND = ("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")
"""Folders of a pipeline that become one: `transformers` reads both from the same place."""


def places(policy: Policy) -> dict[str, tuple[str, str]]:
    """Each encoder of a policy by its name, and the two folders of a pipeline that hold it."""
    if isinstance(policy, PretrainedText):
        return {"": FIRST}
    return {name: FIRST if name == "tokens" else SECOND for name in policy.parts()}


def has_text(pipeline: Path, policy: Policy) -> bool:
    """Whether a pipeline's folder holds its text encoders; many come without, since they are the same for all sizes."""
    return all((pipeline / part).is_dir() for pair in places(policy).values() for part in pair)


def stored_type(folder: Path) -> TextDtype:
    """What an encoder computes in: the type that its weights are stored in."""
    types = {stored.dtype for stored in read_published(folder).stored.values()}
    return TextDtype.float32 if "F32" in types else TextDtype.bfloat16


def carry_text(pipeline: Path, aside: Path, to: Path, policy: Policy) -> dict[str, Any]:
    """Copy encoders and tokenizers into `aside/text`; returns the manifest's part, with the place that `to` will be."""
    for name, pair in places(policy).items():
        carry_parts(pipeline, pair, aside / "text" / name)
    encoder = build_text_encoder(_at(policy, aside / "text", aside / "text"))
    config = _at(policy, aside / "text", to / "text")
    return {"config": to_plain(config), "policy": encoder.policy()}


def carry_parts(pipeline: Path, pair: tuple[str, str], folder: Path) -> None:
    """Copy two folders of a pipeline into a new one."""
    folder.mkdir(parents=True)
    for part in pair:
        for file in sorted((pipeline / part).iterdir()):
            if (folder / file.name).exists():
                raise ValueError(f"{pipeline}: {file.name} is in {' and in '.join(pair)}; one folder cannot hold both.")
            shutil.copyfile(file, folder / file.name)


def _at(policy: Policy, found: Path, said: Path) -> Policy:
    """The policy of encoders that lie in `found`, and are said to lie in `said`."""
    if isinstance(policy, PretrainedText):
        return dataclasses.replace(policy, path=str(said), dtype=stored_type(found))
    parts = policy.parts().items()
    moved = {
        name: dataclasses.replace(part, path=str(said / name), dtype=stored_type(found / name)) for name, part in parts
    }
    return dataclasses.replace(policy, **moved)

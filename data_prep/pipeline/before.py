"""What can be said of a command before its first stage runs, so that it is not said after hours."""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path

from data_prep.pipeline.config import PrepareConfig
from data_prep.pipeline.rows import Row, read_rows
from data_prep.pipeline.run import INPUT
from data_prep.stages.caption import CaptionWithModel
from data_prep.stages.write import HISTORY, Write, check_target
from kinema.data.storage.store import MANIFEST


def check_command(config: PrepareConfig) -> None:
    """Raises ValueError for a command without input or out, or with a model that is not where it should be."""
    if not config.out:
        raise ValueError("out is not given: it is the folder of the data set. Type out=data/NAME.")
    if not config.inputs() or not all(config.inputs()):
        raise ValueError(
            f"input={config.input or ''} is empty. Type input=FOLDER, a video, a list or a folder of tars."
        )
    if isinstance(config.caption, CaptionWithModel) and _runs("caption", config):
        check_model_name(config.caption.model)


def check_target_of(config: PrepareConfig, inputs: Iterable[Row]) -> None:
    """Raises ValueError if the data set could not be written to `out`.

    One that was made by these settings of these inputs is not in the way: a command that is typed again may go on.
    """
    out = Path(config.out)
    if not _runs("write", config) or (_made_likewise(config) and _of_these(config, inputs)):
        return
    if _made_likewise(config) and (out / MANIFEST).exists() and not config.overwrite:
        raise ValueError(
            f"out={out} holds a data set that was made of other input than there is now (or work={config.work} is "
            "gone, which tells). Type overwrite=true to replace it, or another out=."
        )
    check_target(out, config.overwrite)


def check_model_name(model: str) -> None:
    """Raises ValueError for the name of a folder that is not there: the hub would be asked for it."""
    path = Path(model)
    if not model or path.is_dir():
        return
    parent = path.expanduser().parent
    beside = [str(parent / found.name) for found in parent.iterdir() if found.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(model, beside, n=1, cutoff=0.75)
    typed_as_folder = model.startswith((".", "/", "~")) or model.count("/") > 1
    if near:
        raise ValueError(f"caption.model={model} is no folder. Did you mean {near[0]}?")
    if typed_as_folder or (len(path.parts) > 1 and parent.is_dir()):
        raise ValueError(
            f"caption.model={model} is no folder. Type the folder that holds config.json, or OWNER/NAME of the hub."
        )


def _runs(stage: str, config: PrepareConfig) -> bool:
    return stage in config.pipeline and (config.stages is None or stage in config.stages)


def _of_these(config: PrepareConfig, inputs: Iterable[Row]) -> bool:
    """Whether the working folder has these very inputs."""
    before = Path(config.work) / INPUT
    return before.exists() and list(read_rows(before)) == list(inputs)


def _made_likewise(config: PrepareConfig) -> bool:
    """Whether `out` holds what stages with these very settings made."""
    history = Path(config.out) / HISTORY
    if not history.exists():
        return False
    *made, last = json.loads(history.read_text(encoding="utf-8"))["stages"]
    before = config.pipeline[: config.pipeline.index("write")]
    mine = [(name, getattr(config, name).identity(name)) for name in before]
    assert isinstance(config.write, Write)
    written = json.loads(json.dumps(config.write.recorded()))
    return [(stage["stage"], stage["identity"]) for stage in made] == mine and last["settings"] == written

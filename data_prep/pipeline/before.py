"""What can be said of a command before its first stage runs, so that it is not said after hours."""

import json
from pathlib import Path

from data_prep.pipeline.config import PrepareConfig
from data_prep.stages.write import HISTORY, Write, check_target


def check_command(config: PrepareConfig) -> None:
    """Raises ValueError for a command without input or out, or whose data set could not be written to `out`."""
    if not config.out:
        raise ValueError("out is not given: it is the folder of the data set. Type out=data/NAME.")
    if not config.inputs() or not all(config.inputs()):
        raise ValueError(
            f"input={config.input or ''} is empty. Type input=FOLDER, a video, a list or a folder of tars."
        )
    writes = "write" in config.pipeline and (config.stages is None or "write" in config.stages)
    if writes and not _made_likewise(config):
        check_target(Path(config.out), config.overwrite)


def _made_likewise(config: PrepareConfig) -> bool:
    """Whether `out` holds what stages with these very settings made: a command that is typed again may go on."""
    history = Path(config.out) / HISTORY
    if not history.exists():
        return False
    made = json.loads(history.read_text(encoding="utf-8"))
    before = config.pipeline[: config.pipeline.index("write")]
    mine = [[name, getattr(config, name).identity(name)] for name in before]
    assert isinstance(config.write, Write)
    same = [[stage["stage"], stage["identity"]] for stage in made["stages"] if stage["stage"] in before] == mine
    return same and made["write"] == json.loads(json.dumps(config.write.recorded()))

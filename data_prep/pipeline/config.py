"""Configuration of data preparation: one dataclass for each stage and engine, chosen by Hydra's groups."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore

from data_prep.pipeline.cluster import RayEngine
from data_prep.pipeline.engines import LocalEngine
from data_prep.pipeline.run import Limits, Pipeline
from data_prep.stages.borders import CutBorders
from data_prep.stages.caption import CaptionFromColumns, CaptionWithCommand, CaptionWithModel
from data_prep.stages.cut import Cut
from data_prep.stages.encode import Encode
from data_prep.stages.filter import Filter
from data_prep.stages.ingest import Ingest
from data_prep.stages.page import Page
from data_prep.stages.probe import Probe
from data_prep.stages.score import Score
from data_prep.stages.sound import Sound
from data_prep.stages.split import Split
from data_prep.stages.write import Write


@dataclass
class PrepareConfig:
    """Everything a data set is made with. The stages' fields are named as in `pipeline`."""

    input: Any = None
    """A file, folder, list or folder of tars, or a list of these."""
    out: str = ""
    """Folder of the data set."""
    work: str = ""
    """Working folder, where every stage keeps its rows and files; delete it when the data set is done."""
    overwrite: bool = False
    """Replace the data set that lies in `out`."""
    pipeline: list[str] = field(default_factory=list)
    """The stages, in order."""
    stages: list[str] | None = None
    """Which of them to run now; null runs all."""
    engine: Any = None
    """Who does the work: local or ray."""
    limits: Limits = field(default_factory=Limits)
    retry_failed: bool = False
    """Work once more on rows that failed before."""
    ingest: Any = None
    probe: Any = None
    split: Any = None
    cut: Any = None
    borders: Any = None
    sound: Any = None
    score: Any = None
    filter: Any = None
    caption: Any = None
    write: Any = None
    encode: Any = None
    page: Any = None

    def __post_init__(self) -> None:
        """Refuse stages that do not exist, twice or out of order."""
        for name in self.pipeline:
            if getattr(self, name, None) is None or name not in STAGES:
                raise ValueError(f"pipeline: there is no stage {name}. Stages: {', '.join(STAGES)}.")
        if len(set(self.pipeline)) < len(self.pipeline) or self.pipeline[:1] != ["ingest"]:
            raise ValueError(f"pipeline={self.pipeline} must begin with ingest and name each stage once.")
        for name in self.stages or []:
            if name not in self.pipeline:
                raise ValueError(f"stages=[{name}] is not in pipeline=[{','.join(self.pipeline)}].")

    def inputs(self) -> list[str]:
        """The inputs as a list."""
        return [self.input] if isinstance(self.input, str) else list(self.input or [])

    def to_pipeline(self) -> Pipeline:
        """The stages, ready to run."""
        stages = {name: getattr(self, name) for name in self.pipeline}
        return Pipeline(stages, Path(self.work), self.engine, self.limits, self.retry_failed)

    def unread(self, overrides: list[str]) -> str | None:
        """Why the command must stop, when it sets a stage that the pipeline leaves out."""
        groups = [override.lstrip("+~").split("=")[0].split(".")[0].split("/")[0] for override in overrides]
        idle = sorted({group for group in groups if group in STAGES and group not in self.pipeline})
        return f"{', '.join(idle)}: not in pipeline=[{','.join(self.pipeline)}], so nothing reads it." if idle else None


STAGES: dict[str, dict[str, type]] = {
    "ingest": {"videos": Ingest},
    "probe": {"probe": Probe},
    "split": {"shots": Split},
    "cut": {"clips": Cut},
    "borders": {"borders": CutBorders},
    "sound": {"sound": Sound},
    "score": {"scores": Score},
    "filter": {"thresholds": Filter},
    "caption": {"columns": CaptionFromColumns, "command": CaptionWithCommand, "model": CaptionWithModel},
    "write": {"shards": Write},
    "encode": {"caches": Encode},
    "page": {"page": Page},
}
"""The classes of each stage. `configs/prep/STAGE/*.yaml` starts from `schema_NAME` and says what differs."""
ENGINES = {"local": LocalEngine, "ray": RayEngine}


def register_schemas() -> None:
    """Make the dataclasses known to Hydra; call before composing."""
    store = ConfigStore.instance()
    store.store(name="schema_prepare", node=PrepareConfig)
    for group, choices in {**STAGES, "engine": ENGINES}.items():
        for name, schema in choices.items():
            store.store(group=group, name=f"schema_{name}", node=schema)

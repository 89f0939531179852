"""From footage to shards: `python data_prep/prepare.py input=my_videos out=data/mine ingest.license=CC-BY-4.0`.

Every stage keeps what it did in `work` (out.work), so the same command goes on where it was stopped, and does
nothing when all is done. `stages=[probe]` runs one stage. docs/preparing.md says what they do.
"""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, the repository's root is not on the path
from data_prep.pipeline.config import PrepareConfig, register_schemas
from data_prep.pipeline.rows import Row, write_rows
from kinema.config import to_dataclass
from kinema.console import explain_errors, run_script

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "prep"
register_schemas()


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="prepare")
@explain_errors
def main(composed: DictConfig) -> None:
    """Run the stages; the last line is the verdict."""
    config = to_dataclass(composed)
    assert isinstance(config, PrepareConfig)
    if problem := config.unread(list(HydraConfig.get().overrides.task)):
        raise ValueError(problem)
    prepare(config)


def prepare(config: PrepareConfig) -> None:
    """Run the stages that were asked for, and say what became of the rows."""
    pipeline = config.to_pipeline()
    pipeline.work.mkdir(parents=True, exist_ok=True)
    write_rows(pipeline.work / "input.jsonl", map(input_row, config.inputs()))
    reports = pipeline.run(config.stages or config.pipeline)
    if reports[-1].stage == config.pipeline[-1]:
        print(f"kept {reports[-1].kept} clips READY {config.out}")
    else:
        print(f"kept {reports[-1].kept} rows, next: stages=[...]")


def input_row(given: str) -> Row:
    """One input as the first stage gets it."""
    path = Path(given).resolve()
    if not path.exists():
        raise ValueError(f"input={given} does not exist.")
    return {"key": path.name, "path": str(path)}


if __name__ == "__main__":
    run_script(main, "prepare", CONFIGS)

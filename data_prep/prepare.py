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
from data_prep.captions import find_videos
from data_prep.pipeline.before import check_command
from data_prep.pipeline.config import PrepareConfig, register_schemas
from data_prep.pipeline.rows import Row, row_digest, write_rows
from data_prep.pipeline.run import INPUT, ROWS
from kinema.config import to_dataclass
from kinema.console import explain_errors, run_script
from kinema.data.shards import load_manifest

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
    check_command(config)
    pipeline = config.to_pipeline()
    write_inputs(pipeline.work, config.inputs())
    reports = pipeline.run([name for name in config.pipeline if config.stages is None or name in config.stages])
    last = reports[-1]
    if "write" in [report.stage for report in reports]:
        splits = ", ".join(f"{split} {count}" for split, count in load_manifest(config.out)["splits"].items())
        print(f"kept {last.kept} clips: {splits} READY {config.out}")
    else:
        print(f"kept {last.kept} rows in {pipeline.place(last.stage).folder / ROWS}")


def write_inputs(work: Path, inputs: list[str]) -> None:
    """Lay the inputs where the first stage looks for its rows; raises ValueError for one that is not there."""
    rows = [row for given in inputs for row in input_rows(given)]
    work.mkdir(parents=True, exist_ok=True)
    write_rows(work / INPUT, rows)


def input_rows(given: str) -> list[Row]:
    """One input as the first stage gets it, with what tells when it changed; a folder of tars is one input each."""
    path = Path(given).resolve()
    if not path.exists():
        raise ValueError(f"input={given} does not exist.")
    paths = sorted(path.glob("*.tar")) if path.is_dir() else []
    if path.is_dir() and not paths:
        find_videos(path)  # raises for a folder without any
    return [{"key": path.name, "path": str(path), "changed": last_change(path)} for path in paths or [path]]


def last_change(path: Path) -> str:
    """Names, sizes and times of a file, or of all files under a folder, as a short hash."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return row_digest({"files": facts})


if __name__ == "__main__":
    run_script(main, "prepare", CONFIGS)

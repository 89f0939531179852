"""From footage to shards: `python data_prep/prepare.py input=my_videos out=data/mine ingest.license=CC-BY-4.0`.

Every stage keeps what it did in `work` (out.work), so the same command goes on where it was stopped, and does
nothing when all is done. `stages=[probe]` runs one stage. docs/preparing.md says what they do.
"""

import sys
from pathlib import Path

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, the repository's root is not on the path
from data_prep.help import help_text
from data_prep.pipeline.before import check_command, check_target_of
from data_prep.pipeline.config import PrepareConfig, register_schemas
from data_prep.pipeline.inputs import input_rows, write_inputs
from data_prep.pipeline.run import ROWS
from kinema.config import to_dataclass
from kinema.console import explain_errors, run_script
from kinema.data.dataset.shards import load_manifest

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "prep"
HELP = {"-h", "--help"}
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
    pipeline, inputs = config.to_pipeline(), input_rows(config.inputs())
    check_target_of(config, inputs)
    write_inputs(pipeline.work, inputs)
    reports = pipeline.run([name for name in config.pipeline if config.stages is None or name in config.stages])
    last = reports[-1]
    if "write" in [report.stage for report in reports]:
        splits = ", ".join(f"{split} {count}" for split, count in load_manifest(config.out)["splits"].items())
        print(f"kept {last.kept} clips: {splits} READY {config.out}")
    else:
        print(f"kept {last.kept} rows in {pipeline.place(last.stage).folder / ROWS}")


def show_help() -> None:
    """Print what there is to type; other words of the command line choose what is shown."""
    words = [word for word in sys.argv[1:] if word not in HELP]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        print(help_text(to_dataclass(compose("prepare", words)), CONFIGS))


if __name__ == "__main__":
    run_script(show_help if HELP & {*sys.argv} else main, "prepare", CONFIGS)

"""Train a causal VAE or a video diffusion transformer: compose, validate, build, run."""

import sys

import hydra
from omegaconf import DictConfig

from kinema.build import build_dit, build_vae, start_run
from kinema.config import Reads, register_schemas, resolved_yaml, to_config
from kinema.console import explain_errors, leave_with_status, run_script
from kinema.distributed.process import start_process, stop_process, strip_launcher_arguments
from kinema.training.dit_task import DiTTaskConfig

register_schemas()


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
@explain_errors
def main(composed: DictConfig) -> int:
    """One run: the same command starts it, continues it, and finds its folder again."""
    config = to_config(composed)
    reads = Reads(config)
    process = start_process(config.parallel.timeout_seconds, config.parallel.sequence_degree)
    try:
        with start_run(config, resolved_yaml(composed), process) as run:
            build = build_dit if isinstance(config.task, DiTTaskConfig) else build_vae
            trainer = build(config, run, process, unread_keys=reads.problem)
            return trainer.fit()
    finally:
        stop_process()


if __name__ == "__main__":
    sys.argv = strip_launcher_arguments(sys.argv)
    leave_with_status(lambda: run_script(main, "train"))

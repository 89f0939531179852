"""Sample videos from a training checkpoint: `python sample.py run=runs/demo prompt="a red circle moves left"`."""

import hydra
from omegaconf import DictConfig

from kinema.config import register_schemas, to_dataclass
from kinema.console import explain_errors, run_script
from kinema.sampling.sample import SampleConfig, sample

register_schemas()


@hydra.main(version_base="1.3", config_path="configs", config_name="sample")
@explain_errors
def main(composed: DictConfig) -> None:
    """Load, check against the manifest, sample, write."""
    config = to_dataclass(composed)
    assert isinstance(config, SampleConfig)
    sample(config)


if __name__ == "__main__":
    run_script(main, "sample")

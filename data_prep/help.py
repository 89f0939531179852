"""What `python data_prep/prepare.py --help` prints: stages, choices, and every key with what it is for."""

from collections.abc import Iterator
from pathlib import Path

from data_prep.pipeline.config import STAGES, PrepareConfig
from kinema.key_docs import key_lines, summary

EXAMPLES = """\
From footage to shards: ingest, probe, split, cut, score, filter, write, and a page to look at.

  python data_prep/prepare.py input=my_videos out=data/mine ingest.license=CC-BY-4.0
  python data_prep/prepare.py input=list.csv out=data/mine filter.thresholds.motion.min=0.01 engine.workers=8
  python data_prep/prepare.py input=my_videos out=data/mine stages=[ingest,probe]        only these stages
  python data_prep/prepare.py input=my_videos out=data/mine engine=ray engine.address=10.0.0.1:6379
  python data_prep/prepare.py preset=film                                                the film that lies here

The same command goes on where it was stopped. docs/preparing.md and docs/filtering.md tell more."""


def help_text(config: PrepareConfig, configs: Path) -> str:
    """The whole help, with the values that the command line gives."""
    return "\n".join([EXAMPLES, "", *_stages(config), "", *_choices(configs), "", *_keys(config)])


def _stages(config: PrepareConfig) -> Iterator[str]:
    yield "Stages, of which pipeline=[...] says which run, in which order (* are in it now):"
    for name in STAGES:
        mark = "*" if name in config.pipeline else " "
        yield f"  {mark} {name:<8} {summary(type(getattr(config, name)))}"


def _choices(configs: Path) -> Iterator[str]:
    yield "Choices:"
    for group in sorted(folder for folder in configs.iterdir() if folder.is_dir()):
        yield f"  {group.name}={'|'.join(sorted(file.stem for file in group.glob('*.yaml')))}"


def _keys(config: PrepareConfig) -> Iterator[str]:
    yield "Keys with their values now; type key=value. Those of a choice appear with it: caption=model --help."
    yield from key_lines(config)

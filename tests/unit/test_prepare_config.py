"""Configuration of data preparation: every file composes, and no key is wrong or without effect."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from data_prep.pipeline.before import check_command
from data_prep.pipeline.config import ENGINES, STAGES, PrepareConfig
from data_prep.prepare import CONFIGS, prepare
from kinema.config import to_dataclass
from kinema.console import first_cause

GIVEN = ["input=videos", "out=data/mine"]
CHOICES = sorted((path.parent.name, path.stem) for path in CONFIGS.glob("*/*.yaml"))


@pytest.fixture(autouse=True)
def hydra():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def prepared(*overrides: str) -> PrepareConfig:
    return to_dataclass(compose("prepare", [*GIVEN, *overrides]))


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes(group, choice):
    config = prepared(f"{group}={choice}")
    if group != "preset":
        assert type(getattr(config, group)) in {**STAGES, "engine": ENGINES}[group].values()


def test_every_stage_has_a_field_and_is_told_apart():
    config = prepared()
    assert set(STAGES) <= {field.name for field in dataclasses.fields(PrepareConfig)}
    pipeline = dataclasses.replace(config, pipeline=list(STAGES)).to_pipeline()
    assert len({stage.identity(name) for name, stage in pipeline.stages.items()}) == len(STAGES)
    changed = prepared("cut.crf=20").cut
    assert changed.identity("cut") != config.cut.identity("cut")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("split.min_second=2", "min_second"),
        ("split.detector=best", r"split\.detector=best is unknown"),
        ("split.threshold=high", "threshold"),
        ("split.min_seconds=20", r"below split\.max_seconds=10\.0"),
        ("split.heldout.every=1", r"split\.heldout\.every=1"),
        ("split.heldout.by=luck", r"split\.heldout\.by=luck"),
        ("cut.size=100x75", "even sides"),
        ("cut.fps=0", r"cut\.fps=0\.0 must be above 0"),
        ("engine.workers=-1", r"engine\.workers=-1"),
        ("engine.address=auto", "address"),
        ("limits.max_failed_fraction=2", r"limits\.max_failed_fraction=2"),
        ("limits.min_failed=-1", r"limits\.min_failed=-1"),
        ("ingest.consent=''", r"ingest\.consent is empty"),
        ("ingest.generated=yes", r"ingest\.generated='yes' must be one of no, partly"),
        ("ingest.collected=yesterday", r"ingest\.collected='yesterday' must be a day"),
        ("write.shard_mib=0", r"write\.shard_mib=0"),
        ("pipeline=[ingest,prob]", "there is no stage prob. Stages: ingest, probe"),
        ("pipeline=[probe,ingest]", "must begin with ingest"),
        ("stages=[caption]", r"stages=\[caption\] is not in pipeline"),
    ],
)
def test_wrong_values_are_named(override, message):
    with pytest.raises((ValueError, HydraException, OmegaConfBaseException)) as caught:
        prepared(override)
    assert re.search(message, first_cause(caught.value))


def test_settings_of_a_stage_that_does_not_run_are_refused():
    config = prepared("pipeline=[ingest,probe]")
    assert "split" in config.unread(["pipeline=[ingest,probe]", "split.min_seconds=2"])
    assert config.unread(["probe.min_side=8", "engine=local"]) is None


def test_what_is_missing_or_in_the_way_is_said_before_the_first_stage(tmp_path):
    full, other, empty, out = (tmp_path / name for name in ("full", "other", "empty", "out"))
    for folder in (full, other, empty):
        folder.mkdir()
    (full / "a.mp4").write_bytes(b"not opened")
    (other / "notes.txt").write_text("not a data set")
    for changes, message in (
        ({"out": ""}, "out is not given.*out=data/NAME"),
        ({"input": None}, "input= is empty. Type input=FOLDER"),
        ({"input": [""]}, "is empty"),
        ({"input": str(empty)}, "empty holds no video"),
        ({"out": str(other)}, "other is not empty and not a data set"),
    ):
        given = {"input": str(full), "out": str(out), "work": str(tmp_path / "work"), **changes}
        with pytest.raises(ValueError, match=message):
            prepare(dataclasses.replace(prepared(), **given))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "other"]


def test_a_data_set_that_was_made_otherwise_is_in_the_way_and_one_made_likewise_is_not(tmp_path):
    config = prepared(f"out={tmp_path}")
    before = config.pipeline[: config.pipeline.index("write")]
    made = [{"stage": name, "identity": getattr(config, name).identity(name)} for name in before]
    (tmp_path / "dataset.json").write_text("{}")
    (tmp_path / "prepare.json").write_text(json.dumps({"stages": made, "write": config.write.recorded()}))
    check_command(config)
    for other in ("split.min_seconds=2", "write.mixed=false"):
        with pytest.raises(ValueError, match="Type overwrite=true to replace"):
            check_command(prepared(f"out={tmp_path}", other))
    check_command(prepared(f"out={tmp_path}", "write.mixed=false", "overwrite=true"))


def test_the_command_says_what_to_type(tmp_path):
    script = Path(CONFIGS).parents[1] / "data_prep/prepare.py"
    given = ["input=nowhere", f"out={tmp_path / 'out'}", "split.min_second=2"]
    done = subprocess.run([sys.executable, str(script), *given], capture_output=True, text=True, check=False)
    assert done.returncode == 64
    assert "Did you mean split.min_seconds?" in done.stderr
    assert not (tmp_path / "out.work").exists()

"""Configuration of data preparation: every file composes, and no key is wrong or without effect."""

import dataclasses
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from data_prep.help import help_text
from data_prep.pipeline.before import check_command, check_model_name, check_target_of
from data_prep.pipeline.cluster import see_that_it_answers
from data_prep.pipeline.config import ENGINES, STAGES, PrepareConfig
from data_prep.pipeline.inputs import write_inputs
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
        ("ingest.consent=maybe", r"ingest\.consent=maybe must be one of given, none-visible"),
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
    config, inputs = prepared(f"out={tmp_path}", f"work={tmp_path / 'work'}"), [{"key": "a", "path": "/a"}]
    before = config.pipeline[: config.pipeline.index("write")]
    made = [{"stage": name, "identity": getattr(config, name).identity(name)} for name in before]
    (tmp_path / "dataset.json").write_text("{}")
    (tmp_path / "prepare.json").write_text(json.dumps({"stages": [*made, config.write.entry(1, 0)]}))
    with pytest.raises(ValueError, match=r"made of other input .*work is gone"):
        check_target_of(config, inputs)
    write_inputs(tmp_path / "work", inputs)
    check_target_of(config, inputs)
    with pytest.raises(ValueError, match="made of other input than there is now"):
        check_target_of(config, [*inputs, {"key": "b", "path": "/b"}])
    for other in ("split.min_seconds=2", "write.mixed=false"):
        with pytest.raises(ValueError, match="Type overwrite=true to replace"):
            check_target_of(prepared(f"out={tmp_path}", other), inputs)
    check_target_of(prepared(f"out={tmp_path}", "write.mixed=false", "overwrite=true"), inputs)


def test_a_mistyped_folder_of_a_model_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for model in ("models/qwem", str(tmp_path / "models/qwem"), "model/qwen"):
        given = dataclasses.replace(prepared("pipeline=[ingest,probe,split,cut,caption,write]", "caption=model"))
        given.caption.model = model
        if model == "model/qwen":  # may be a name of the hub
            check_command(given)
            continue
        with pytest.raises(ValueError, match=f"caption.model={model} is no folder. Did you mean .*models/qwen"):
            check_command(given)
    for model in ("./nowhere", "a/b/c", "models/other"):
        with pytest.raises(ValueError, match=r"is no folder\. Type the folder that holds config.json"):
            check_model_name(model)
    for model in ("models/qwen", "Qwen/Qwen2.5-VL-3B-Instruct"):
        check_model_name(model)


def test_an_address_without_a_ray_cluster_is_an_error_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        see_that_it_answers(f"127.0.0.1:{port}", 1.0)
    with pytest.raises(ValueError, match=f"engine.address=127.0.0.1:{port}: no Ray cluster answers there"):
        see_that_it_answers(f"127.0.0.1:{port}", 1.0)
    see_that_it_answers("auto", 1.0)


def test_the_command_says_what_to_type(tmp_path):
    script = Path(CONFIGS).parents[1] / "data_prep/prepare.py"
    given = ["input=nowhere", f"out={tmp_path / 'out'}", "split.min_second=2"]
    done = subprocess.run([sys.executable, str(script), *given], capture_output=True, text=True, check=False)
    assert done.returncode == 64
    assert "Did you mean split.min_seconds?" in done.stderr
    assert not (tmp_path / "out.work").exists()


def test_the_help_names_every_stage_and_says_what_every_key_of_it_is_for():
    text = help_text(prepared(), CONFIGS)
    assert all(f"\n  {'*' if name in prepared().pipeline else ' '} {name}" in text for name in STAGES)
    assert "  split.heldout.every=10\n      0 holds nothing out.\n" in text
    assert "caption=columns|command|model" in text

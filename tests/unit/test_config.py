"""Configuration: every file composes, every key is typed and read, and no typing error passes."""

import dataclasses
import random
import string
from contextlib import suppress
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kinema.config import (
    SCHEMAS,
    Config,
    Reads,
    changed_keys,
    register_schemas,
    resolved_yaml,
    suggestion,
    to_config,
    to_dataclass,
)
from kinema.console import missing_key, run_script
from kinema.training.alive.guard import Guard, GuardConfig
from kinema.training.alive.signals import Signals, SignalsConfig, Warned
from kinema.training.alive.spikes import SpikeAction, SpikeConfig
from kinema.training.optimizers.optim import AdamW

CONFIGS = Path(__file__).parents[2] / "configs"
NO_GROUPS = ("experiment", "prep")  # data_prep/prepare.py has its own root there
GROUPS = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name not in NO_GROUPS)
CHOICES = sorted((path.parent.name, path.stem) for path in CONFIGS.glob("*/*.yaml") if path.parent.name in GROUPS)
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
VAE = ["task=vae"]


@pytest.fixture(autouse=True)
def hydra():
    register_schemas()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def overrides_for(group: str, choice: str) -> list[str]:
    """What makes a choice fit the rest: architectures of a VAE belong to task=vae, everything else to task=dit."""
    if (group, choice) == ("task", "vae") or (group == "vae" and choice != "from_run"):
        return ["task=vae", *([] if group == "task" else [f"{group}={choice}"])]
    if (group, choice) == ("finetune", "lora"):
        return ["finetune=lora", "init_from=runs/base"]
    return [f"{group}={choice}"]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_into_checked_dataclasses(group, choice):
    config = to_config(compose("train", overrides_for(group, choice)))
    assert type(getattr(config, group)) in SCHEMAS[group].values()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name):
    config = to_config(compose("train", [f"experiment={name}"]))
    assert config.name != "default"


def test_the_sampler_composes():
    composed = compose("sample", ["run=runs/x", "prompt=a red circle"])
    assert to_dataclass(composed).captions() == ["a red circle"]


def leaves(tree, prefix=""):
    if not isinstance(tree, dict):
        return [prefix[:-1]]
    return [leaf for key, value in tree.items() for leaf in leaves(value, f"{prefix}{key}.")]


def mutations(key: str, generator: random.Random) -> list[str]:
    """One letter more, less, another, and two swapped, at a random place of each part of the key."""
    parts, found = key.split("."), []
    for i, part in enumerate(parts):
        place = generator.randrange(len(part))
        letter = generator.choice(string.ascii_lowercase.replace(part[place], ""))
        swapped = part[:place] + part[place + 1 : place + 2] + part[place] + part[place + 2 :]
        for mutant in (
            part[:place] + letter + part[place:],
            part[:place] + part[place + 1 :],
            part[:place] + letter + part[place + 1 :],
            swapped,
        ):
            if mutant != part and mutant:
                found.append(".".join([*parts[:i], mutant, *parts[i + 1 :]]))
    return found


def prefixes(key: str) -> set[str]:
    """a.b.c -> a, a.b, a.b.c."""
    parts = key.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}


@pytest.mark.parametrize("task", ["dit", "vae"])
def test_every_key_with_one_wrong_letter_is_refused(task):
    whole = compose("train", [f"task={task}"])
    keys, generator = leaves(OmegaConf.to_container(whole)), random.Random(0)
    known = set(keys) | {key.rsplit(".", 1)[0] for key in keys} | set(GROUPS)
    mutants = [mutant for key in keys for mutant in mutations(key, generator) if mutant not in known]
    assert len(mutants) > 200
    # A full composition takes 50 ms; the merge that refuses unknown keys is what Hydra runs inside it.
    accepted, added, extended = [], [], whole.copy()
    for mutant in mutants:
        with suppress(OmegaConfBaseException):
            OmegaConf.update(whole, mutant, 1)
            accepted.append(mutant)
        with suppress(OmegaConfBaseException):
            OmegaConf.update(extended, mutant, 1, force_add=True)  # `+KEY=1`
            added.append(mutant)
    assert accepted == []
    assert len(added) > 200
    with pytest.raises(ValueError, match="there is no such key") as refusal:
        to_dataclass(extended)
    refused = set(str(refusal.value).split(": ")[0].split(", "))
    assert [mutant for mutant in added if not refused & prefixes(mutant)] == []


@pytest.mark.parametrize(
    "override", ["optim.lerning_rate=1", "+optim.learning_rate.x=1", "modle=dit_tiny", "hydra.ouput_subdir=x"]
)
def test_a_mistyped_override_stops_composition(override):
    with pytest.raises((HydraException, OmegaConfBaseException)):
        compose("train", [override], return_hydra_config=True)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.shaes=1", "data.shaes: there is no such key. Did you mean data.shapes?"),
        ("+data.mixture={a:{pth:x}}", "data.mixture.a.pth: there is no such key. Did you mean data.mixture.a.path?"),
        ("data.stages=[{untl_step:3}]", "untl_step: there is no such key. Did you mean until_step?"),
        ("+data.mixture.mien.path=x", "mien is new and is given whole: '+...={mien:{key:value}}', "
                                      "not '+...mien.key=value'."),
        ("data.mixture.mien.path=x", "data.mixture.mien: there is no such key. A new one is given whole: "
                                     "'+data.mixture={mien:{...}}'."),
    ],
)  # fmt: skip
def test_a_key_that_a_group_lacks_is_answered_with_the_one_that_was_meant(override, told):
    with pytest.raises((HydraException, OmegaConfBaseException)) as refusal:
        compose("train", [override])
    assert missing_key(refusal.value) == told


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+optim.learning_rat=1", r"^optim\.learning_rat: there is no such key\. Did you mean optim\.learning_rate\?$"),
        ("+modl.width=1", r"^modl: there is no such key\. Did you mean model\?$"),
        ("+ema.dekay=1", r"^ema\.dekay: there is no such key\. Did you mean ema\.decay\?$"),
    ],
)
def test_a_plus_adds_no_key_that_nothing_reads(override, message):
    with pytest.raises(ValueError, match=message):
        to_config(compose("train", [override]))


def test_the_sampler_refuses_keys_that_it_lacks():
    with pytest.raises(ValueError, match=r"^stepz: there is no such key"):
        to_dataclass(compose("sample", ["run=runs/x", "prompt=a", "+stepz=1"]))


@pytest.mark.parametrize(
    "override",
    ["optim.learning_rate=fast", "steps=2.5", "objective.prediction_target=speed", "data.lanes=null"],
)
def test_a_value_of_the_wrong_type_is_refused(override):
    with pytest.raises((HydraException, OmegaConfBaseException, ValueError)):
        to_config(compose("train", [override]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=0", "steps=0 must be at least 1"),
        ("parallel.zero_stage=4", "parallel.zero_stage=4 must be 0, 1, 2 or 3"),
        ("optim.learning_rate=-1", "optim.learning_rate=-1.0 must be positive"),
        ("watchdog.factor=0.5", "watchdog.factor=0.5 must be at least 1"),
        ("name=a/b", "name='a/b' must be a folder name"),
        ("~model", "model is missing"),
    ],
)
def test_an_impossible_value_names_key_value_and_rule(override, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        to_config(compose("train", [override]))


def test_a_group_that_the_task_never_reads_is_refused():
    with pytest.raises(ValueError, match=r"model=DiTConfig is given, but task=vae reads none\. .* type ~model\."):
        to_config(compose("train", ["task=vae", "model=dit_tiny"]))
    assert to_config(compose("train", ["task=vae", "model=dit_tiny", "~model"])).model is None
    with pytest.raises(ValueError, match=r"parallel\.compile=blocks compiles blocks of a DiT, task=dit"):
        to_config(compose("train", ["task=vae", "parallel.compile=blocks"]))


def test_keys_that_nothing_reads_are_found_and_reading_clears_them():
    config = Config(optim=AdamW(learning_rate=3e-4, weight_decay=0.5))
    reads = Reads(config)
    assert reads.unread() == ["optim.learning_rate", "optim.weight_decay"]
    assert config.optim.learning_rate == 3e-4
    assert type(config.optim).__name__ == "AdamW"
    assert dataclasses.is_dataclass(config.optim)
    assert "optim.weight_decay: nothing reads" in (reads.problem() or "")
    assert config.optim.weight_decay == 0.5
    assert reads.problem() is None


def test_a_group_set_to_null_names_the_choices(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(CONFIGS.with_name("train.py")), "task=null"])

    def main():
        compose("train", ["task=null"])

    with pytest.raises(SystemExit):
        run_script(main, "train")
    assert "task=null: choose one of dit, vae." in capsys.readouterr().err


def test_a_near_key_is_suggested():
    composed = compose("train")
    assert suggestion("optim.lerning_rate", composed) == "Did you mean optim.learning_rate?"
    assert suggestion("optim.learning_rate", composed) == ""


def test_changes_are_listed_but_for_keys_that_change_no_number():
    before = resolved_yaml(compose("train"))
    now = resolved_yaml(
        compose("train", ["seed=3", "parallel.zero_stage=2", "data.num_workers=0", "checkpoint.keep=9"])
    )
    assert changed_keys(before, now) == ["seed: 0 -> 3"]
    now = resolved_yaml(compose("train", ["parallel.precision=bfloat16", "data.prefetch=5"]))
    assert changed_keys(before, now) == ["parallel.precision: float32 -> bfloat16"]


def test_limits_of_what_may_never_happen_are_in_force():
    config = Config(
        guard=GuardConfig(max_incidents=5, max_left_out=9, spike=SpikeConfig(deviations=9)),
        signals=SignalsConfig(usr1=Warned.save, grace_seconds=60, requeue=True),
    )
    reads = Reads(config)
    assert len(reads.unread()) == 6
    assert Guard(config.guard).config.max_incidents == 5
    assert Signals(config.signals).config.requeue
    assert not reads.unread()
    config = Config(guard=GuardConfig(spike=SpikeConfig(SpikeAction.ignore, deviations=9)))
    reads = Reads(config)
    Guard(config.guard)
    assert reads.unread() == ["guard.spike.deviations"]

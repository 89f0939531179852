"""`kinema doctor`: each check passes on a machine that is well, and names what is not."""

import json
import re
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from kinema.config import compose_training
from kinema.doctor import job, machine
from kinema.doctor.command import run
from kinema.doctor.finding import Finding, Level, examine, graded
from kinema.doctor.job import job_checks
from kinema.doctor.kernels import compare, kernel_checks
from kinema.doctor.ranks import judge
from kinema.doctor.storage import check_storage
from kinema.models.attention import attention


def test_a_machine_that_is_well_passes(tmp_path):
    findings = [*examine(machine.machine_checks()), *examine(kernel_checks()), check_storage(str(tmp_path / "runs"))]
    assert {finding.name for finding in findings if finding.level is Level.FAIL} == set()
    assert not (tmp_path / "runs").exists()


def test_wrong_sums_fail():
    right = {"backend": "gloo", "all_reduce": 900.0, "all_to_all": 900.0, "all_reduce_wrong": False}
    assert judge({**right, "all_to_all_wrong": False}, "2 ranks").level is Level.PASS
    assert judge({**right, "all_to_all_wrong": True}, "2 ranks").advice.startswith("all_to_all gave wrong numbers")


@pytest.mark.parametrize("wrong", ["scale", "gradient", "leak"])
def test_a_kernel_that_computes_something_else_fails(wrong):
    def kernel(q, k, v, q_lengths, k_lengths):
        if wrong == "leak":
            return attention(q, k, v, (sum(q_lengths),), (sum(k_lengths),))
        if wrong == "gradient":
            return attention(q, k, v.detach() + 0 * v, q_lengths, k_lengths)
        return attention(q * 1.01, k, v, q_lengths, k_lengths)

    assert compare(kernel, "mine", torch.float32, "cpu").level is Level.FAIL
    assert compare(attention, "mine", torch.float32, "cpu").level is Level.PASS


def test_versions_are_held_against_what_is_asked_and_what_was_tested(tmp_path, monkeypatch):
    (tmp_path / "constraints.txt").write_text("numpy==0.1 # old\ntorchvision==1.0\n")
    monkeypatch.setattr(machine, "requires", lambda name: ["numpy>=2", "tqdm>=4; extra == 'none'"])
    finding = machine.check_versions(tmp_path / "constraints.txt")
    assert finding.level is Level.WARN
    assert "tested 0.1" in finding.advice
    assert "torchvision" not in finding.advice
    monkeypatch.setattr(machine, "requires", lambda name: ["numpy>=99", "no-such-package"])
    finding = machine.check_versions(tmp_path / "constraints.txt")
    assert finding.level is Level.FAIL
    assert "numpy>=99 is needed" in finding.advice
    assert "no-such-package is needed, none is installed" in finding.advice


def test_few_files_little_shared_memory_and_a_missing_folder_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (256, 1024))
    assert machine.check_open_files().advice == "Type ulimit -n 1024."
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**26))
    assert "--shm-size" in machine.check_shared_memory(str(tmp_path)).advice
    (tmp_path / "file").write_text("")
    finding = check_storage(str(tmp_path / "file" / "runs"))
    assert finding.level is Level.FAIL
    assert "Type run_root=FOLDER" in finding.advice


def test_a_check_that_raises_is_a_failure_and_the_others_go_on():
    def broken() -> Finding:
        raise ValueError("data.path=nix is not there.")

    first, second = examine([("data", broken), ("other", lambda: graded("other", "well"))])
    assert (first.level, first.advice) == (Level.FAIL, "data.path=nix is not there.")
    assert second.level is Level.PASS


def test_a_job_that_does_not_compose_is_a_finding():
    found = job_checks(["optim.lerning_rate=1"], 1)
    assert isinstance(found, Finding)
    assert found.advice == "optim.lerning_rate: there is no such key. Did you mean optim.learning_rate?"


def test_ranks_that_do_not_divide_the_lanes_fail():
    config = compose_training(["task=vae", "data.lanes=4", "parallel.sequence_degree=2"])
    assert "2 to a pack, each serves 2 of data.lanes=4" in job.check_ranks(config, 4).found
    with pytest.raises(ValueError, match=r"data.lanes=4 must be a multiple of the number of data ranks 3"):
        job.check_ranks(config, 6)
    with pytest.raises(ValueError, match=r"parallel.sequence_degree=2 must divide the number of ranks, 3"):
        job.check_ranks(config, 3)


def test_memory_is_that_of_the_states_and_of_a_packs_activations(monkeypatch):
    config = compose_training(["task=vae", "vae.width=32", "data.shapes=[[17,64,64]]"])
    monkeypatch.setattr(job, "_room", lambda: (100.0, "this machine"))
    much = job.check_memory(config, 1)
    state, peak = (float(number) for number in re.findall(r"(?:state|and) ([\d.]+)", much.found))
    monkeypatch.setattr(job, "_room", lambda: (state + peak / 2, "this machine"))
    little = job.check_memory(config, 1)
    assert peak >= 0.02
    assert (much.level, little.level) == (Level.PASS, Level.FAIL)
    assert "parallel.activation_checkpointing=full" in little.advice


def test_the_command_tries_two_ranks_ends_with_its_verdict_and_gives_json(tmp_path, capsys):
    words = ["experiment=demo_dit", "data.path=nowhere", "vae.path=nowhere", f"run_root={tmp_path}"]
    status = run(Namespace(words=words, ranks=2, world_size=1, json=True))
    told = json.loads(capsys.readouterr().out)
    levels = {check["name"]: check["level"] for check in told["checks"]}
    assert status == 1
    assert told["verdict"] == "NOT READY: data set, VAE, memory"
    assert levels["storage"] != "FAIL"
    assert levels["collectives"] != "FAIL"  # WARN: slow, on a busy machine

"""Real signals to a real process, and the end of a Slurm job's time."""

import os
import signal
import subprocess
import sys
import time
from datetime import datetime

import pytest

from kinema.training.alive.guard import NonFiniteLoss
from kinema.training.alive.restarts import count_restart
from kinema.training.alive.signals import Signals, SignalsConfig

SCRIPT = """
import sys, time
from kinema.training.alive import signals
signals.IMPATIENT_SECONDS = 0.3
caught = signals.Signals(signals.SignalsConfig(usr1=signals.Warned[sys.argv[1]]))
caught.catch()
print("ready", flush=True)
for _ in range(int(sys.argv[2])):
    time.sleep(0.05)
print(caught.asked_to_stop, caught.asked_to_save, flush=True)
"""


AS_IN_A_TERMINAL = ["env", "--default-signal=HUP,INT"]
"""Whatever the tests were started by: nohup and shells in the background leave signals ignored."""


def told(*sent, usr1="stop", ticks=8, before=()):
    process = subprocess.Popen(
        [*AS_IN_A_TERMINAL, *before, sys.executable, "-c", SCRIPT, usr1, str(ticks)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    for number in sent:
        process.send_signal(number)
        time.sleep(0.02 if ticks < 20 else 0.5)
    output, errors = process.communicate(timeout=30)
    return process.returncode, output.strip(), errors


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_every_signal_that_ends_a_run_is_remembered_by_its_name(name):
    assert told(signal.Signals[name])[:2] == (0, f"{name} False")


def test_the_warning_may_also_only_save():
    assert told(signal.SIGUSR1, usr1="save")[:2] == (0, "None True")


def test_two_signals_at_once_are_one_and_a_later_second_one_leaves_at_once():
    assert told(signal.SIGTERM, signal.SIGTERM)[:2] == (0, "SIGTERM False")
    status, output, errors = told(signal.SIGTERM, signal.SIGTERM, ticks=200)
    assert (status, output) == (75, "")
    assert "leaving at once" in errors


def test_nohup_is_respected():
    assert told(signal.SIGHUP, before=["nohup"])[1].endswith("None False")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Inside of job 17; makes commands of Slurm that answer."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")

    def answers(command, script):
        (tmp_path / command).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / command).chmod(0o755)

    return answers


@pytest.mark.parametrize("newer_slurm", [True, False])
def test_the_end_of_a_slurm_jobs_time_stops_the_run_early_enough_for_its_save(monkeypatch, slurm, newer_slurm):
    if newer_slurm:
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 150))
    else:
        end = datetime.fromtimestamp(time.time() + 150).isoformat(timespec="seconds")
        slurm("squeue", f'[ "$*" = "--noheader --job 17 --format %e" ] && echo {end}')
    signals = Signals(SignalsConfig(before_end_seconds=100))
    signals.look_at_clock()
    assert "job 17 ends at 2" in str(signals.find_end())
    signals.look_at_clock()
    assert signals.asked_to_stop is None
    signals.took(20.0, 80.0)
    signals.look_at_clock()
    assert "the end of the job's time in 200 s" in str(signals.asked_to_stop)


def test_an_end_that_is_not_known_is_told(slurm):
    slurm("squeue", "echo N/A")
    assert "job 17 has no end that is known (N/A)" in str(Signals(SignalsConfig()).find_end())
    slurm("squeue", "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1")
    assert "(slurm_load_jobs error: Unable" in str(Signals(SignalsConfig()).find_end())


def test_a_grace_too_short_for_a_save_is_told_once_with_the_seconds_it_takes():
    signals = Signals(SignalsConfig(grace_seconds=30))
    assert signals.took(1.0, 20.0) is None
    assert "takes 41 s (a step 1 s, a save 40 s), more than signals.grace_seconds=30" in str(signals.took(1.0, 40.0))
    assert signals.took(1.0, 50.0) is None


def test_requeue_asks_scontrol(tmp_path, monkeypatch, slurm):
    assert Signals(SignalsConfig()).requeue() is None
    signals = Signals(SignalsConfig(requeue=True))
    slurm("scontrol", f"echo $@ > {tmp_path}/asked")
    assert signals.requeue() == "scontrol requeue 17: done"
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    slurm("scontrol", "echo Access denied >&2; exit 1")
    assert signals.requeue() == "scontrol requeue 17: Access denied"
    monkeypatch.delenv("SLURM_JOB_ID")
    assert "no Slurm job" in str(signals.requeue())


def test_restarts_by_machines_end_when_nothing_new_is_saved(tmp_path, monkeypatch):
    for _ in range(5):  # by hand, as often as one likes
        count_restart(tmp_path, 10, limit=3)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for step in (10, 10, 10, 20, 20, 20, 20):
        count_restart(tmp_path, step, limit=3)
    with pytest.raises(NonFiniteLoss, match="began at step 20"):
        count_restart(tmp_path, 20, limit=3)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    count_restart(tmp_path, 20, limit=3)

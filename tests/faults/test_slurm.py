"""A real Slurm of one node runs launch/slurm.sbatch through the end of its time. Needs root, slurm-wlm and munge."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.commands import ROOT, dit_command, environment
from tests.end_to_end.runs import run, train_vae

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]
STEPS = 400
MINUTES = 1  # Slurm counts no less
CONF = """
ClusterName=kinema
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES
"""


def free_ports(number):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def slurm(tmp_path):
    """The environment in which Slurm's commands find a controller and one node."""
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    (tmp_path / "key").write_bytes(os.urandom(1024))
    (tmp_path / "key").chmod(0o400)
    conf = tmp_path / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname().split(".")[0], folder=tmp_path, ports=free_ports(2)))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
    variables = {**environment(), "SLURM_CONF": str(conf), "PATH": path}
    files = [f"--{what}={tmp_path}/{name}" for what, name in
             {"key-file": "key", "socket": "munge", "pid-file": "munge.pid", "log-file": "munge.log",
              "seed-file": "seed"}.items()]  # fmt: skip
    servers = [["munged", "--foreground", "--force", *files], ["slurmctld", "-D"], ["slurmd", "-D"]]
    started = []
    try:
        for command in servers:
            with (tmp_path / f"{command[0]}.log").open("w") as log:
                started.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log))
            time.sleep(2)
        yield variables
    finally:
        for server in reversed(started):
            server.terminate()
            server.wait(30)


def ask(slurm, *words):
    return subprocess.run(words, cwd=ROOT, env=slurm, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("warning", "seconds", "why"),
    [([], 15, "the end of the job's time"), (["--signal=B:USR1@25"], 0, "SIGUSR1")],
    ids=["the clock", "a signal"],
)
def test_a_run_goes_on_through_the_end_of_its_time(slurm, tmp_path, warning, seconds, why):
    run("data_prep/toy.py", "--out", f"{tmp_path}/toy", "--clips", "24", "--heldout", "4")
    train_vae(tmp_path)
    words = dit_command(
        tmp_path, "queued", STEPS, "checkpoint.every_steps=1000", f"signals.before_end_seconds={seconds}"
    )
    log = tmp_path / "job.log"
    job = ask(
        {**slurm, "RANKS_PER_NODE": "2"}, "sbatch", "--parsable", f"--time={MINUTES}", f"--output={log}", *warning,
        "launch/slurm.sbatch", *words[1:],
    ).strip()  # fmt: skip
    while "JobState=COMPLETED" not in (shown := ask(slurm, "scontrol", "show", "job", job)):
        assert not any(state in shown for state in ("FAILED", "TIMEOUT", "CANCELLED")), f"{shown}\n{log.read_text()}"
        time.sleep(2)

    lines = list(map(json.loads, (tmp_path / "runs/queued/metrics.jsonl").read_text().splitlines()))
    events = [(line["event"], line["detail"]) for line in lines if line["kind"] == "event"]
    print(*events, sep="\n")
    ended = [detail for event, detail in events if event == "end"]
    assert ended[-1] == "finished"
    assert len(ended) >= 2, f"{STEPS} steps were done in one minute"
    assert all(f"stopped by {why}" in detail for detail in ended[:-1])
    requeued = [detail for event, detail in events if event == "requeue"]
    assert requeued == [f"scontrol requeue {job}: done"] * (len(ended) - 1)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))

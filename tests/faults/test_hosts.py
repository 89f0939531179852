"""Two hosts with addresses of their own: one is cut off and comes back, and then dies. Needs root, for the network.

Network namespaces joined by a pair of virtual cards; torchrun's rendezvous and the training go over it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.end_to_end.commands import ROOT, dit_command, environment, losses
from tests.end_to_end.killing import descendants
from tests.end_to_end.runs import run, train_vae

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]
STEPS = 120
ADDRESS = "10.77.0.{}"


def ip(*words, check=True):
    subprocess.run(["ip", *words], check=check, capture_output=True)


@pytest.fixture
def hosts():
    """Two namespaces that reach each other and nothing else."""
    names = [f"kinema{os.getpid()}h{number}" for number in (1, 2)]
    try:
        for name in names:
            ip("netns", "add", name)
        cards = [f"k{os.getpid() % 10**6}v{number}" for number in (1, 2)]
        ip("link", "add", cards[0], "type", "veth", "peer", "name", cards[1])
        for number, (name, card) in enumerate(zip(names, cards, strict=True), 1):
            ip("link", "set", card, "netns", name, "name", "wire")
            ip("-n", name, "address", "add", f"{ADDRESS.format(number)}/24", "dev", "wire")
            for device in ("wire", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


class Agent:
    """torchrun on one host."""

    def __init__(self, folder, namespace, number, command):
        words = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=20", "--monitor-interval=0.5",
                 "--rdzv-backend=c10d", "--rdzv-id=hosts", f"--rdzv-endpoint={ADDRESS.format(1)}:29411",
                 f"--rdzv-conf=is_host={int(number == 1)},last_call_timeout=5,join_timeout=120",
                 f"--local-addr={ADDRESS.format(number)}"]  # fmt: skip
        self.log = folder / f"host{number}.log"
        own = {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "wire", "FAST": str(folder / "fast")}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", namespace, sys.executable, "-m", "kinema.cli", "torchrun", *words, *command],
                cwd=ROOT, stdout=log, stderr=log,
                env={**environment(), **own},
            )  # fmt: skip

    def die(self):
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def resumed(folder):
    """Ranks at each start of the run."""
    path = folder / "runs/hosts/metrics.jsonl"
    lines = map(json.loads, path.read_text().split("\n")[:-1]) if path.exists() else []
    return [line["detail"] for line in lines if line["kind"] == "event" and line["event"] == "resume"]


def reached(folder):
    path = folder / "runs/hosts/metrics.jsonl"
    lines = list(map(json.loads, path.read_text().split("\n")[:-1])) if path.exists() else []
    return max((line["step"] for line in lines if line["kind"] == "train"), default=0)


def wait_for(condition, what, agents, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        logs = "\n".join(agent.log.read_text()[-3000:] for agent in agents)
        assert time.monotonic() < deadline, f"{what} did not happen:\n{logs}"
        time.sleep(0.2)


def test_a_run_goes_on_with_the_hosts_that_are_left_and_takes_them_back(tmp_path, hosts):
    folder = tmp_path
    run("data_prep/toy.py", "--out", f"{folder}/toy", "--clips", "24", "--heldout", "0", "--sizes", "64x64")
    train_vae(folder, "vae", 1, "validation.every_steps=0")
    options = ["validation.every_steps=0", "task.samples.every_steps=0", "parallel.timeout_seconds=15"]
    run(*dit_command(folder, "whole", STEPS, *options), timeout=600)
    command = ["tests/faults/slow_train.py", *dit_command(folder, "hosts", STEPS, *options)[1:]]
    first, second = (Agent(folder, hosts[number - 1], number, command) for number in (1, 2))
    agents, told = [first, second], {}
    try:
        wait_for(lambda: reached(folder) >= 4, "the first steps", agents)

        began = time.monotonic()
        ip("-n", hosts[1], "link", "set", "wire", "down")
        wait_for(lambda: any("on 1 rank" in line for line in resumed(folder)), "going on alone", agents)
        told["alone after the cable was cut"] = time.monotonic() - began

        ip("-n", hosts[1], "link", "set", "wire", "up")
        second.die()
        began, second = time.monotonic(), Agent(folder, hosts[1], 2, command)  # as a cluster starts a host again
        agents[1] = second
        wait_for(lambda: any("on 2 rank" in line for line in resumed(folder)[-1:]), "taking it back", agents)
        told["two again after its return"] = time.monotonic() - began
        step = reached(folder)
        wait_for(lambda: reached(folder) > step + 2, "steps of both", agents)

        began = time.monotonic()
        second.die()
        wait_for(lambda: "on 1 rank" in resumed(folder)[-1], "going on without the dead host", agents)
        told["alone after it died"] = time.monotonic() - began
        (folder / "fast").touch()
        assert first.process.wait(timeout=600) == 0, first.log.read_text()[-3000:]
    finally:
        for agent in agents:
            agent.die()
    assert losses(folder, "hosts") == pytest.approx(losses(folder, "whole"), rel=1e-3)
    print({what: f"{seconds:.0f} s" for what, seconds in told.items()})

"""Networks and services that do not answer: named within seconds, and a tracker never costs a step."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults.suite.scene import STEPS, Shown, said

pytestmark = pytest.mark.faults

KEY = "c" * 40
TRACKED = ["logging=wandb", "logging.wandb=online"]


@contextlib.contextmanager
def server(answer: bytes | None) -> Iterator[int]:
    """Takes connections and gives this answer to each, or none at all."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        stop, held = threading.Event(), []

        def serve() -> None:
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, _ = listener.accept()
                    held.append(connection)
                    if answer:
                        connection.recv(4096)
                        connection.sendall(answer)
                        connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        stop.set()
        thread.join()


@pytest.mark.parametrize(("fault", "answer"), [
    ("refuses connections", "nobody"),
    ("never answers", None),
    ("answers with errors", b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"),
])  # fmt: skip
def test_a_tracker_in_trouble_costs_no_step(scene, show, fault, answer):
    name = f"tracker-{fault.split()[0]}"
    with server(None if answer == "nobody" else answer) as port:
        address = "http://127.0.0.1:9" if answer == "nobody" else f"http://127.0.0.1:{port}"
        job = scene.start(name, *TRACKED, WANDB_BASE_URL=address, WANDB_API_KEY=KEY, WANDB_MODE="online")
        scene.wait_for_step(job, name, STEPS)
        seconds = time.monotonic() - job.started
        scene.finish(job)
    scene.check_as_undisturbed(name)
    line = said(job, "tracker:")
    show("E11", f"the tracker's server {fault}", Shown(f"{line} (all steps done after {seconds:.0f} s)", "-", None, 0))


def test_a_key_is_written_nowhere(scene, show):
    name = "secret"
    scene.finish(scene.start(name, "logging=wandb", WANDB_API_KEY=KEY, WANDB_MODE="offline"))
    for path in scene.run(name).rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    show("E13", "a secret in the environment", Shown("in no file of the run folder", "-"))


def test_a_rank_that_never_comes_is_waited_for_as_long_as_was_said(scene, show):
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        alone["MASTER_PORT"] = str(listener.getsockname()[1])
    job = scene.start("alone", "parallel.timeout_seconds=4", **alone)
    (status,) = job.wait(60)
    assert status == 69
    show("E6", "only one of two ranks comes up", Shown(said(job, "error"), str(status)))


def test_a_port_that_is_taken_is_named(scene, show):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        job = scene.start("port", "parallel.timeout_seconds=4", ranks=2, MASTER_PORT=port)
        statuses = job.wait(90)
    assert set(statuses) <= {69, -15, -9}
    show("E5", "the port of the job is taken", Shown(said(job, f"error.*{port}"), str(statuses[0])))

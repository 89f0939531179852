"""Keys in the environment and passwords in addresses: in no file that a run, its sampler or its report writes."""

import base64
from pathlib import Path

import boto3
import pytest

from tests.end_to_end.runs import run
from tests.faults.suite.harm import Harm
from tests.servers import faulty_proxy, nginx, s3_server

pytestmark = pytest.mark.slow

KEYS = {
    "WANDB_API_KEY": "5ec0e7" * 6 + "f00d",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED00",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+access+key/of/forty+chars",
    "AWS_SESSION_TOKEN": "planted-session-token",
    "HF_TOKEN": "hf_plantedPlantedPlantedPlanted",
    "HUGGING_FACE_HUB_TOKEN": "hf_anotherAnotherAnotherAnother",
}
USER, PASSWORD, QUOTED, TOKEN = "planted-user", "planted/password", "planted%2Fpassword", "planted-token"
SENT = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
"""As HTTP has it."""
SECRETS = [*KEYS.values(), USER, PASSWORD, QUOTED, TOKEN, SENT]
QUICK = ["data.storage.retries=0", "data.storage.timeout_seconds=2", "data.storage.connect_timeout_seconds=2",
         "data.storage.cache_gib=0", "data.num_workers=0"]  # fmt: skip
SLOW = Harm("kinema.distributed.engine:Engine.step", "slow", times=1000)


def leaks(content: bytes) -> list[str]:
    return [secret for secret in SECRETS if secret.encode() in content]


def leaks_under(folder: Path) -> dict[str, list[str]]:
    """Secrets by the file that holds them, or that is named after them."""
    held = {
        str(path): leaks(bytes(path) + (path.read_bytes() if path.is_file() else b"")) for path in folder.rglob("*")
    }
    return {path: found for path, found in held.items() if found}


@pytest.fixture(scope="module")
def variables():
    """What a user's environment holds; an S3 server takes the keys."""
    with s3_server("bucket") as endpoint:
        yield {**KEYS, "WANDB_MODE": "offline", "AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def server(scene, tmp_path):
    """The scene's data set at a server, which can be taken away."""
    with nginx(scene.folder, tmp_path / "nginx") as port, faulty_proxy(port, {}) as proxy:
        yield proxy


def address(port: int) -> str:
    """With a password and a signature."""
    return f"http://{USER}:{QUOTED}@127.0.0.1:{port}/toy?signature={TOKEN}"


def test_secrets_are_in_no_file_and_no_message(scene, variables, server, tmp_path):
    options = [f"data.path='{address(server.port)}'", f"data.cache_folder={tmp_path}/cache", "logging=wandb",
               "logging.wandb=auto", "logging.keys=true", "checkpoint.remote=s3://bucket/far", "steps=4"]  # fmt: skip
    trained = scene.finish(scene.start("secrets", *options, **variables))
    sampler = ["sample.py", f"run={scene.run('secrets')}", "prompt=a red circle", "num_steps=1", "shape=[5,32,32]"]
    sampled = scene.finish(scene.warm.start(sampler, scene.folder / "sampled.log", **variables))
    run("-m", "kinema.cli", "report", f"{scene.run('secrets')}")
    assert leaks((trained.output + sampled.output).encode()) == []
    assert leaks_under(scene.run("secrets")) == {}
    assert leaks_under(tmp_path / "cache") == {}

    uploaded = list(boto3.resource("s3").Bucket("bucket").objects.all())
    assert any(entry.key.endswith("manifest.json") for entry in uploaded)
    assert [entry.key for entry in uploaded if leaks(entry.get()["Body"].read())] == []
    assert "tracker:" not in trained.output, "Weights & Biases has taken everything"
    [tracked] = scene.run("secrets").rglob("*.wandb")
    assert b"127.0.0.1" in tracked.read_bytes(), "the rest of the address is told"


def test_errors_tell_no_secrets(scene, variables, server):
    """A server that goes away in mid-run, one that was never there, and an address that is refused."""
    data = [f"data.path='{address(server.port)}'", *QUICK]
    vanished = scene.start("vanished", *data, harm=SLOW, **variables)
    scene.wait_for_step(vanished, "vanished", 1)
    server.down = True
    absent = scene.start("absent-server", f"data.path='{address(9)}'", *QUICK, **variables)
    refused = scene.start("refused", f"checkpoint.remote='s3://{USER}:{QUOTED}@bucket/far'", **variables)
    for job, status in ((vanished, 69), (absent, 69), (refused, 64)):
        assert leaks(scene.finish(job, status).output.encode()) == []
    assert leaks_under(scene.run("vanished")) == {}

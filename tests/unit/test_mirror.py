"""Checkpoints at a real S3 server: they come back whole, and whatever the store does, training goes on."""

import time

import boto3
import pytest
import torch

from kinema.data.storage.remote import StorageConfig
from kinema.training.checkpoints.mirror import Mirror, Uploads
from kinema.training.checkpoints.store import (
    CheckpointError,
    CheckpointStore,
    json_writer,
    tensor_writer,
    text_writer,
    verify,
)
from tests.servers import s3_server

QUICK = StorageConfig(retries=1, backoff_seconds=0.01, connect_timeout_seconds=1, timeout_seconds=1)


@pytest.fixture(scope="module", name="endpoint")
def make_endpoint():
    with s3_server("bucket") as endpoint:
        yield endpoint


def save(run, step):
    writers = {
        "model.safetensors": tensor_writer({"w": torch.full((100,), float(step))}),
        "training.json": json_writer({"step": step}),
        "config.yaml": text_writer("name: run\n"),
    }
    return CheckpointStore(run, keep=9).publish(step, writers)


def test_a_checkpoint_comes_back_on_another_machine(endpoint, tmp_path):
    run = tmp_path / "one/run"
    mirror = Mirror.below("s3://bucket/here", run, QUICK)
    (run).mkdir(parents=True)
    (run / "rights.json").write_text("{}")
    CheckpointStore(run / "vae").publish(7, {"ema.safetensors": tensor_writer({"v": torch.ones(3)})})
    for step in (2, 4):
        assert mirror.upload(save(run, step)) > 400
    assert mirror.upload(CheckpointStore(run).open(4)) == 0  # it is there
    assert mirror.steps() == [2, 4]

    elsewhere, told = tmp_path / "two/run", []
    elsewhere.mkdir(parents=True)
    Mirror.below("s3://bucket/here", elsewhere, QUICK).restore(told.append)
    found = CheckpointStore(elsewhere).newest()
    assert found.step == 4
    assert torch.equal(found.tensors("model")["w"], torch.full((100,), 4.0))
    assert (elsewhere / "config.yaml").read_text() == "name: run\n"
    assert (elsewhere / "rights.json").read_text() == "{}"
    assert torch.equal(CheckpointStore(elsewhere / "vae").newest().tensors("ema")["v"], torch.ones(3))
    assert told == ["step-00000004 was fetched from s3://bucket/here/run"]


def test_a_folder_without_its_seal_is_no_checkpoint_and_damage_falls_back(endpoint, tmp_path):
    run = tmp_path / "run"
    mirror = Mirror.below("s3://bucket/broken", run, QUICK)
    for step in (1, 2, 3):
        mirror.upload(save(run, step))
    bucket = boto3.resource("s3").Bucket("bucket")
    bucket.Object("broken/run/step-00000003/seal.json").delete()
    path = "broken/run/step-00000002/model.safetensors"
    content = bytearray(bucket.Object(path).get()["Body"].read())
    content[-1] ^= 1
    bucket.Object(path).put(Body=bytes(content))
    told = []
    found = Mirror.below("s3://bucket/broken", tmp_path / "other/run", QUICK).fetch_newest(told.append)
    assert found.step == 1
    assert verify(found.folder) is None
    assert "step 2 of s3://bucket/broken/run: model.safetensors has changed" in told[0]
    bucket.Object("broken/run/step-00000001/model.safetensors").delete()
    with pytest.raises(CheckpointError, match="nobody can say what to go on from"):
        Mirror.below("s3://bucket/broken", tmp_path / "third/run", QUICK).restore(told.append)
    assert CheckpointStore(tmp_path / "third/run").steps() == []


def test_a_store_that_does_not_answer_costs_an_event_and_no_time(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    uploads = Uploads(Mirror.below("s3://bucket/down", tmp_path, QUICK))
    began = time.monotonic()
    for step in (1, 2, 3):
        uploads.offer(save(tmp_path, step))
    assert time.monotonic() - began < 1
    uploads.finish(30)
    events = uploads.take_events()
    assert {event["event"] for event in events} <= {"upload failed", "upload left out"}
    assert [event["step"] for event in events if event["event"] == "upload failed"][-1] == 3
    with pytest.raises(CheckpointError, match="nobody can say what to go on from"):
        Mirror.below("s3://bucket/down", tmp_path / "x", QUICK).restore(print)


def test_uploads_in_the_background_are_told_and_the_seal_comes_last(endpoint, tmp_path, caplog):
    caplog.set_level("INFO", "werkzeug")
    uploads = Uploads(Mirror.below("s3://bucket/later", tmp_path / "run", QUICK))
    for step in (1, 2, 3):
        uploads.offer(save(tmp_path / "run", step))
    uploads.finish(30)
    events = uploads.take_events()
    assert [(event["step"], event["event"]) for event in events][-1] == (3, "uploaded")
    served = [record.getMessage().split('"')[1] for record in caplog.records if '"PUT ' in record.getMessage()]
    assert served[-1].split()[1] == "/bucket/later/run/step-00000003/seal.json"
    assert [line.endswith("seal.json HTTP/1.1") for line in served].count(True) == len(served) // 4  # the others before


@pytest.mark.parametrize(
    "address", ["/plain/folder", "https://host/x", "s3://user:secret@bucket/x", "pipe:rm", "nope://x"]
)
def test_what_is_no_writable_address_without_secrets_is_refused(tmp_path, address):
    with pytest.raises(ValueError, match=r"^checkpoint\.remote=.* must") as error:
        Mirror.below(address, tmp_path)
    assert "secret" not in str(error.value)

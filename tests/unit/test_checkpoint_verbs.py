"""`kinema checkpoint`: what it lists, verifies, converts and averages is what lies there, and damage is told."""

import shutil

import boto3
import pytest
import torch

from kinema import cli
from kinema.identity import fingerprint_like
from kinema.training.checkpoints.mirror import Mirror
from kinema.training.checkpoints.store import CheckpointError, CheckpointStore, json_writer, tensor_writer, text_writer
from kinema.training.verbs.average import weighted_sum
from tests.servers import s3_server

STEP = "checkpoints/step-00000006"


def tensors(step):
    draw = torch.Generator().manual_seed(step)
    return {"w": torch.randn(5, 7, generator=draw), "b": torch.randn(3, generator=draw), "n": torch.tensor(step)}


def save(run, step, changed=None):
    ema = {name: value * 2 for name, value in tensors(step).items()}
    manifest = {"task": "dit", "step": step, "fingerprints": {"raw": f"crc32-{step}", "ema": "crc32-0"}}
    writers = {
        "model.safetensors": tensor_writer(changed or tensors(step)),
        "ema.safetensors": tensor_writer(ema),
        "ema_0.050.safetensors": tensor_writer({name: value * 3 for name, value in tensors(step).items()}),
        "seen.safetensors": tensor_writer({"run/times": torch.tensor([step])}),
        "optimizer.safetensors": tensor_writer({"model/exp_avg/w": torch.ones(5, 7)}),
        "training.json": json_writer({"step": step}),
        "manifest.json": json_writer(manifest),
        "config.yaml": text_writer("name: x\n"),
    }
    return CheckpointStore(run, keep=9).publish(step, writers).folder


@pytest.fixture(name="source")
def make_source(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path / "run", step)
    CheckpointStore(tmp_path / "run/vae").publish(1, {"manifest.json": json_writer({})})
    return tmp_path / "run"


def kinema(capsys, *words):
    """Exit status and what the command printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["kinema", *map(str, words)])
        patch.delenv("KINEMA_TRACEBACK", raising=False)
        with pytest.raises(SystemExit) as end:
            cli.main()
    out = capsys.readouterr()
    return end.value.code, out.out + out.err


def test_ls_shows_what_is_there_and_names_damage(source, capsys):
    (source / "checkpoints/step-00000004/model.safetensors").write_bytes(b"short")
    (source / "checkpoints/step-00000002/seal.json").write_text("{}")
    status, text = kinema(capsys, "checkpoint", "ls", source, "--verify")
    lines = text.splitlines()
    assert status == 0
    assert lines[0].split() == ["checkpoint", "age", "MiB", "files", "kind", "verified", "what"]
    assert "DAMAGED   seal.json cannot be read" in lines[1]
    assert "DAMAGED   model.safetensors has 5 bytes" in lines[2]
    assert lines[3].split()[3:] == ["0.0", "8", "state", "whole", "dit", "ema", "crc32-0"]
    assert lines[4] == "3 checkpoint(s), 2 damaged"
    status, text = kinema(capsys, "checkpoint", "ls", source)
    assert "1 damaged; --verify reads them all" in text


def test_verify_passes_whole_ones_and_fails_for_damage_and_for_nan(source, capsys):
    status, text = kinema(capsys, "checkpoint", "verify", source)
    assert (status, text.splitlines()[-1]) == (0, "PASS: 3 of 3 are whole")
    save(source, 8, {"w": torch.tensor([1.0, float("nan")])})
    status, text = kinema(capsys, "checkpoint", "verify", source / "checkpoints/step-00000008")
    assert status == 66
    assert "DAMAGED: w in model.safetensors holds a number that is not finite" in text
    status, text = kinema(capsys, "checkpoint", "verify", source)
    assert (status, text.splitlines()[-1]) == (66, "FAIL: 3 of 4 are whole")
    CheckpointStore(source).publish(8, {"ema_0.100.safetensors": tensor_writer({"w": torch.tensor([float("inf")])})})
    status, text = kinema(capsys, "checkpoint", "verify", source / "checkpoints/step-00000008")
    assert (status, "w in ema_0.100.safetensors holds a number that is not finite" in text) == (66, True)


def test_convert_to_many_ranks_and_back_gives_every_tensor_and_document_again(source, tmp_path, capsys):
    assert kinema(capsys, "checkpoint", "convert", source, "--to", tmp_path / "four", "--ranks", 4)[0] == 0
    assert kinema(capsys, "checkpoint", "convert", tmp_path / "four", "--to", tmp_path / "one")[0] == 0
    four, one = CheckpointStore(tmp_path / "four").newest(), CheckpointStore(tmp_path / "one").newest()
    assert len(four.files("model")) == 4
    for name in ("model", "ema", "ema_0.050", "optimizer"):
        expected = CheckpointStore(source).open(6).tensors(name)
        for made in (four, one):
            assert made.tensors(name).keys() == expected.keys()
            assert all(torch.equal(value, expected[key]) for key, value in made.tensors(name).items())
    assert len(four.files("ema_0.050")) == 4
    assert one.document("training") == {"step": 6}
    assert {path.name for path in one.folder.iterdir()} == {path.name for path in (source / STEP).iterdir()}
    assert (four.folder / "seen.safetensors").read_bytes() == (source / STEP / "seen.safetensors").read_bytes()
    marks = four.document("manifest")["fingerprints"]
    assert marks == one.document("manifest")["fingerprints"]
    assert fingerprint_like(marks["ema"], one.tensors("ema")) == marks["ema"]
    assert (tmp_path / "one/vae/checkpoints/step-00000001/seal.json").exists()
    status, text = kinema(capsys, "checkpoint", "convert", source, "--to", tmp_path / "one")
    assert status == 64
    assert "is not empty" in text


def test_rounded_weights_are_for_sampling_and_hold_no_state(source, tmp_path, capsys):
    assert kinema(capsys, "checkpoint", "convert", source, "--to", tmp_path / "small", "--dtype", "bfloat16")[0] == 0
    small = CheckpointStore(tmp_path / "small").newest()
    assert small.tensors("model")["w"].dtype == torch.bfloat16
    assert torch.equal(small.tensors("model")["w"], tensors(6)["w"].bfloat16())
    assert small.tensors("ema_0.050")["w"].dtype == torch.bfloat16
    assert not (small.folder / "training.json").exists()
    with pytest.raises(CheckpointError, match="holds no optimizer"):
        small.files("optimizer")


def test_average_is_the_mean_and_says_of_what(source, tmp_path, capsys):
    words = ["--to", tmp_path / "mean", "--steps", 2, 6, "--weights", "raw"]
    status, text = kinema(capsys, "checkpoint", "average", source, *words)
    assert (status, text.splitlines()[-1][:5]) == (0, "READY")
    mean = CheckpointStore(tmp_path / "mean").newest()
    expected = (tensors(2)["w"].double() + tensors(6)["w"].double()) / 2
    torch.testing.assert_close(mean.tensors("ema")["w"].double(), expected, rtol=1e-7, atol=1e-7)
    assert int(mean.tensors("model")["n"]) == 6
    said = mean.document("manifest")["average"]
    assert said == {
        "of": {"step-00000002": "crc32-2", "step-00000006": "crc32-6"}, "weights": "raw", "factors": [0.5, 0.5]
    }  # fmt: skip
    assert mean.document("manifest")["fingerprints"]["raw"] == mean.document("manifest")["fingerprints"]["ema"]
    status, text = kinema(capsys, "checkpoint", "average", source, "--to", tmp_path / "x", "--steps", 2)
    assert status == 64
    assert "two checkpoints or more" in text


def test_a_mean_with_a_damaged_one_says_which_are_whole(source, tmp_path, capsys):
    (source / "checkpoints/step-00000004/model.safetensors").write_bytes(b"short")
    status, text = kinema(capsys, "checkpoint", "average", source, "--to", tmp_path / "mean", "--weights", "raw")
    assert (status, text.count("\n"), (tmp_path / "mean").exists()) == (66, 1, False)
    assert "step-00000004 is damaged: model.safetensors has 5 bytes" in text
    assert "Type --steps 2 6, or --last N," in text
    assert kinema(capsys, "checkpoint", "average", source, "--to", tmp_path / "mean", "--steps", 2, 6)[0] == 0
    status, text = kinema(capsys, "checkpoint", "average", source, "--to", tmp_path / "x", "--last", 2)
    assert (status, "Too few are left" in text) == (66, True)
    status, text = kinema(capsys, "checkpoint", "convert", source / "checkpoints/step-00000004", "--to", tmp_path / "x")
    assert (status, "is damaged" in text) == (66, True)


def test_factors_weigh_and_other_models_are_refused(source, tmp_path):
    pair = [(CheckpointStore(source).open(step), "model") for step in (2, 4)]
    found = weighted_sum(pair, [3.0, -2.0])["b"]
    torch.testing.assert_close(found, 3 * tensors(2)["b"] - 2 * tensors(4)["b"], rtol=1e-6, atol=1e-6)
    save(source, 9, {"w": torch.zeros(2)})
    with pytest.raises(ValueError, match="hold different models"):
        weighted_sum([pair[0], (CheckpointStore(source).open(9), "model")], [0.5, 0.5])


def test_help_of_the_group_names_its_verbs(capsys):
    status, text = kinema(capsys, "checkpoint", "--help")
    assert status == 0
    assert [line.split()[2] for line in text.splitlines() if line.startswith("  kinema")] == [
        "ls", "verify", "fetch", "convert", "average"
    ]  # fmt: skip
    assert kinema(capsys, "checkpoint", "frobnicate")[0] == 64


def test_multiples_stay_for_ever_and_nothing_goes_before_a_newer_one_is_whole(tmp_path):
    store, told = CheckpointStore(tmp_path, keep=2, keep_every=4), []
    for step in (2, 4, 6, 8, 10, 12):
        store.publish(step, {"training.json": json_writer({"step": step})})
    assert store.steps() == [4, 8, 10, 12]
    for step in (10, 12):
        (store.at(step).folder / "training.json").write_text("{}")
    store.keep_every = 0
    store.announce(12, told.append)
    assert store.steps() == [4, 8, 10, 12]
    assert "nothing was deleted: no checkpoint after step 8 is whole (training.json has" in told[0]
    shutil.rmtree(store.at(12).folder)
    store.publish(12, {"training.json": json_writer({"step": 12})})
    assert store.steps() == [10, 12]


def test_a_run_at_an_address_is_listed_verified_and_fetched(source, tmp_path, capsys):
    with s3_server("bucket"):
        mirror, address = Mirror.below("s3://bucket/all", source), "s3://bucket/all/run"
        for step in (2, 4):
            mirror.upload(CheckpointStore(source).at(step))
        status, text = kinema(capsys, "checkpoint", "ls", address)
        assert status == 0
        assert [line.split()[0] for line in text.splitlines()[1:3]] == ["step-00000002", "step-00000004"]
        assert "2 checkpoint(s), 0 damaged" in text

        broken = source / "checkpoints/step-00000004/model.safetensors"
        content = broken.read_bytes()
        boto3.resource("s3").Bucket("bucket").Object(f"all/run/step-00000004/{broken.name}").put(Body=content[:-1])
        status, text = kinema(capsys, "checkpoint", "verify", address)
        assert status == 66
        assert "step-00000004: DAMAGED: model.safetensors has" in text
        assert "FAIL: 1 of 2 are whole" in text

        status, text = kinema(capsys, "checkpoint", "fetch", address, "--to", tmp_path / "here", "--step", 4)
        assert status == 66
        assert "model.safetensors has" in text
        status, text = kinema(capsys, "checkpoint", "fetch", address, "--to", tmp_path / "here")
        assert status == 0
        assert "skipped a damaged checkpoint: step 4" in text
        fetched = CheckpointStore(tmp_path / "here").newest().folder
        assert same_files(fetched, source / "checkpoints/step-00000002")
        assert CheckpointStore(tmp_path / "here/vae").steps() == [1]
        assert (tmp_path / "here/config.yaml").read_text() == "name: x\n"

        status, text = kinema(capsys, "checkpoint", "fetch", address, "--to", tmp_path / "here")
        assert (status, "holds checkpoints already, of steps [2]" in text) == (64, True)
        status, text = kinema(capsys, "checkpoint", "fetch", "s3://bucket/all", "--to", tmp_path / "other")
        assert (status, "no such checkpoint; there are []" in text) == (66, True)
    status, text = kinema(capsys, "checkpoint", "convert", address, "--to", tmp_path / "other")
    assert (status, "first: kinema checkpoint fetch s3://bucket/all/run" in text) == (2, True)


def same_files(one, other):
    names = {path.name for path in one.iterdir()}
    return names == {path.name for path in other.iterdir()} and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )

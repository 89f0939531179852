"""Wrong input to a whole run: an error that says what to type, and no earlier checkpoint harmed."""

import shutil

import pytest

from kinema.training.checkpoint import verify
from tests.end_to_end.commands import checkpoint, dit_command, run, train_vae

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    run("data_prep/toy.py", "--out", f"{folder}/toy", "--clips", "8", "--heldout", "4", "--sizes", "64x64")
    train_vae(folder, "vae", 2)
    run(*dit_command(folder, "dit", 2, "validation.every_steps=0"))
    return folder


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.shapes=[[6,32,32]]", "Nearest legal"),
        ("data.path=/nowhere", "/nowhere"),
        ("vae.path=/nowhere", "vae.path=/nowhere holds no checkpoint"),
        ("data.lanes=8", "data.clips_per_step=4 must be at least data.lanes=8"),
        ("optim.lerning_rate=1", "Did you mean optim.learning_rate?"),
        ("objective.timestep_mean=0.5 objective.timestep_distribution=uniform", "never reads it"),
    ],
)
def test_a_mistake_is_named_with_what_to_type(folder, override, message):
    answer = run(*dit_command(folder, "mistake", 2, *override.split()), expect=None)
    assert answer.returncode != 0
    assert message in answer.stderr, answer.stderr[-1500:]
    assert "built successfully" not in answer.stdout
    assert not (folder / "runs" / "mistake").exists()


def test_a_checkpoint_of_another_model_is_refused_and_unharmed(folder):
    before = checkpoint(folder, "dit", 2)
    answer = run(
        *dit_command(folder, "dit", 4, "model.width=48", "model.rope_axes=[12,6,6]", "allow_config_change=true"),
        expect=None,
    )
    assert answer.returncode != 0
    assert "it is another model's" in answer.stderr
    assert verify(before) is None


def test_a_missing_shard_is_named_before_training(folder):
    broken = folder / "broken"
    shutil.copytree(folder / "toy", broken)
    shard = next(broken.glob("*.tar"))
    shard.unlink()
    answer = run(*dit_command(folder, "missing", 2, f"data.path={broken}"), expect=None)
    assert answer.returncode != 0
    assert shard.name in answer.stderr


def test_a_damaged_clip_is_quarantined_and_too_many_stop_the_run(folder):
    damaged = folder / "damaged"
    shutil.copytree(folder / "toy", damaged)
    for shard in damaged.glob("*.tar"):
        content = bytearray(shard.read_bytes())
        for place in range(3000, len(content), 700):  # in every clip, far from the headers' first block
            content[place] ^= 0xFF
        shard.write_bytes(bytes(content))
    answer = run(*dit_command(folder, "damaged", 2, f"data.path={damaged}", "data.min_failed_clips=0"), expect=None)
    assert answer.returncode != 0
    assert "checksum" in answer.stderr
    assert (folder / "runs/damaged/quarantine.jsonl").exists() or "no clip of step 0" in answer.stderr

"""Wrong input to a whole run: an error that says what to type, and no earlier checkpoint harmed."""

import shutil

import pytest

from kinema.training.checkpoints.store import verify
from tests.end_to_end.commands import checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("override", "message", "status"),
    [
        ("data.shapes=[[6,32,32]]", "Nearest legal", 64),
        ("data.path=/nowhere", "/nowhere", 64),
        ("vae.path=/nowhere", "vae.path=/nowhere holds no checkpoint", 66),
        ("data.lanes=8", "data.clips_per_step=4 must be at least data.lanes=8", 64),
        ("optim.lerning_rate=1", "Did you mean optim.learning_rate?", 64),
        ("objective.timestep_mean=0.5 objective.timestep_distribution=uniform", "never reads it", 64),
    ],
)
def test_a_mistake_is_named_with_what_to_type(scene, override, message, status):
    job = scene.finish(scene.start("mistake", *override.split()), status)
    assert message in job.output
    assert "built successfully" not in job.output
    assert not scene.run("mistake").exists()


def test_a_checkpoint_of_another_model_is_refused_and_unharmed(scene):
    scene.copy_of_whole("widened", 6)
    options = ["model.width=48", "model.rope_axes=[12,6,6]", "allow_config_change=true"]
    assert "it is another model's" in scene.finish(scene.start("widened", *options), 64).output
    assert verify(checkpoint(scene.folder, "widened", 6)) is None


def test_a_missing_shard_is_named_before_training(scene):
    broken = scene.folder / "broken"
    shutil.copytree(scene.folder / "toy", broken)
    shard = next(broken.glob("*.tar"))
    shard.unlink()
    assert shard.name in scene.finish(scene.start("missing", f"data.path={broken}"), 64).output


def test_a_damaged_clip_is_quarantined_and_too_many_stop_the_run(scene):
    damaged = scene.folder / "damaged"
    shutil.copytree(scene.folder / "toy", damaged)
    for shard in damaged.glob("*.tar"):
        content = bytearray(shard.read_bytes())
        for place in range(3000, len(content), 700):  # in every clip, far from the headers' first block
            content[place] ^= 0xFF
        shard.write_bytes(bytes(content))
    job = scene.finish(scene.start("damaged", f"data.path={damaged}", "data.min_failed_clips=0"), 65)
    assert "checksum" in job.output
    assert (scene.run("damaged") / "quarantine.jsonl").exists() or "no clip of step 0" in job.output

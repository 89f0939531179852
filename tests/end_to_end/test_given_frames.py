"""A first frame from the command line: trained on one rank and on two, sampled, and refused where it contradicts."""

import numpy as np
import pytest
from PIL import Image

from tests.end_to_end.commands import dit_command, frames, losses, records
from tests.end_to_end.runs import run

pytestmark = pytest.mark.slow
CONDITION = ["condition=clean_frame", "condition.dropout=0.25", "model=wan_tiny", "model.qk_norm=none"]


@pytest.fixture(scope="module", name="picture")
def some_picture(folder):
    path = folder / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(path)
    return path


def test_a_first_frame_is_trained_and_sampled(folder, picture):
    samples = ["task.samples.every_steps=3", "task.samples.shape=[5,32,32]", "task.samples.prompts=[a red circle]",
               f"task.samples.images=[{picture}]"]  # fmt: skip
    run(*dit_command(folder, "given", 3, *CONDITION, *samples))
    run(*dit_command(folder, "given_two", 3, *CONDITION), ranks=2)
    assert losses(folder, "given_two") == pytest.approx(losses(folder, "given"), rel=1e-4)
    dropped = [record["images_dropped"] for record in records(folder, "given", "train").values()]
    assert dropped == [record["images_dropped"] for record in records(folder, "given_two", "train").values()]
    assert 0 < sum(dropped) < 3 * 4

    options = ["prompt=a red circle", "num_steps=2", "guidance_scale=2", f"image={picture}", "shape=[5,32,32]"]
    answer = run("sample.py", f"run={folder}/runs/given", *options, f"out={folder}/given")
    assert "32x32 of its 40x32 pixels around the centre" in answer.stdout
    during = folder / "runs/given/samples/step-00000003/00.mp4"
    assert frames(during).equal(frames(folder / "given/000.mp4"))


def test_images_that_contradict_the_training_are_refused(folder, picture):
    run(*dit_command(folder, "plain", 1))
    base = ["sample.py", "prompt=a red circle", "num_steps=2", "guidance_scale=1", f"out={folder}/refused"]
    for extra, message in (
        ([f"run={folder}/runs/plain", f"image={picture}"], "1 image(s) given: these weights were trained with 0"),
        ([f"run={folder}/runs/given", "image=absent.png"], "image=absent.png cannot be read"),
    ):
        answer = run(*base, *extra, expect=None)
        assert answer.returncode != 0
        assert message in answer.stderr, answer.stderr[-800:]
    answer = run(*dit_command(folder, "wrong", 1, "condition=clean_frame", "model.condition_channels=3"), expect=None)
    assert "Type model.condition_channels=0" in answer.stderr

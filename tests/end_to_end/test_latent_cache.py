"""A run that reads cached latents is the run that encodes its clips: mean, log-variance, and the same drawn noise."""

import pytest

from tests.end_to_end.commands import dit_command, losses, run

pytestmark = pytest.mark.slow
STEPS = 2


def test_cached_latents_give_the_losses_of_encoding(folder):
    options = ["data.window=start", "validation.every_steps=0", "task.samples.every_steps=0", "task.posterior=sample"]
    shapes = ["--shape", "5x32x32", "--shape", "9x32x32"]
    run(
        "-m",
        "kinema.cli",
        "data",
        "encode",
        f"{folder}/toy",
        "--vae",
        f"{folder}/runs/vae",
        *shapes,
        "--out",
        f"{folder}/latents",
    )
    run(*dit_command(folder, "on_the_fly", STEPS, *options))
    run(*dit_command(folder, "from_cache", STEPS, *options, f"data.latents={folder}/latents"))
    expected = losses(folder, "on_the_fly")
    assert len(expected) == STEPS
    assert losses(folder, "from_cache") == pytest.approx(expected, rel=2e-6)

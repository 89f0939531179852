"""A run that reads cached latents is the run that encodes its clips: mean, log-variance, and the same drawn noise."""

import pytest

from tests.end_to_end.commands import dit_command, losses, mixture, records
from tests.end_to_end.runs import other_data_set, run
from tests.servers import nginx

pytestmark = pytest.mark.slow
STEPS = 2
OPTIONS = ["data.window=start", "validation.every_steps=0", "task.samples.every_steps=0", "task.posterior=sample"]


@pytest.fixture(scope="module", name="latents")
def latents_of(folder):
    """Where the latents of a data set lie, encoded when they are asked for."""

    def encoded(data):
        path = folder / "latents" / data.name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            run("-m", "kinema.cli", "data", "encode", str(data), "--vae", f"{folder}/runs/vae",
                "--shape", "5x32x32", "--shape", "9x32x32", "--out", str(path))  # fmt: skip
        return path

    return encoded


def test_cached_latents_give_the_losses_of_encoding(folder, latents):
    run(*dit_command(folder, "on_the_fly", STEPS, *OPTIONS))
    run(*dit_command(folder, "from_cache", STEPS, *OPTIONS, f"data.latents={latents(folder / 'toy')}"))
    expected = losses(folder, "on_the_fly")
    assert len(expected) == STEPS
    assert losses(folder, "from_cache") == pytest.approx(expected, rel=2e-6)


def test_so_do_those_of_a_mixture_one_of_them_read_from_a_server(folder, latents, tmp_path):
    toy, other = folder / "toy", other_data_set(folder)
    run(*mixture(dit_command(folder, "mixed_on_the_fly", STEPS, *OPTIONS), toy=f"path:{toy}", other=f"path:{other}"))
    caches = {data.name: latents(data) for data in (toy, other)}
    with nginx(folder, tmp_path / "nginx") as port:
        caches["other"] = f"'http://127.0.0.1:{port}/latents/other'"
        members = {data.name: f"path:{data},latents:{caches[data.name]}" for data in (toy, other)}
        options = [*OPTIONS, f"data.cache_folder={tmp_path}/cache"]
        run(*mixture(dit_command(folder, "mixed_from_cache", STEPS, *options), **members))
    expected = losses(folder, "mixed_on_the_fly")
    assert len(expected) == STEPS
    assert losses(folder, "mixed_from_cache") == pytest.approx(expected, rel=2e-6)
    fetched = sum(record["storage_requests"] for record in records(folder, "mixed_from_cache", "train").values())
    assert fetched > 0, "no latent came from the server"

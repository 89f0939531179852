"""One tiny data set and one tiny VAE for all end-to-end tests."""

import pytest

from tests.end_to_end.runs import run, train_vae


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinema")
    run(
        "data_prep/toy.py",
        "--out",
        f"{folder}/toy",
        "--clips",
        "24",
        "--heldout",
        "4",
        "--sizes",
        "64x64,64x48",
    )
    train_vae(folder)
    return folder

"""A run that starts from other weights: in the same latents, or said."""

import pytest
import torch
import torch.distributed as dist

from kinema.distributed.mesh import Mesh
from kinema.distributed.process import Process
from kinema.training.checkpoint import CheckpointError, CheckpointStore, json_writer, tensor_writer
from kinema.training.saving import initial_weights
from kinema.training.start import check_same_data, check_same_vae

ALONE = Process(0, 0, 1, torch.device("cpu"), Mesh())


@pytest.fixture(name="group")
def make_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def published(folder, manifest):
    CheckpointStore(folder).publish(0, {"manifest.json": json_writer(manifest)})
    return CheckpointStore(folder).newest()


def test_the_vae_of_the_weights_is_demanded_by_its_hash(tmp_path):
    source = published(tmp_path / "a", {"task": "dit", "vae": {"hash": "one"}})
    assert check_same_vae(source, {"hash": "one"}, allow_other=False) is None
    with pytest.raises(ValueError, match=r"hash one, that of vae\.path has two: .*a/vae, or allow_other_vae=true"):
        check_same_vae(source, {"hash": "two"}, allow_other=False)
    assert "hash one, that of vae.path has two: allowed" in check_same_vae(source, {"hash": "two"}, allow_other=True)


def test_weights_that_came_without_their_vae_are_said_to_be_unchecked(tmp_path):
    source = published(tmp_path / "a", {"task": "dit"})
    assert "does not say which VAE" in check_same_vae(source, {"hash": "one"}, allow_other=False)


def test_a_run_goes_on_in_the_data_that_it_began_with_and_in_no_other(tmp_path):
    found = published(tmp_path / "a", {"data": {"hash": "1" * 64}})
    check_same_data(found, "1" * 64)
    with pytest.raises(
        ValueError, match=r"data\.path: the data set has changed since step-00000000, from hash 1+ to 2+"
    ):
        check_same_data(found, "2" * 64)


def test_no_run_goes_on_from_weights_alone(tmp_path, group):
    model, store = torch.nn.Linear(2, 2), CheckpointStore(tmp_path)
    store.publish(3, {"model.safetensors": tensor_writer(model.state_dict())})
    with pytest.raises(CheckpointError, match=r"step-00000003 holds weights only.* init_from=.*/step-00000003\.$"):
        initial_weights(store, ALONE, model)

"""A run that starts from other weights: in the same latents, or said."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from kinema.build import start_run
from kinema.distributed.mesh import Mesh
from kinema.distributed.process import Process
from kinema.training.checkpoints.saving import initial_weights
from kinema.training.checkpoints.store import CheckpointError, CheckpointStore, json_writer, tensor_writer
from kinema.training.ema import EMA, EMAConfig
from kinema.training.run_folder import keep_config
from kinema.training.start import check_averages, check_same_data, check_same_vae

ALONE = Process(0, 0, 1, torch.device("cpu"), Mesh())
SHARDS = SimpleNamespace(shards=lambda: [torch.zeros(2)])


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


def test_an_average_that_the_run_has_not_kept_is_refused_by_its_key(tmp_path):
    store = CheckpointStore(tmp_path)
    store.publish(3, {f"{name}.safetensors": tensor_writer({}) for name in ("model", "ema", "ema_0.050")})
    for power in ([], [0.05]):
        check_averages(store.at(3), EMA(EMAConfig(power=power), SHARDS))
    with pytest.raises(ValueError, match=r"ema\.power=\[0\.05, 0\.1\]: .* holds no ema_0\.100.*init_from=.*step-0+3\."):
        check_averages(store.at(3), EMA(EMAConfig(power=[0.05, 0.1]), SHARDS))


def test_a_start_that_fails_leaves_the_configuration_of_the_run(tmp_path, group):
    run, checkpoint = tmp_path / "x", SimpleNamespace(remote=None, keep=3, keep_every=0)
    config = SimpleNamespace(seed=0, run_root=tmp_path, name="x", checkpoint=checkpoint, allow_config_change=True)
    CheckpointStore(run).publish(3, {})
    keep_config(run, "seed: 1\n")
    with pytest.raises(ValueError, match="refused"), start_run(config, "seed: 2\n", ALONE):
        raise ValueError("refused")
    assert (run / "config.yaml").read_text() == "seed: 1\n"
    config.allow_config_change = False
    with (
        pytest.raises(ValueError, match=r"began with another configuration \(seed"),
        start_run(config, "seed: 2\n", ALONE),
    ):
        pass

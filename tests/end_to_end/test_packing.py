"""How a step's clips are packed changes nothing: one pack, a clip a pack, two ranks with packs of different shapes."""

import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir

from kinema.build import build_dit, start_run
from kinema.config import Reads, register_schemas, resolved_yaml, to_config
from kinema.distributed.mesh import make_mesh
from kinema.distributed.process import Process
from tests.end_to_end.commands import ROOT, dit_command, records
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

STEPS = 3
SHAPES = "data.shapes=[[13,32,32],[5,32,48]]"  # each aspect ratio of the toy data has its own
MEASURED = ("loss", "grad_norm", "clips", "tokens", "captions_dropped")


def train(folder, runs):
    """Each run (name, overrides) by the trainer of `train.py`, one after the other -> the shapes of each pack."""
    packs = []
    register_schemas()
    process = Process(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"), make_mesh(1))
    for name, overrides in runs:
        command = dit_command(folder, name, STEPS, SHAPES, "data.num_workers=0", "validation.every_steps=0", *overrides)
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            composed = compose("train", overrides=command[1:])
        config = to_config(composed)
        reads = Reads(config)
        with start_run(config, resolved_yaml(composed), process) as run:
            trainer = build_dit(config, run, process, unread_keys=reads.problem)
            trainer.fit()
        packs += [{slot.clip.shape for slot in lane} for step in range(STEPS) for lane in trainer.plan.step(step)]
    return packs


def measured(folder, name):
    """Step -> numbers of its record; noise levels at which no clip fell have none."""
    found = {}
    for step, record in records(folder, name, "train").items():
        levels = {level: loss for level, loss in record["loss_by_noise"].items() if loss is not None}
        found[step] = {key: record[key] for key in MEASURED} | levels
    return found


@pytest.fixture(name="packed", scope="module")
def packed_in_every_way(folder):
    (packs,) = run_ranks(train, 1, folder, [(f"lanes-{lanes}", [f"data.lanes={lanes}"]) for lanes in (1, 2, 4)])
    stages = [(f"ranks-2-zero-{stage}", ["data.lanes=2", f"parallel.zero_stage={stage}"]) for stage in (2, 3)]
    packs += run_ranks(train, 2, folder, stages)[0]
    assert max(map(len, packs)) == 2  # packs of several shapes, or nothing is shown
    return folder


@pytest.mark.parametrize("name", ["lanes-1", "lanes-2", "ranks-2-zero-2", "ranks-2-zero-3"])
def test_a_step_is_the_same_however_its_clips_are_packed(packed, name):
    """Against a clip a pack: the loss is the mean over the global batch, and noise belongs to clips, not to packs."""
    found, alone = measured(packed, name), measured(packed, "lanes-4")
    assert list(found) == [1, 2, 3]
    for step, record in alone.items():
        assert found[step] == pytest.approx(record, rel=2e-5), step


def test_the_metrics_say_how_even_the_lanes_were(packed):
    for name, lanes in (("lanes-1", 1), ("lanes-4", 4), ("ranks-2-zero-3", 2)):
        for record in records(packed, name, "train").values():
            said = record["lanes"]
            assert said["padding"] == 0.0
            assert said["seconds"] > 0
            assert 1 <= said["slowest"] <= lanes
            assert 1 / lanes <= said["efficiency"] <= 1
            assert (said["efficiency"], said["slowest"]) == (1, 1) or lanes > 1
    alone = [record["lanes"]["efficiency"] for record in records(packed, "lanes-4", "train").values()]
    assert min(alone) < 1  # clips of 12 and of 16 tokens cannot cost the same

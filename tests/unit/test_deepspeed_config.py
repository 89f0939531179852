"""The DeepSpeed dictionary: every key is one that DeepSpeed reads, and messages fit the model."""

import pytest
import torch
from torch import nn

from kinema.distributed.deepspeed_config import (
    OffloadConfig,
    OptimizerOffload,
    ParameterOffload,
    TrafficConfig,
    deepspeed_config,
    plan_traffic,
)
from kinema.distributed.engine import ParallelConfig


class Blocks(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.enter = nn.Linear(8, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))


def test_a_bucket_is_one_block():
    with torch.device("meta"):
        model = Blocks(4096, 40)
    planned = plan_traffic(model, TrafficConfig(), "cuda")
    assert planned.overlap
    assert planned.bucket == 4096 * 4096 + 4096
    assert planned.live == 3 * planned.bucket
    assert planned.whole == planned.live + 9 * 4096  # and the first layer
    assert planned.line(3) == "buckets of 16.8 M elements, overlap on, at most 50.4 M weights whole"
    kept = plan_traffic(model, TrafficConfig(resident_elements=32768), "cuda")
    assert kept.line(3).endswith("weights whole, tensors up to 32,768 always")


def test_no_message_is_larger_than_a_small_model_and_what_is_typed_wins():
    model = Blocks(64, 3)
    planned = plan_traffic(model, TrafficConfig(), "cpu")
    assert planned.bucket == sum(p.numel() for p in model.parameters())
    assert not planned.overlap
    typed = plan_traffic(model, TrafficConfig(overlap=True, bucket_elements=100, resident_elements=7), "cpu")
    assert (typed.overlap, typed.bucket, typed.resident) == (True, 100, 7)


def test_deepspeed_knows_every_key_and_takes_every_value():
    import deepspeed.runtime.constants as top
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    offload = OffloadConfig(OptimizerOffload.cpu, ParameterOffload.cpu)
    made = deepspeed_config(3, 4, 1.0, plan_traffic(Blocks(64, 3), TrafficConfig(), "cpu"), offload)
    section = made.pop("zero_optimization")
    known = {value for value in vars(top).values() if isinstance(value, str)}
    assert made.keys() <= known
    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert section.keys() <= names
    read = DeepSpeedZeroConfig(**section)
    assert read.param_persistence_threshold == section["stage3_param_persistence_threshold"]
    assert read.overlap_comm is False


@pytest.mark.parametrize(
    ("stage", "offload", "message"),
    [
        (0, OffloadConfig(OptimizerOffload.cpu), "parallel.zero_stage=0 shards nothing"),
        (2, OffloadConfig(parameters=ParameterOffload.cpu), "Type parallel.zero_stage=3"),
        (2, OffloadConfig(OptimizerOffload.nvme), "type both a folder and nvme"),
        (2, OffloadConfig(OptimizerOffload.cpu, nvme_path="/disk"), "type both a folder and nvme"),
        (2, OffloadConfig(OptimizerOffload.nvme, nvme_path="/nmve/kinema"), "there is no folder /nmve"),
    ],
)
def test_what_cannot_be_offloaded_is_refused(stage, offload, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(zero_stage=stage, offload=offload)


@pytest.mark.parametrize("wrong", [{"bucket_elements": 0}, {"resident_elements": -1}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"parallel\.traffic\."):
        TrafficConfig(**wrong)

"""The whole DeepSpeed dictionary from typed fields, with nothing left to DeepSpeed's defaults, which change."""

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn


class OptimizerOffload(enum.Enum):
    """Where the optimiser's state and the float32 masters that it moves lie, and so where it computes."""

    none = "none"
    """On the device."""
    cpu = "cpu"
    """In the host's memory."""
    nvme = "nvme"
    """Masters in the host's memory, state in files under `nvme_path` that are mapped into it."""


class ParameterOffload(enum.Enum):
    """Where ZeRO 3 keeps its parts of the weights between uses."""

    none = "none"
    """On the device."""
    cpu = "cpu"
    """In the host's memory."""


@dataclass
class OffloadConfig:
    """Memory of the host instead of the device's (Ren et al. 2021, ZeRO-Offload); changes no number."""

    optimizer: OptimizerOffload = OptimizerOffload.none
    """none, cpu or nvme: where the optimiser's state lies; from ZeRO 1."""
    parameters: ParameterOffload = ParameterOffload.none
    """none or cpu: where the weights lie between uses; ZeRO 3 only."""
    nvme_path: str | None = None
    """Folder of a local disk for optimizer=nvme; each rank keeps its state there in files of its own."""

    def check(self, zero_stage: int) -> None:
        """Refuse what this ZeRO stage cannot offload."""
        if self.optimizer is not OptimizerOffload.none and zero_stage == 0:
            raise ValueError(
                f"parallel.offload.optimizer={self.optimizer.value} needs a sharded optimiser; "
                "parallel.zero_stage=0 shards nothing. Type parallel.zero_stage=1, 2 or 3."
            )
        if self.parameters is not ParameterOffload.none and zero_stage != 3:
            raise ValueError(
                f"parallel.offload.parameters={self.parameters.value} needs sharded weights, not "
                f"parallel.zero_stage={zero_stage}. Type parallel.zero_stage=3."
            )
        if (self.optimizer is OptimizerOffload.nvme) != (self.nvme_path is not None):
            raise ValueError(
                f"parallel.offload.nvme_path={self.nvme_path} and parallel.offload.optimizer={self.optimizer.value} "
                "go together: type both a folder and nvme, or neither."
            )
        if self.nvme_path is not None and not Path(self.nvme_path).absolute().parent.is_dir():
            raise ValueError(
                f"parallel.offload.nvme_path={self.nvme_path}: there is no folder {Path(self.nvme_path).parent}. Type "
                "a folder on a mounted local disk; its last part is made if it is missing."
            )


@dataclass
class TrafficConfig:
    """How DeepSpeed cuts its messages, in elements (4 bytes each); null is planned from the sizes of the parameters."""

    overlap: bool | None = None
    """Reduce gradients while the backward goes on; null does so on a GPU."""
    bucket_elements: int | None = None
    """Gradients that are reduced at once, and under ZeRO 3 weights that are fetched ahead; planned: one block."""
    resident_elements: int = 0
    """ZeRO 3 keeps parameters of at most so many elements whole on every rank, but sends each for itself."""

    def __post_init__(self) -> None:
        if self.bucket_elements is not None and self.bucket_elements < 1:
            raise ValueError(f"parallel.traffic.bucket_elements={self.bucket_elements} must be at least 1.")
        if self.resident_elements < 0:
            raise ValueError(f"parallel.traffic.resident_elements={self.resident_elements} must not be negative.")


MIN_BUCKET = 1 << 20
"""Smaller messages cost more to start than to send."""
GATHER_MULTIPLE = 256
"""Of elements: DeepSpeed aligns what it gathers, and refuses odd sizes."""


@dataclass(frozen=True)
class Traffic:
    """The sizes of DeepSpeed's messages in elements."""

    overlap: bool
    bucket: int
    """Gradients reduced at once; weights fetched ahead."""
    gather: int
    """Weights gathered at once after a step of ZeRO 1 or 2."""
    live: int
    """Weights of blocks that ZeRO 3 holds whole at a time."""
    whole: int
    """With those that lie in no block, which stay whole from the forward to the backward."""
    resident: int
    """Largest parameter that ZeRO 3 always holds whole."""

    def line(self, zero_stage: int) -> str:
        """For people, in the header of a run."""
        if zero_stage == 0:
            return "gradients reduced at once"
        buckets = f"buckets of {_amount(self.bucket)} elements, overlap {'on' if self.overlap else 'off'}"
        if zero_stage < 3:
            return f"{buckets}, weights gathered by {_amount(self.gather)}"
        kept = f", tensors up to {_amount(self.resident)} always" if self.resident else ""
        return f"{buckets}, at most {_amount(self.whole)} weights whole{kept}"


def _amount(elements: int) -> str:
    return f"{elements / 1e6:.1f} M" if elements >= 1e6 else f"{elements:,}"


def plan_traffic(module: nn.Module, wanted: TrafficConfig, device_type: str) -> Traffic:
    """Messages of one block, so that a block's are sent while the next computes, and no message of a single bias.

    A block is the largest member of a `ModuleList` that holds others like it.
    """
    sizes = [_elements(p) for p in module.parameters()]
    total = sum(sizes)
    lists = [child for child in module.modules() if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) > 1]
    blocks = [sum(map(_elements, block.parameters())) for members in lists for block in members]
    block = max([*sizes, *blocks])
    repeating = [members for members in module.modules() if isinstance(members, nn.ModuleList)]
    repeated = {id(p): _elements(p) for members in repeating for p in members.parameters()}
    bucket = wanted.bucket_elements or min(total, max(block, MIN_BUCKET))
    live = min(total, 3 * max(block, bucket))
    return Traffic(
        overlap=device_type == "cuda" if wanted.overlap is None else wanted.overlap,
        bucket=bucket,
        gather=-(-max(bucket, min(total, 1 << 29)) // GATHER_MULTIPLE) * GATHER_MULTIPLE,
        live=live,
        whole=min(total, live + total - sum(repeated.values())),
        resident=wanted.resident_elements,
    )


def _elements(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def deepspeed_config(
    zero_stage: int,
    accumulation: int,
    gradient_clipping: float,
    traffic: Traffic,
    offload: OffloadConfig,
    pin_memory: bool = False,
) -> dict[str, Any]:
    """The dictionary. A rank's lanes are its gradient accumulation; a micro-batch is one pack.

    Weights, gradients, their sums and messages are float32: lower precision is autocast, inside the module.
    """
    zero: dict[str, Any] = {
        "stage": zero_stage,
        "overlap_comm": traffic.overlap,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": traffic.bucket,
        "allgather_partitions": True,
        "allgather_bucket_size": traffic.gather,
        "round_robin_gradients": False,
        "ignore_unused_parameters": True,
        "sub_group_size": 10**9,
        "stage3_prefetch_bucket_size": traffic.bucket,
        "stage3_max_live_parameters": traffic.live,
        "stage3_max_reuse_distance": traffic.live,
        "stage3_param_persistence_threshold": traffic.resident,
    }
    if offload.optimizer is not OptimizerOffload.none:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin_memory}
    if offload.parameters is not ParameterOffload.none:
        zero["offload_param"] = {"device": "cpu", "pin_memory": pin_memory}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": gradient_clipping if zero_stage > 0 else 0.0,  # the engine measures, and clips, itself
        "prescale_gradients": False,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }

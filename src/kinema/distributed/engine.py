"""The DeepSpeed engine: one function makes its dictionary, and sharded float32 state goes in and out by name."""

import enum
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kinema.distributed.activations import ActivationCheckpointing
from kinema.distributed.blocks import gathered_whole, release_behind
from kinema.distributed.compiling import Compile
from kinema.distributed.deepspeed_config import OffloadConfig, TrafficConfig, deepspeed_config, plan_traffic
from kinema.distributed.halo import SlabAxis
from kinema.distributed.layout import Fill, layout_of
from kinema.distributed.linear import mend_linear
from kinema.distributed.loss_scale import LossScale
from kinema.distributed.optimizer_state import Placed, named_state, state_files

CLIPPING_EPSILON = 1e-6
"""Added to the norm that clipping divides by, as torch and DeepSpeed do."""


class Precision(enum.Enum):
    """Number format of matrix products; weights, moments, gradients and their sums are always float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass
class ParallelConfig:
    """How one step is spread over ranks; of this, only precision changes what is computed."""

    zero_stage: int = 0
    """0 replicates; 1 shards the optimiser, 2 also gradients, 3 also weights (Rajbhandari et al. 2020, ZeRO)."""
    sequence_degree: int = 1
    """How many ranks work on each pack together, each on its share of the tokens (Jacobs et al. 2023, Ulysses)."""
    vae_axis: SlabAxis = SlabAxis.auto
    """With sequence_degree above 1: the side along which each rank of a group gets its slab of a clip for the VAE."""
    precision: Precision = Precision.float32
    """float32, or bfloat16 or float16 matrix products under autocast over float32 master weights."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    """none, selective, attention, every or full: what the backward finds, and what it computes again."""
    checkpointed_every: int = 2
    """With activation_checkpointing=every: the first block and each so many blocks further are computed again."""
    compile: Compile = Compile.none
    """none, or blocks: what a DiT's blocks compute around their attention becomes fused kernels, once for all sizes."""
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    """What lies in the host's memory or on its disk instead of the device's."""
    traffic: TrafficConfig = field(default_factory=TrafficConfig)
    """Sizes of DeepSpeed's messages."""
    timeout_seconds: float = 1800.0
    """How long a collective waits for a missing rank before the job ends."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"parallel.zero_stage={self.zero_stage} must be 0, 1, 2 or 3.")
        if self.checkpointed_every < 1:
            raise ValueError(
                f"parallel.checkpointed_every={self.checkpointed_every} must be at least 1, which is every block."
            )
        self.offload.check(self.zero_stage)
        self._check_compile()
        if self.sequence_degree < 1:
            raise ValueError(f"parallel.sequence_degree={self.sequence_degree} must be at least 1.")
        if self.timeout_seconds <= 0:
            raise ValueError(f"parallel.timeout_seconds={self.timeout_seconds} must be positive.")

    def line(self) -> str:
        """For people, in the header of a run: what of it is in use."""
        kind, offload = self.activation_checkpointing, self.offload
        words = [f"ZeRO {self.zero_stage}", self.precision.value]
        if self.sequence_degree > 1:
            words.append(f"sequence degree {self.sequence_degree}")
        if kind is not ActivationCheckpointing.none:
            nth = f" {self.checkpointed_every}" if kind is ActivationCheckpointing.every else ""
            words.append(f"activation checkpointing {kind.value}{nth}")
        if self.compile is not Compile.none:
            words.append(f"compiled {self.compile.value}")
        moved = {"optimizer": offload.optimizer.value, "parameters": offload.parameters.value}
        words += [f"{what} on {where}" for what, where in moved.items() if where != "none"]
        return ", ".join(words)

    def _check_compile(self) -> None:
        if self.compile is Compile.blocks and self.activation_checkpointing is ActivationCheckpointing.selective:
            raise ValueError(
                "parallel.compile=blocks with parallel.activation_checkpointing=selective: compiled layers keep "
                "products and compute again what lies between by themselves. Type "
                "parallel.activation_checkpointing=none, attention, every or full."
            )


class Engine:
    """A DeepSpeed engine around one module, whose gradient is exactly that of the sum of all losses given to it.

    DeepSpeed averages gradients over ranks and divides by the accumulation count; `backward` undoes both.
    The module must hold its final weights before it comes here: float32 masters are cloned from them.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        zero_stage: int,
        precision: Precision,
        accumulation: int,
        gradient_clipping: float,
        offload: OffloadConfig | None = None,
        traffic: TrafficConfig | None = None,
        blocks: Sequence[nn.Module] = (),
    ) -> None:
        """`blocks` are the modules that repeat, each called as a whole: ZeRO 3 gathers and drops each at once."""
        import deepspeed

        device_type = next(module.parameters()).device.type

        if precision is not Precision.float32:
            # Inside the module, because DeepSpeed turns off an autocast that was entered outside it.
            module.forward = torch.autocast(device_type, getattr(torch, precision.value))(module.forward)
        self.loss_scale = LossScale() if precision is Precision.float16 else None
        self.names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        self.zero_stage = zero_stage
        self.accumulation = accumulation
        self.gradient_clipping = gradient_clipping
        self._grad_norm = 0.0
        self.moved: bool | None = None
        """Whether the last step moved the weights: not if a gradient was not finite on any rank. None before it."""
        self.before_move: Callable[[], object] = lambda: None
        """Called when all gradients are there, and weights and optimiser state are as they were since the last step."""
        offload = offload or OffloadConfig()
        self.traffic = plan_traffic(module, traffic or TrafficConfig(), device_type)
        self._state = named_state(optimizer)
        numbers = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        config = deepspeed_config(
            zero_stage, accumulation, gradient_clipping, self.traffic, offload, pin_memory=device_type == "cuda"
        )
        with gathered_whole(blocks):
            self.deepspeed, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=config, dist_init_required=False
            )
        mend_linear()
        if zero_stage == 3:
            release_behind(blocks, self.deepspeed.optimizer.parameter_offload)
        # A single rank has nothing to reduce, and DeepSpeed would copy all gradients there and back.
        self.deepspeed.enable_backward_allreduce = zero_stage > 0 or dist.get_world_size() > 1
        named = dict(self.module.named_parameters())
        self._parameters = {name: named[name] for name in self.names}
        self._group_of = {name: numbers[id(parameter)] for name, parameter in self._parameters.items()}
        self.layout = layout_of(self.parameters(), self._group_of, self.deepspeed.optimizer, zero_stage)
        if isinstance(optimizer, Placed):
            optimizer.place(self._moved(), self.layout)
        allocate = state_files(Path(offload.nvme_path)) if offload.nvme_path is not None else torch.zeros_like
        for moved, group in zip(self._moved(), self._groups(), strict=True):
            # Now, so that it can be saved and restored before the first step.
            self._state.create_state(moved, group, allocate)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The module's forward."""
        return self.deepspeed(*arguments, **named)

    @property
    def module(self) -> nn.Module:
        """The wrapped module; under ZeRO 3 its weights are empty outside `forward`."""
        return self.deepspeed.module

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, in the module's order."""
        return self._parameters

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, this micro-step's part of the global loss.

        A loss that is not finite makes the gradient NaN, whatever its derivative: summing the gradients then tells
        every rank of it, and no rank moves its weights.
        """
        scale = float(self.accumulation * dist.get_world_size())
        if self.loss_scale is not None and self.zero_stage == 0:
            scale *= self.loss_scale.value
        elif self.loss_scale is not None:  # and takes it out of the norm and the gradient
            self.deepspeed.optimizer.override_loss_scale(self.loss_scale.value)
        self.deepspeed.backward(loss * torch.where(loss.detach().isfinite(), scale, float("nan")))

    def step(self, learning_rate: float) -> None:
        """End a micro-step; the last one of a step moves the weights with `learning_rate`."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        last = self.deepspeed.is_gradient_accumulation_boundary()
        if last:
            self.before_move()
        if last and self.zero_stage == 0:
            self._move_replicated()
        else:
            self.deepspeed.step()
        if last and self.zero_stage > 0:
            self.moved = not self.deepspeed.optimizer.overflow
            self._grad_norm = float(self.deepspeed.get_global_grad_norm()) if self.moved else math.inf
        if last and self.loss_scale is not None:
            self.loss_scale.update(bool(self.moved))

    def _move_replicated(self) -> None:
        """The last micro-step without ZeRO, where DeepSpeed reports no norm, and would take another one to clip."""
        self._measure_and_clip(self._gradients())
        self.moved = math.isfinite(self._grad_norm)
        if self.moved:  # ZeRO looks for itself and moves nothing; here the update would make all weights NaN
            self.deepspeed.optimizer.step()
        for parameter in self._parameters.values():
            parameter.grad = None
        self.deepspeed.micro_steps += 1

    def _gradients(self) -> list[Tensor]:
        """Zeros where the loss did not depend on a parameter, which is decayed all the same."""
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]

    def _measure_and_clip(self, gradients: list[Tensor]) -> None:
        if self.loss_scale is not None:
            torch._foreach_div_(gradients, self.loss_scale.value)
        self._grad_norm = float(torch.nn.utils.get_total_norm(gradients))
        if 0 < self.gradient_clipping < (length := self._grad_norm + CLIPPING_EPSILON):
            torch._foreach_mul_(gradients, self.gradient_clipping / length)

    def grad_norm(self) -> float:
        """Norm of the last step's gradient over all parameters, before clipping."""
        return self._grad_norm

    # Sharded float32 state. A "shard" is one of the float32 tensors that this rank's optimiser moves: whole
    # parameters without ZeRO, flat slices with it. EMA and optimiser state have the same shapes, so that `layout`
    # carries all of them between shards and full tensors by name.

    def shards(self) -> list[Tensor]:
        """The float32 master weights that this rank owns; updating them in place is up to the optimiser."""
        return [moved.data for moved in self._moved()]

    def gather(self, shards: Sequence[Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Full float32 tensors by parameter name from shard-shaped values (default: the weights), on every rank.

        A collective: all ranks must exhaust it together.
        """
        return self.layout.gather(self.shards() if shards is None else shards, self.names)

    def scatter(self, full: dict[str, Tensor]) -> list[Tensor]:
        """Shard-shaped copies of full tensors given by parameter name; the inverse of `gather`."""
        shards = [shard.clone() for shard in self.shards()]
        self.layout.scatter(full, shards)
        return shards

    @torch.no_grad()
    def load(self, full: dict[str, Tensor]) -> None:
        """Go on from these full weights by parameter name, float32 masters and what `forward` uses; a collective."""
        import deepspeed

        self.layout.scatter({name: full[name] for name in self.names}, self.shards())
        for name, parameter in self.parameters().items():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.zero_stage == 3):
                parameter.data.copy_(full[name])

    @property
    def state_names(self) -> tuple[str, ...]:
        """The optimiser's state tensors, for example Adam's two moments; some parameters may lack some of them."""
        return tuple(dict.fromkeys(name for group in self._param_groups() for name in self._state.state_names(group)))

    def state(self, name: str) -> list[Tensor | None]:
        """This rank's shards of one state tensor, float32; None for a shard whose parameters have no such state."""
        return [
            self._state.read_state(moved, name) if name in self._state.state_names(group) else None
            for moved, group in zip(self._moved(), self._groups(), strict=True)
        ]

    def gather_state(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Full float32 state tensors by parameter name, of the parameters that have it. A collective, as `gather`."""
        return self.layout.gather(self.state(name), self.parameters_with(name))

    def load_state(self, name: str, full: dict[str, Tensor]) -> None:
        """Continue from the state tensors that `gather_state` gave, on this or any other layout."""
        self.fill_state(name, lambda fragment, part: part.copy_(fragment.of_full(full[fragment.name].contiguous())))

    def fill_state(self, name: str, fill: Fill) -> None:
        """Continue from a state tensor of which `fill` gives this rank what it owns, part by part. No collective."""
        shards = [shard.clone() if shard is not None else torch.empty(0) for shard in self.state(name)]
        self.layout.fill(shards, self.parameters_with(name), fill)
        for moved, group, value in zip(self._moved(), self._groups(), shards, strict=True):
            if name in self._state.state_names(group):
                self._state.write_state(moved, name, value)

    def parameters_with(self, name: str) -> list[str]:
        """Names of the parameters whose optimiser keeps state `name`, the same on every rank."""
        groups = [self._state.state_names(group) for group in self._param_groups()]
        return [parameter for parameter in self.names if name in groups[self._group_of[parameter]]]

    def optimizer_step(self) -> int:
        """How many updates the optimiser has made (Adam's bias correction depends on it)."""
        return int(self._inner_state()[0]["step"].item())

    def set_optimizer_step(self, step: int) -> None:
        """Continue Adam's bias correction after `step` updates."""
        for state in self._inner_state():
            state["step"].fill_(step)

    def _moved(self) -> list[Tensor]:
        """The tensors that the inner optimiser moves, which are also the keys of its state."""
        optimizer = self.deepspeed.optimizer
        if self.zero_stage == 0:
            return [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self.zero_stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        return list(optimizer.single_partition_of_fp32_groups)

    def _groups(self) -> list[dict[str, Any]]:
        """The parameter group of each moved tensor."""
        groups = self._param_groups()
        if self.zero_stage == 0:
            return [group for group in groups for _ in group["params"]]
        if self.zero_stage == 3:
            numbers = self.deepspeed.optimizer.sub_group_to_group_id
            return [groups[numbers[shard]] for shard in range(len(numbers))]
        return groups

    def _param_groups(self) -> list[dict[str, Any]]:
        return self.deepspeed.optimizer.param_groups

    def _inner_state(self) -> list[dict[str, Tensor]]:
        optimizer = self.deepspeed.optimizer
        inner = optimizer if self.zero_stage == 0 else optimizer.optimizer
        return [inner.state[moved] for moved in self._moved()]

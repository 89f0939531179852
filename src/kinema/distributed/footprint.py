"""How much memory a rank of a run takes: states by formula, activations counted without data."""

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kinema.distributed.activations import ActivationCheckpointing, keep_less
from kinema.distributed.optimizer_state import named_state

GIB = 2**30
FLOAT32 = 4
"""Bytes of a weight, of a gradient and of one number of an average."""
FEW = 1 << 16
"""Numbers on which an optimiser's state is measured."""
STAGE_0_MESSAGE = 500_000_000
"""Gradients that DeepSpeed copies side by side at once where nothing is sharded, in elements."""


class LiveBytes(TorchDispatchMode):
    """Counts the memory of tensors that operations inside it made, for as long as anything holds them.

    Each storage counts once, whoever holds it: autograd, a checkpoint, the caller. What was there before counts
    nothing, nor do tensors on the meta device. Fake tensors count as if they had data.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        """Bytes that are alive."""
        self.peak = 0
        """The most that were alive behind any operation so far."""
        self._held: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        given = {id(x.untyped_storage()) for x in tree_leaves((arguments, named)) if isinstance(x, Tensor)}
        made = function(*arguments, **(named or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in given:
                self._hold(tensor)
        self.peak = max(self.peak, self.now)
        return made

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._held or tensor.device.type == "meta":
            return

        def release(_: object) -> None:
            del self._held[key]
            self.now -= size

        self._held[key] = weakref.ref(storage, release)
        self.now += size


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> float:
    """State of all parameters of an optimiser, before it is cut into shards; measured on a few numbers."""
    state, total = named_state(optimizer), 0.0
    for group in optimizer.param_groups:
        few = nn.Parameter(torch.zeros(FEW))
        with LiveBytes() as live:
            state.create_state(few, group, torch.zeros_like)
            total += live.now / FEW * sum(parameter.numel() for parameter in group["params"])
    return total


@dataclass(frozen=True)
class Sharding:
    """What decides how states are spread; sizes in elements."""

    zero_stage: int
    ranks: int
    """Over which states are sharded: all of them, whatever the sequence degree."""
    bucket: int
    """Gradients in one message."""
    live: int
    """Weights that ZeRO 3 holds whole at a time."""
    optimizer_on_host: bool = False
    """With its masters, and the averages that are taken of them."""
    weights_on_host: bool = False
    """ZeRO 3 only: those between uses."""


@dataclass(frozen=True)
class States:
    """Bytes on one rank's device, between and during steps, activations apart."""

    weights: float
    gradients: float
    optimizer: float
    """Its state and, with ZeRO, the masters that it moves."""
    averages: float
    """EMA."""
    messages: float
    """Gradients side by side on their way to other ranks, and whole weights that ZeRO 3 fetched."""
    host: float = 0.0
    """In the host's memory or on its disk instead."""

    @property
    def total(self) -> float:
        """All on the device."""
        return sum(vars(self).values()) - self.host

    def line(self) -> str:
        """For people, in GiB."""
        parts = ", ".join(f"{name} {value / GIB:.3g}" for name, value in vars(self).items() if name != "host")
        offloaded = f"; {self.host / GIB:.3g} on its host" if self.host else ""
        return f"{self.total / GIB:.3g} GiB a rank beside activations: {parts}{offloaded}"

    def without(self, *names: str) -> "States":
        """The same with these parts on the host."""
        moved = sum(getattr(self, name) for name in names)
        return replace(self, **dict.fromkeys(names, 0.0), host=self.host + moved)


def states(trained: int, frozen: int, state_bytes: float, averages: int, sharding: Sharding) -> States:
    """What so many trained and frozen weights take, with the optimiser's state of all ranks and EMA profiles.

    Everything is float32 (bfloat16 is autocast, and its copies of weights count as activations). ZeRO 1 shards what
    the optimiser holds and adds masters, 2 gradients too, 3 also weights (Rajbhandari et al. 2020, table 1).
    """
    stage, ranks, bucket = sharding.zero_stage, sharding.ranks, min(sharding.bucket, trained)
    sharded = ranks if stage else 1
    masters = trained if stage else 0
    live = min(sharding.live, trained + frozen)
    messages = [min(trained, STAGE_0_MESSAGE) if ranks > 1 else 0, bucket, 2 * bucket, 2 * bucket + live][stage]
    found = States(
        weights=FLOAT32 * (trained + frozen) / (ranks if stage == 3 else 1),
        gradients=FLOAT32 * trained / (ranks if stage >= 2 else 1),
        optimizer=(FLOAT32 * masters + state_bytes) / sharded,
        averages=FLOAT32 * averages * trained / sharded,
        messages=FLOAT32 * messages,
    )
    found = found.without("optimizer", "averages") if sharding.optimizer_on_host else found
    return found.without("weights") if sharding.weights_on_host else found


class Activations(NamedTuple):
    """Bytes beside all states, on one rank."""

    kept: float
    """Between forward and backward."""
    peak: float
    """At the worst moment of both, with what a block computes again and the gradients of weights on their way."""


LIKE = 2
"""Of blocks that are alike so many and one more are looked at; what the one adds, all others add."""

Forward = Callable[[nn.Module], Tensor]
"""Makes its inputs, calls the module, and returns a scalar."""


def activations(
    make: Callable[[], nn.Module],
    forward: Forward,
    blocks_of: Callable[[nn.Module], Sequence[nn.Module]],
    kind: ActivationCheckpointing,
) -> Activations:
    """What the forward and backward of `make()` take with this kind of checkpointing; nothing is computed.

    `blocks_of` lists the blocks that `kind` is for. Blocks of the same parameters must return tokens of the shapes
    that they are given first: most are left out of the count, which is the same for all of them.
    """
    with FakeTensorMode():
        groups = _alike(blocks_of(make()))
    first = [min(LIKE, len(members)) for members in groups]
    found = base = _count(make, forward, blocks_of, kind, first)
    for place, members in enumerate(groups):
        if (others := len(members) - LIKE) > 0:
            more = _count(make, forward, blocks_of, kind, [n + (i == place) for i, n in enumerate(first)])
            found = Activations(*(a + others * (b - c) for a, b, c in zip(found, more, base, strict=True)))
    return found


def _alike(blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """The blocks in groups of the same class and parameters."""
    groups: dict[Any, list[nn.Module]] = {}
    for block in blocks:
        shapes = tuple((name, tuple(p.shape), p.requires_grad) for name, p in block.named_parameters())
        groups.setdefault((type(block), shapes), []).append(block)
    return list(groups.values())


def _count(
    make: Callable[[], nn.Module],
    forward: Forward,
    blocks_of: Callable[[nn.Module], Sequence[nn.Module]],
    kind: ActivationCheckpointing,
    sizes: Sequence[int],
) -> Activations:
    """The same with only so many blocks of each group; the others hand on what they are given."""
    # oneDNN's kernels want data; turning them off warns of what Intel's GPUs could do.
    with warnings.catch_warnings(action="ignore"), FakeTensorMode(), torch.backends.mkldnn.flags(enabled=False):
        module = make()
        for members, size in zip(_alike(blocks_of(module)), sizes, strict=True):
            keep_less(members[:size], kind)
            for block in members[size:]:
                block.forward = _hand_on
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        with LiveBytes() as live:
            loss = forward(module)
            kept = live.now
            loss.backward()
        return Activations(kept, live.peak)


def _hand_on(tokens: Any, *others: Any, **named: Any) -> Any:
    return tokens

"""What the forward of a model's blocks keeps for the backward, and what is computed a second time there."""

import enum
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


class ActivationCheckpointing(enum.Enum):
    """What the backward finds of a block, from most memory to least; the numbers are the same."""

    none = "none"
    """All that it needs."""
    selective = "selective"
    """Matrix products, convolutions and what attention found: what lies between is cheap, and computed again
    (Korthikanti et al. 2022)."""
    attention = "attention"
    """What attention found: its cost grows with the square of a clip's tokens, the rest is computed again."""
    every = "every"
    """Only what went into it, for every n-th block, which is computed again; all of the others."""
    full = "full"
    """Only what went into it, for every block (Chen et al. 2016)."""


aten = torch.ops.aten
PRODUCTS = frozenset([aten.mm.default, aten.addmm.default, aten.convolution.default, aten.mkldnn_convolution.default])
"""Matrix products and convolutions. A product of batches is not one: unfused attention makes its scores with it."""
FOUND = frozenset(
    [
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ]
)
"""torch's fused attentions; those of the flash-attn package have a namespace of their own."""


def keep_less(blocks: Sequence[nn.Module], kind: ActivationCheckpointing, every: int = 1) -> None:
    """Let the backward compute a part of these blocks again; with kind=every, of the first and each `every`-th after.

    Dropout draws the same numbers again, and autocast is as it was. Without gradients nothing changes.
    """
    if kind is ActivationCheckpointing.none:
        return
    for block in blocks[:: every if kind is ActivationCheckpointing.every else 1]:
        block.forward = partial(_recomputed, block.forward, _KEPT.get(kind))


Policy = Callable[..., CheckpointPolicy]


def _recomputed(forward: Callable[..., Any], policy: Policy | None, *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    chosen = {} if policy is None else {"context_fn": partial(_contexts, policy)}
    return checkpoint(forward, *arguments, use_reentrant=False, **chosen, **named)


def _contexts(policy: Policy) -> tuple["_Kept", ...]:
    """What is on during the forward, and during its repetition."""
    return tuple(_Kept(mode, policy) for mode in create_selective_checkpoint_contexts(policy))


class _Kept(TorchDispatchMode):
    """Shows torch's selective checkpointing the operations that are kept, and none of the others.

    It wants the repetition to be the same, operation by operation. Under ZeRO 3 it is not: weights are gathered inside
    a block when they are missing, and by the time of the backward others are.
    """

    def __init__(self, mode: TorchDispatchMode, policy: Policy) -> None:
        super().__init__()
        self.mode, self.policy = mode, policy

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """As torch's own."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.policy(None, func) is CheckpointPolicy.MUST_SAVE:
            return self.mode.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def _keep_attention(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    is_kept = operation in FOUND or operation.namespace == "flash_attn"
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_products(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in PRODUCTS else _keep_attention(context, operation)


_KEPT: dict[ActivationCheckpointing, Policy] = {
    ActivationCheckpointing.selective: _keep_products,
    ActivationCheckpointing.attention: _keep_attention,
}

"""Blocks of a model as ZeRO 3 sees them: one fetch and one release for each, not one for every layer in it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


@contextmanager
def gathered_whole(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """While DeepSpeed starts: let ZeRO 3 hook these modules and nothing inside them. Other stages take no notice.

    What costs is DeepSpeed's Python at each module that it hooks, four times a step. Its own leaf modules also hold
    back the gradients of a module until those of its inputs are there, and take what is missing then for zero: wrong
    where no input needs a gradient, and where a module is called twice. So gradients are reduced one by one, as ever.
    """
    from deepspeed.runtime.zero import stage3
    from deepspeed.utils import set_z3_leaf_module

    for block in blocks:
        set_z3_leaf_module(block, True)
    one_by_one, stage3.z3_leaf_parameter = stage3.z3_leaf_parameter, lambda parameter: False
    try:
        yield
    finally:
        stage3.z3_leaf_parameter = one_by_one


def release_behind(blocks: Sequence[nn.Module], offload: Any) -> None:
    """Drop the weights of each block when the backward leaves it; `offload` is DeepSpeed's keeper of weights.

    DeepSpeed waits for the gradients of all inputs. One that a block does not use never gets any, and then weights
    would stay whole to the end of the backward.
    """
    for block in blocks:
        block.register_forward_pre_hook(partial(_release_when_left, offload))


def _release_when_left(offload: Any, block: nn.Module, inputs: tuple[Any, ...]) -> None:
    """The gradient of what a block works on, its first input, is the last that it finds: autograd goes back in time."""
    stream = next(iter(inputs[0].values())) if isinstance(inputs[0], Mapping) else inputs[0]
    if isinstance(stream, Tensor) and stream.requires_grad:
        stream.register_hook(lambda gradient: offload.post_sub_module_backward_function(block))

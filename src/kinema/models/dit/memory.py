"""What the backward can make again faster than it costs to keep."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def made_again(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs); of what it needs in the backward only the inputs are kept, the rest is computed again.

    It is computed up to the last tensor that the backward needs: where the function ends with a linear layer, its
    product is not taken twice. The compiler chooses by itself what to keep.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)

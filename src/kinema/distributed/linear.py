"""DeepSpeed's linear layer of ZeRO 3, mended."""

import torch.nn.functional as F
from torch import Tensor


def mend_linear() -> None:
    """Replace the layer that DeepSpeed puts in the place of torch's, for all of the process and for good.

    It lets gathered weights go before the backward, which torch's would hold. But to inputs of more than two
    dimensions it adds the bias in place: into the product that selective checkpointing has kept, so that the
    repetition adds it again. As a matrix they get it in the product.
    """
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    if F.linear is zero3_linear_wrap:
        F.linear = linear_of_matrices


def linear_of_matrices(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) -> (..., out), as torch's."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    if x.dim() == 2:
        return zero3_linear_wrap(x, weight, bias)
    found = zero3_linear_wrap(x.reshape(-1, x.shape[-1]), weight, bias)
    return found.view(*x.shape[:-1], found.shape[-1])

"""What a program hands to torch's collectives: bytes of each kind, counted where they are dispatched."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SCALARS = 64
"""Bytes of messages that are counted apart: norms and counts, not weights."""


class Traffic(TorchDispatchMode):
    """Bytes of whole messages by kind while the block runs, on this rank: what is reduced, or all that is gathered.

    Whoever calls them: DeepSpeed keeps the functions of `torch.distributed`, so that they cannot be wrapped there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            message = max(map(_bytes, args[:2]))
            self.found[func._opname.strip("_") if message > SCALARS else "scalars"] += message
        return func(*args, **(kwargs or {}))


def _bytes(message: Any) -> int:
    if isinstance(message, Tensor):
        return message.numel() * message.element_size()
    return sum(map(_bytes, message)) if isinstance(message, list | tuple) else 0

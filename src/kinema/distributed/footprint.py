"""How much memory a rank of a run takes, counted where it can be and otherwise by formula."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the memory of tensors that operations inside it made, for as long as anything holds them.

    Each storage counts once, whoever holds it: autograd, a checkpoint, the caller. What was there before counts
    nothing. Tensors without data (meta or fake) count as if they had it.
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
                self._hold(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return made

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._held:
            return

        def release(_: object) -> None:
            del self._held[key]
            self.now -= size

        self._held[key] = weakref.ref(storage, release)
        self.now += size

"""`torch.compile` for blocks: one compilation for every shape, and a count of those that come all the same."""

import enum
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch


class Compile(enum.Enum):
    """What `torch.compile` makes kernels of."""

    none = "none"
    """Nothing."""
    blocks = "blocks"
    """What the blocks of a DiT compute around their attention."""


MOST_KINDS = 64
"""Compilations of one function: of each kind of layer with and without gradients. One more ends the run."""
WARM_STEPS = 2
"""Steps of a process in which all layers are to be compiled."""


def compiler() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What compiles a function of tensors once for all their shapes, as a whole or not at all.

    Sizes of 0 and 1 are like any others, and two that happen to be equal may differ next time. What is element-wise is
    computed again in the backward, also where a product there reads it, as the uncompiled layers do. These are settings
    of the whole process. Dropout draws what it draws uncompiled.
    """
    import torch._functorch.config as kept
    import torch.fx.experimental._config as shapes

    shapes.backed_size_oblivious = True
    shapes.use_duck_shape = False
    kept.ban_recompute_materialized_backward = False
    return partial(
        torch.compile, fullgraph=True, dynamic=True, recompile_limit=MOST_KINDS, options={"fallback_random": True}
    )


class Compilations:
    """The compilations of this process, by torch's own count."""

    def __init__(self) -> None:
        self._told = self.total()

    def total(self) -> int:
        """How many there were since the process began."""
        utils = sys.modules.get("torch._dynamo.utils")  # seconds to import, and there where anything was compiled
        return 0 if utils is None else int(utils.counters["stats"]["unique_graphs"])

    def count(self) -> int:
        """How many there were since `lines` was called."""
        return self.total() - self._told

    def lines(self) -> list[str]:
        """For each of these what was compiled, how long it took, and what differs from the one before."""
        from torch._dynamo.utils import get_compilation_metrics

        count, self._told = self.count(), self.total()
        made = [one for one in get_compilation_metrics() if one.co_name is not None]
        return [_line(one) for one in made[len(made) - count :]]


def _line(made: Any) -> str:
    """Such as `answer in 3.7 s`, and in what it differs, without the lines of source that torch quotes beside it."""
    reason = (made.recompile_reason or "").partition("\n")[0].partition("  #")[0].strip()
    line = f"{made.co_name.strip('_')} in {made.entire_frame_compile_time_s or 0.0:.1f} s"
    return f"{line}, not as before: {reason}" if reason else line

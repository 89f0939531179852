"""What training on a clip costs: linear in its tokens for the layers, quadratic for attention."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class CostConfig:
    """Cost of a clip of n tokens as linear * n + quadratic * n**2; only the ratio of the two matters."""

    linear: float | None = None
    """null: the costs are the model's floating-point operations, which know of windows and factorised attention."""
    quadratic: float = 0.0
    """Time for attention beside the linear layers differs from machine to machine: measure it there."""

    def __post_init__(self) -> None:
        if self.linear is None and self.quadratic:
            raise ValueError(f"data.cost.quadratic={self.quadratic} needs data.cost.linear beside it.")
        if min(self.linear or 0.0, self.quadratic) < 0 or (self.linear == 0.0 and not self.quadratic):
            raise ValueError(
                f"data.cost.linear={self.linear} and data.cost.quadratic={self.quadratic} must be 0 or more, and not "
                "both 0."
            )

    def of(self, tokens: int) -> float:
        """The cost of a clip of so many tokens; needs `linear`."""
        assert self.linear is not None
        return self.linear * tokens + self.quadratic * tokens**2


def fit_cost(tokens: Sequence[int], seconds: Sequence[float]) -> CostConfig:
    """The coefficients nearest to measured seconds of single clips, by least squares of the relative errors.

    Neither is below 0. ValueError unless two lengths differ and all times are above 0.
    """
    sizes, times = np.array(tokens, np.float64), np.array(seconds, np.float64)
    if len(set(tokens)) < 2 or not (times > 0).all():
        raise ValueError(f"A cost is fitted to times above 0 of clips of two lengths at least, not to {len(tokens)}.")
    terms = np.stack([sizes, sizes**2], axis=1) / times[:, None]  # each should add up to 1
    both = np.linalg.lstsq(terms, np.ones(len(times)))[0]
    if (both < 0).any():  # the better of the two alone, as the least lies on the border
        alone = terms.sum(axis=0) / (terms**2).sum(axis=0)
        errors = ((terms * alone - 1) ** 2).sum(axis=0)
        both = np.where(np.arange(2) == errors.argmin(), alone, 0.0)
    return CostConfig(float(both[0]), float(both[1]))

"""All scores of one clip: Kinema's own, and those of functions that a config names."""

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_prep.scores.borders import border_share, find_borders
from data_prep.scores.motion import motion, still_share
from data_prep.scores.picture import exposure, sharpness
from data_prep.scores.sample import Sample
from data_prep.scores.text import text_share

Scorer = Callable[[Sample], float | Mapping[str, float | None] | None]
"""One value, or several by name. None: the clip has no such value, as a picture has no motion."""

SCORERS: dict[str, Scorer] = {
    "motion": motion,
    "still_share": still_share,
    "sharpness": sharpness,
    "exposure": exposure,
    "text_share": text_share,
    "border_share": border_share,
}
UNITS = {
    "motion": "frame heights a second",
    "still_share": "share of near frames that are equal",
    "sharpness": "variance of the Laplacian",
    "brightness": "mean luma, 0 to 1",
    "dark_share": "share of the pixels",
    "bright_share": "share of the pixels",
    "text_share": "share of the picture",
    "border_share": "share of the picture",
}
WHOLE_PICTURE = ("border_share",)
"""Scorers that are shown the bars; all others see the picture inside them."""


@dataclass
class Plugin:
    """A scorer from outside: `target` is called once in every worker with `settings`, and gives the function.

    It is code, and runs with your rights: name only what you trust. The function gets a `Sample` and returns one
    number, or several by name.
    """

    target: str
    """`package.module:name`, importable in every worker."""
    settings: dict[str, Any] = field(default_factory=dict)

    def load(self, name: str) -> Scorer:
        """Import and call it; raises ValueError naming the config key."""
        module, colon, attribute = self.target.partition(":")
        if not (module and colon and attribute):
            raise ValueError(f"scorers.{name}.target={self.target} must be package.module:name.")
        try:
            factory = getattr(importlib.import_module(module), attribute)
            scorer = factory(**self.settings)
        except (ImportError, AttributeError, TypeError) as error:
            raise ValueError(f"scorers.{name}.target={self.target} cannot be loaded: {error}.") from error
        if not callable(scorer):
            raise ValueError(
                f"scorers.{name}.target={self.target} gave {type(scorer).__name__}; it must return a function."
            )
        return scorer


def measure(sample: Sample, scorers: Mapping[str, Scorer]) -> dict[str, float | None]:
    """Every score by name, rounded to 6 digits so that equal clips give equal text.

    Raises ValueError for a score that is not a finite number, or a name that comes twice.
    """
    inside = sample.crop(*find_borders(sample))
    found: dict[str, float | None] = {}
    for name, scorer in scorers.items():
        given = scorer(sample if name in WHOLE_PICTURE else inside)
        for part, value in (given if isinstance(given, Mapping) else {name: given}).items():
            if part in found:
                raise ValueError(f"scorer {name}: its score {part} was given before; name it otherwise.")
            if value is not None and not math.isfinite(value):
                raise ValueError(f"scorer {name}: {part}={value} is not a finite number; return None for no value.")
            found[part] = None if value is None else float(f"{value:.6g}")
    return found

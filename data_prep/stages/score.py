"""Stage score: what each clip looks like, in numbers that the filters compare."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from data_prep.clip_frames import read_sample
from data_prep.pipeline.rows import Outcome, Row
from data_prep.pipeline.stage import Place, Stage
from data_prep.scores.borders import find_borders
from data_prep.scores.duplicates import signature
from data_prep.scores.measure import SCORERS, Plugin, Scorer, measure
from data_prep.scores.sample import PAIRS


@dataclass
class Score(Stage):
    """Adds `scores` by name, and the `signature` by which duplicates are found."""

    pairs: int = PAIRS
    """Pairs of near frames that are looked at in each clip."""
    use: list[str] = field(default_factory=lambda: list(SCORERS))
    """Which of Kinema's own scorers."""
    scorers: dict[str, Plugin] = field(default_factory=dict)
    """Yours, by name: {target: package.module:name, settings: {...}}. They run as code, with your rights."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.use if name not in SCORERS]
        if unknown:
            raise ValueError(f"score.use={unknown} is unknown. There are {', '.join(SCORERS)}.")
        if self.pairs < 1:
            raise ValueError(f"score.pairs={self.pairs} must be at least 1.")
        both = sorted(set(self.use) & set(self.scorers))
        if both:
            raise ValueError(f"score.scorers: {', '.join(both)} is a scorer of Kinema's. Name yours otherwise.")

    def start(self) -> None:
        """Load the plug-ins."""
        own: dict[str, Scorer] = {name: SCORERS[name] for name in self.use}
        self.functions = own | {name: plugin.load(name) for name, plugin in self.scorers.items()}

    def apply(self, row: Row, place: Place) -> Iterable[Outcome]:
        """The row with its scores."""
        sample = read_sample(place.find(row["clip"]), row["num_frames"], row["fps"], self.pairs)
        inside = sample.crop(*find_borders(sample))
        yield row | {"scores": measure(sample, self.functions), "signature": signature(inside).tobytes().hex()}

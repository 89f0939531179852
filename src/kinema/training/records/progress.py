"""How far a run is and what it has shown: the part of its state that is not a tensor of the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kinema.data.account.ledger import Ledger
from kinema.data.account.sightings import SeenKeys, Sightings
from kinema.data.dataset.shards import DatasetIndex
from kinema.data.packs.pack import Pack
from kinema.distributed.collectives import all_sum_array, gather_objects
from kinema.training.records.seen import Seen, Start

MOST_LOSSES = 1000


@dataclass
class Progress:
    """Every rank counts what it showed itself; the counts of all ranks are those of the run."""

    index: DatasetIndex
    ledger: Ledger = field(default_factory=Ledger)
    start: Start = field(default_factory=Start)
    """What the weights had seen before this run; the main rank's counts."""
    step: int = 0
    losses: list[float] = field(default_factory=list)
    """Of the last steps, as a jump of the loss is judged by them."""
    sightings: Sightings = field(init=False)

    def __post_init__(self) -> None:
        self.sightings = Sightings(len(self.index.entries))

    def add(self, packs: Sequence[Pack], loss: float | None = None) -> None:
        """This rank's packs of a step that is done, and the loss of all ranks; None for one that was passed over."""
        self.losses = [*self.losses, *([] if loss is None else [loss])][-MOST_LOSSES:]
        for pack in packs:
            self.ledger.record(pack, self.index)
            self.sightings.add_shown(pack)
        self.step += 1

    def whole_ledger(self) -> Ledger:
        """The ledgers of all ranks added up; a collective."""
        whole = Ledger()
        for values in gather_objects(self.ledger.to_dict()):
            whole.merge(Ledger.from_dict(values))
        return whole

    def enter_distinct(self, is_main: bool) -> SeenKeys:
        """Enter what was shown for the first time in the main rank's ledger, and give all that was; a collective."""
        times = all_sum_array(self.sightings.times)
        if not is_main:
            return SeenKeys()
        self.ledger.record_distinct(self.sightings.new_clips(times, self.index))
        return self.sightings.seen(times)

    def go_on(self, step: int, losses: list[float], own: Seen | None, start: Start) -> None:
        """Continue after `step`. The main rank goes on counting from `own`; the others (None) start anew."""
        self.step, self.losses, self.start = step, losses, start
        self.ledger = own.ledger if own else Ledger()
        self.sightings = Sightings(len(self.index.entries), *([own.keys] if own else []))

"""The steps between two lines of the metrics, as one of them."""

from typing import Any

from kinema.training.dit_task import noise_table


class Window:
    """Means of the steps since the last line of the metrics."""

    def __init__(self) -> None:
        self.first_of_run = False
        self._started = False
        self._totals: dict[str, float] = {}
        self.steps = 0

    def add(self, totals: dict[str, float]) -> None:
        """Add one step; one that was passed over has no totals, and counts nowhere."""
        self.first_of_run = not self._started
        self._started = True
        self.steps += bool(totals)
        for key, value in totals.items():
            self._totals[key] = self._totals.get(key, 0.0) + value

    def close(self) -> dict[str, Any]:
        """A `train` record without its times; starts over. Clips and tokens are a step's, as are losses."""
        totals, steps = self._totals, self.steps
        self._totals, self.steps = {}, 0
        record: dict[str, Any] = {"steps": steps}
        if "noise_sum_0" in totals:
            record["loss_by_noise"] = noise_table(totals)
        for group, prefix in (("terms", "term_"), ("lanes", "lanes/"), ("data_sets", "data_sets/")):
            members = {key.removeprefix(prefix): totals.pop(key) for key in list(totals) if key.startswith(prefix)}
            if members:
                record[group] = {key: value / steps for key, value in members.items()}
        return {**record, **{key: value / steps for key, value in totals.items()}}

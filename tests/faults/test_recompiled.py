"""A compilation in the middle of a run is told, whichever rank it holds up."""

import pytest

from tests.end_to_end.commands import records
from tests.faults.suite.harm import Harm

MICRO_STEP = "kinema.training.dit_task:DiTTask.micro_step"


@pytest.mark.parametrize(("nth", "event"), [(2, "compiled"), (5, "recompiled")])
def test_what_a_rank_compiles_is_an_event(scene, nth, event):
    job = scene.start(event, "preflight.steps=0", ranks=2, harm=Harm(MICRO_STEP, "compile", nth=nth, rank=1))
    scene.finish(job)
    told = [(step, line["event"], line["detail"]) for step, line in records(scene.folder, event, "event").items()]
    found = [(step, kind, detail.partition(" in ")[0]) for step, kind, detail in told if "compiled" in kind]
    assert found == [(nth, event, "1: newcomer")]

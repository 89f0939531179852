"""A compilation in the middle of a run is told, whichever rank it holds up."""

import json

import pytest

from tests.faults.suite.harm import Harm

MICRO_STEP = "kinema.training.dit_task:DiTTask.micro_step"


@pytest.mark.parametrize(("nth", "event"), [(2, "compiled"), (5, "recompiled")])
def test_what_a_rank_compiles_is_an_event(scene, nth, event):
    job = scene.start(event, "preflight.steps=0", ranks=2, harm=Harm(MICRO_STEP, "compile", nth=nth, rank=1))
    scene.finish(job)
    lines = map(json.loads, (scene.run(event) / "metrics.jsonl").read_text().splitlines())
    told = [line for line in lines if "compiled" in str(line.get("event"))]
    found = [(line["step"] + 1, line["event"], line["detail"].partition(" in ")[0]) for line in told]
    assert found == [(nth, event, "1: newcomer")]

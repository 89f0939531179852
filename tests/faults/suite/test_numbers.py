"""Numbers that are not finite: no rank trains on them, no checkpoint holds them."""

import pytest

from tests.end_to_end.commands import losses
from tests.faults.suite.harm import Harm
from tests.faults.suite.scene import STEPS, Shown, said

pytestmark = pytest.mark.faults

BACKWARD = "kinema.distributed.engine:Engine.backward"


@pytest.mark.parametrize(("number", "fault", "deed", "stage"), [
    ("D1", "a gradient that is not a number on rank 1 of 2, ZeRO 0", "not a number", 0),
    ("D1", "a gradient that is not a number on rank 1 of 2, ZeRO 3", "not a number", 3),
    ("D2", "an infinite gradient on rank 1 of 2, ZeRO 2", "infinite", 2),
])  # fmt: skip
def test_a_step_that_is_not_finite_on_one_rank_is_taken_by_none(scene, show, number, fault, deed, stage):
    name = f"unsound-{deed.split()[0]}-{stage}"
    job = scene.start(name, f"parallel.zero_stage={stage}", ranks=2, harm=Harm(BACKWARD, deed, 3, rank=1))
    scene.finish(job)
    assert scene.all_finite(name)
    assert losses(scene.folder, name).keys() == set(range(1, STEPS + 1)) - {3}
    show(number, fault, Shown(said(job, "not finite"), "-", None, 0))


def test_numbers_that_stay_unsound_end_the_run_with_sound_checkpoints(scene, show):
    name = "unsound"
    job = scene.finish(scene.start(name, harm=Harm(BACKWARD, "not a number", 7, times=1000)), 70)
    assert scene.all_finite(name)
    show("D1", "gradients that stay not a number", Shown(said(job, "error"), "70"))

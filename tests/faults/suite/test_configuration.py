"""What a user can type wrong: refused before any weight is made, with what to type instead."""

import pytest

from tests.faults.suite.scene import Shown, said

pytestmark = pytest.mark.faults

SLIPS = [
    ("F1", "a key that does not exist", "optim.lerning_rate=1", "Did you mean optim.learning_rate"),
    ("F2", "a key that does not exist, added by force", "+optim.lerning_rate=1", "lerning_rate"),
    ("F3", "a word for a number", "optim.learning_rate=fast", "learning_rate"),
    ("F3", "a negative number of clips", "data.clips_per_step=-3", "clips_per_step"),
    ("F4", "a ZeRO stage that does not exist", "parallel.zero_stage=5", "zero_stage=5"),
    ("F6", "sizes that do not divide", "data.shapes=[[6,32,32]]", "Nearest legal"),
    ("F8", "code to run from a configuration", "+model._target_=os.system", "_target_"),
    ("F10", "data that are not there", "data.path=/nowhere", "/nowhere"),
    ("F10", "a run folder that cannot be made", "run_root=/proc/nowhere", "/proc/nowhere"),
]


@pytest.mark.parametrize(("number", "fault", "override", "message"), SLIPS, ids=[row[1] for row in SLIPS])
def test_a_slip_is_named_with_its_key(scene, show, number, fault, override, message):
    job = scene.finish(scene.start("slip", override), 64)
    show(number, fault, Shown(said(job, message), "64"))

"""Keys that training consumed, in order and lane by lane, under kills: those of the run that nobody disturbed."""

import json
import random
import time

import pytest

from kinema.training.journal import read_journal
from tests.end_to_end.commands import dit_command, run
from tests.end_to_end.killing import Layout, kill_all, kill_one_rank, start, wait_until

pytestmark = pytest.mark.slow
CLIPS = 24
LAYOUTS = [Layout(1, 2), Layout(2, 0), Layout(4, 2), Layout(1, 8), Layout(2, 2), Layout(4, 0), Layout(1, 0)]


def resumable(folder, name, steps):
    """Four lanes, five clips of two shapes a step, shuffled; 24 clips, so epochs end inside steps."""
    options = ["data.lanes=4", "data.clips_per_step=5", "checkpoint.every_steps=3", "logging.keys=true",
               "validation.every_steps=0", "allow_config_change=true", "task.samples.every_steps=0"]  # fmt: skip
    return dit_command(folder, name, steps, *options)


def consumed(folder, name):
    return {
        place: (line["keys"], line["positions"], line["weights"])
        for place, line in read_journal(folder / "runs" / name).items()
    }


def reached(folder, name):
    """The last step that the run has told of."""
    metrics = folder / "runs" / name / "metrics.jsonl"
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return max([json.loads(line)["step"] for line in lines], default=0)


def disturb(folder, name, steps, kills, layouts, chance):
    """Train to `steps`, killed so many times: mostly some steps after each start, sometimes while it starts."""
    command, log = resumable(folder, name, steps), folder / f"{name}.log"
    deaths = []
    for number in range(kills):
        process = start(layouts[number % len(layouts)], command, log)
        further = chance.randint(0, 6)
        if further == 0:
            time.sleep(chance.uniform(0, 3))  # before it begins
        goal = min(reached(folder, name) + further, steps - 2)
        wait_until(lambda goal=goal: reached(folder, name) >= goal, process)
        assert process.poll() is None, log.read_text()[-3000:]
        if chance.random() < 0.5:
            kill_all(process)
        else:
            kill_one_rank(process, layouts[number % len(layouts)], chance)
        deaths.append(reached(folder, name))
        assert deaths[-1] < steps, f"it was finished before kill {number + 1}"
    last = start(layouts[kills % len(layouts)], command, log)
    assert last.wait(timeout=600) == 0, log.read_text()[-3000:]
    return deaths


def check_against_plan(lines, steps, clips_per_step):
    """Every position once, in lanes that are all there; every epoch shows every clip exactly once."""
    assert list(lines) == [(step, lane) for step in range(1, steps + 1) for lane in range(4)]
    shown = sorted(place for keys, positions, _ in lines.values() for place in zip(positions, keys, strict=True))
    assert [position for position, _ in shown] == list(range(steps * clips_per_step))
    ordered = [key for _, key in shown]
    epochs = [ordered[first : first + CLIPS] for first in range(0, len(ordered), CLIPS)]
    assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "epochs must be shuffled"
    assert all(weight == 1 for _, _, weights in lines.values() for weight in weights)


def test_two_kills_and_three_layouts_consume_the_keys_of_one_run(folder):
    steps = 8
    run(*resumable(folder, "undisturbed", steps))
    disturb(folder, "disturbed", steps, 2, [Layout(1, 2), Layout(2, 0), Layout(1, 0)], random.Random(1))
    whole = consumed(folder, "undisturbed")
    check_against_plan(whole, steps, 5)
    assert consumed(folder, "disturbed") == whole


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_kills(folder):
    steps = 150
    run(*resumable(folder, "undisturbed_long", steps), timeout=600)
    deaths = disturb(folder, "disturbed_long", steps, 20, LAYOUTS, random.Random(0))
    whole = consumed(folder, "undisturbed_long")
    check_against_plan(whole, steps, 5)
    assert consumed(folder, "disturbed_long") == whole
    print(f"killed after steps {deaths}; {len(whole)} packs, {steps * 5} clips, all as in the undisturbed run")

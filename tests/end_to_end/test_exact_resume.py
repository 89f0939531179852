"""Keys that training consumed, in order and lane by lane, under kills: those of the run that nobody disturbed."""

import json
import random
import time

import pytest

from kinema.training.records.journal import read_journal
from tests.end_to_end.commands import dit_command, mixture
from tests.end_to_end.killing import Layout, kill_all, kill_one_rank, start, wait_until
from tests.end_to_end.runs import other_data_set, run

pytestmark = pytest.mark.slow
CLIPS, OTHER_CLIPS = 24, 10  # of the data set, and of the one that is mixed with it
LAYOUTS = [Layout(1, 2), Layout(2, 0), Layout(4, 2), Layout(1, 8), Layout(2, 2), Layout(4, 0), Layout(1, 0)]


def resumable(folder, name, steps, mixed=False):
    """Four lanes, five clips of two shapes a step, shuffled; 24 clips, so epochs end inside steps.

    Mixed, three of four clips come from these, and one from a smaller data set.
    """
    options = ["data.lanes=4", "data.clips_per_step=5", "checkpoint.every_steps=3", "logging.keys=true",
               "validation.every_steps=0", "allow_config_change=true", "task.samples.every_steps=0"]  # fmt: skip
    command = dit_command(folder, name, steps, *options)
    if not mixed:
        return command
    return mixture(command, toy=f"path:{folder}/toy,weight:3", other=f"path:{other_data_set(folder)},weight:1")


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


def disturb(folder, name, steps, kills, layouts, chance, mixed=False):
    """Train to `steps`, killed so many times: mostly some steps after each start, sometimes while it starts."""
    command, log = resumable(folder, name, steps, mixed), folder / f"{name}.log"
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
    last = layouts[kills % len(layouts)]
    run(*command, f"data.num_workers={last.workers}", ranks=last.ranks, timeout=600)
    return deaths


def check_against_plan(lines, steps, clips_per_step, data_sets=(CLIPS,)):
    """Every position once, in lanes that are all there; every epoch of every data set shows each clip exactly once."""
    assert list(lines) == [(step, lane) for step in range(1, steps + 1) for lane in range(4)]
    shown = sorted(place for keys, positions, _ in lines.values() for place in zip(positions, keys, strict=True))
    assert len(shown) == steps * clips_per_step
    for number, clips in enumerate(data_sets):
        own = [(position, key) for position, key in shown if position % len(data_sets) == number]
        assert [position // len(data_sets) for position, _ in own] == list(range(len(own)))
        ordered = [key for _, key in own]
        epochs = [ordered[first : first + clips] for first in range(0, len(ordered), clips)]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert len(set(ordered)) == clips
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
@pytest.mark.parametrize("mixed", [False, True], ids=["single", "mixture"])
def test_twenty_kills(folder, mixed):
    steps, names = 150, [f"{name}_{mixed}" for name in ("undisturbed_long", "disturbed_long")]
    run(*resumable(folder, names[0], steps, mixed), timeout=600)
    deaths = disturb(folder, names[1], steps, 20, LAYOUTS, random.Random(0), mixed)
    whole = consumed(folder, names[0])
    check_against_plan(whole, steps, 5, (CLIPS, OTHER_CLIPS) if mixed else (CLIPS,))
    assert consumed(folder, names[1]) == whole
    print(f"killed after steps {deaths}; {len(whole)} packs, {steps * 5} clips, all as in the undisturbed run")

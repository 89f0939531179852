"""`train.py`, whose numbers are spoilt where UNSOUND says: JSON with kind, keys or steps, and how often."""

import json
import math
import os
import runpy
import sys

import torch

from kinema.training.dit_task import DiTTask
from tests.end_to_end.commands import ROOT

SPOIL = json.loads(os.environ["UNSOUND"])
spoilt_times = 0
whole_micro_step, whole_loss = DiTTask.micro_step, DiTTask.loss


def micro_step(task, pack, *rest):
    global spoilt_times  # noqa: PLW0603
    rows = [key in SPOIL.get("keys", []) or pack.step in SPOIL.get("steps", []) for key in pack.keys]
    rows = torch.tensor(rows) & (pack.weights > 0)
    if SPOIL.get("one"):  # the first clip of the first lane that still counts
        rows &= (pack.weights > 0).cumsum(0) == 1 if pack.lane == 0 else rows & False
    task.spoilt = rows if spoilt_times < SPOIL.get("times", 10**9) else rows & False
    spoilt_times += bool(task.spoilt.any())
    return whole_micro_step(task, pack, *rest)


def loss(task, *arguments):
    losses = whole_loss(task, *arguments)
    if not torch.is_grad_enabled() or not task.spoilt.any():
        return losses
    kinds = {"loss": lambda x: x * math.nan, "gradient": lambda x: x + (x * 0).sqrt(), "spike": lambda x: x * 1000}
    return losses.index_put((task.spoilt,), kinds[SPOIL["kind"]](losses[task.spoilt]))


DiTTask.micro_step, DiTTask.loss = micro_step, loss
sys.argv[0] = str(ROOT / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")

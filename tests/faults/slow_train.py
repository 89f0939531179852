"""`train.py` whose steps take a second each until a file named by FAST exists, so that things can happen meanwhile."""

import os
import runpy
import sys
import time
from pathlib import Path

from kinema.training.loop import Trainer
from tests.end_to_end.commands import ROOT

whole_step = Trainer._train_step


def train_step(trainer, *rest):
    if not Path(os.environ["FAST"]).exists():
        time.sleep(1)
    return whole_step(trainer, *rest)


Trainer._train_step = train_step
sys.argv[0] = str(ROOT / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")

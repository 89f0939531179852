"""`train.py`, of which one rank stops moving in step 4: HANG says how."""

import ctypes
import os
import runpy
import sys
import time

from kinema.data.packs.reader import ClipReader
from kinema.training.dit_task import DiTTask
from kinema.training.loop import Trainer
from tests.end_to_end.commands import ROOT

HOW, GUILTY = os.environ["HANG"], os.environ["RANK"] == "1"
whole_micro_step, whole_step, whole_read = DiTTask.micro_step, Trainer._train_step, ClipReader.__getitem__


def micro_step(task, pack, *rest):
    if HOW == "lock" and GUILTY and pack.step == 3:
        with rest[-1].phase("forward"):
            library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
            library.pthread_mutex_lock(mutex)
            library.pthread_mutex_lock(mutex)  # for ever, in C, with Python's lock held
    return whole_micro_step(task, pack, *rest)


def train_step(trainer, *rest):
    if HOW == "absent" and GUILTY and trainer.step == 3:
        time.sleep(999)  # it never enters the collective
    return whole_step(trainer, *rest)


def read(reader, place):
    if HOW == "worker" and GUILTY and place[0] == 3:
        time.sleep(999)  # in a data worker
    return whole_read(reader, place)


DiTTask.micro_step, Trainer._train_step, ClipReader.__getitem__ = micro_step, train_step, read
sys.argv[0] = str(ROOT / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")

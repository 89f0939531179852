"""What a rank imports sooner or later, for the processes that are forked into ranks: importing this is all they do.

Some of it would be imported where it is first needed: with DeepSpeed's ZeRO, torch's compiler, in two seconds.
"""

import gc
import importlib
import os

MODULES = (
    "deepspeed.runtime.zero.muon.original_muon",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "kinema.build",
    "kinema.sampling.sample",
    "peft",
    "pytest",
    "torch.distributed.checkpoint",
    "wandb",
)

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed looks for one
for name in MODULES:
    importlib.import_module(name)
gc.collect()
gc.freeze()  # what is shared stays shared, and is not looked through again and again

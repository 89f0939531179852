"""The real commands, run to their end: forked from a warm process where only the run matters, or started afresh.

A start of `train.py` is six seconds of imports, and these tests have a hundred of them. `run` has the warm process
of `tests/warm.py` fork the command. `fresh` starts an interpreter; it is for tests about the start itself:
`test_fresh.py` shows that both give the same, bit for bit; launchers (torchrun, deepspeed), signals and kills from
outside (`subprocess.Popen`) have real starts in the tests that are about them.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.end_to_end.commands import ROOT, environment, torchrun, vae_command
from tests.warm import warm_process


def run(*command: str, ranks: int = 1, expect: int | None = 0, timeout: float = 120) -> subprocess.CompletedProcess:
    """A script or `-m kinema.cli` with its words, on so many ranks, in a fork; fresh where there is CUDA to be seen."""
    if torch.cuda.is_available():
        return fresh(*(torchrun(ranks) if ranks > 1 else []), *command, expect=expect, timeout=timeout)
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "stdout"), Path(folder, "stderr")
        job = warm_process().start([*command], output, ranks, errors, KINEMA_TRACEBACK="1")
        statuses = job.wait(timeout)
        status = statuses[0] if ranks == 1 else int(any(statuses))  # as torchrun ends
        answer = subprocess.CompletedProcess(command, status, output.read_text(), errors.read_text())
    return as_expected(answer, expect)


def fresh(*command: str, expect: int | None = 0, timeout: float = 120) -> subprocess.CompletedProcess:
    """The same in a new interpreter, as a user starts it."""
    answer = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return as_expected(answer, expect)


def as_expected(answer: subprocess.CompletedProcess, status: int | None) -> subprocess.CompletedProcess:
    """The answer of a command that must have ended with this status; with any, if it is None."""
    told = f"{' '.join(answer.args)}\n{answer.stdout[-3000:]}\n{answer.stderr[-5000:]}"
    assert status is None or answer.returncode == status, told
    return answer


def train_vae(folder: Path, name: str = "vae", steps: int = 4, *extra: str) -> subprocess.CompletedProcess:
    return run(*vae_command(folder, name, steps, *extra))


def other_data_set(folder: Path) -> Path:
    """A smaller one than `folder/toy`, of other clips."""
    path = folder / "other"
    if not path.exists():
        run("data_prep/toy.py", "--out", f"{path}", "--clips", "10", "--heldout", "2", "--sizes", "64x64,64x48",
            "--seed", "1")  # fmt: skip
    return path

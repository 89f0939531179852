"""Whether the folder of the runs takes checkpoints: room, rate, and how long a byte needs to be safe."""

import os
import shutil
import tempfile
import time
from pathlib import Path

from kinema.doctor.finding import Finding, graded

WRITTEN_MIB = 32
SLOW_MIB = 50.0
"""A second: a checkpoint of 10 GiB would take over three minutes."""
SLOW_FSYNC_SECONDS = 0.5
LEAST_GIB = 2.0


def check_storage(run_root: str) -> Finding:
    """Write, flush and rename in the folder of the runs, and take everything away again."""
    folder = Path(run_root)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as place:
            rate, fsync_seconds = _measure(Path(place))
    except OSError as error:
        advice = f"run_root={run_root} cannot be written ({error.strerror}). Type run_root=FOLDER."
        return graded("storage", str(folder), fail=advice)
    free = shutil.disk_usage(folder).free / 2**30
    for path in made:
        path.rmdir()
    slow = rate < SLOW_MIB or fsync_seconds > SLOW_FSYNC_SECONDS
    told = f"{folder}: {free:.0f} GiB free, {rate:,.0f} MiB/s written and flushed, fsync {1000 * fsync_seconds:.0f} ms"
    return graded(
        "storage",
        told,
        fail=f"run_root={run_root} has hardly any room. Make some, or type run_root=FOLDER."
        if free < LEAST_GIB
        else "",
        warn="slow: checkpoints will hold up the run. Type run_root=FOLDER of a faster disk." if slow else "",
    )


def _measure(folder: Path) -> tuple[float, float]:
    """MiB a second of a file that is written, flushed and renamed; seconds to flush a small one."""
    block = os.urandom(2**20)
    began = time.perf_counter()
    with open(folder / "large.part", "wb") as file:
        for _ in range(WRITTEN_MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / "large.part", folder / "large")
    rate = WRITTEN_MIB / (time.perf_counter() - began)
    with open(folder / "small", "wb") as file:
        began = time.perf_counter()
        file.write(block[:4096])
        file.flush()
        os.fsync(file.fileno())
    return rate, time.perf_counter() - began

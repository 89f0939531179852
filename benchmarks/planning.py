"""What the plan costs at the size of a large data set: time and memory to build it, and time for each step.

python -m benchmarks.planning                 # ten million clips, 64 lanes, 4,096 clips a step
"""

import argparse
import resource
import statistics
import time

import numpy as np

from kinema.data.geometry import ClipShape
from kinema.data.steps.candidates import Candidates
from kinema.data.steps.plan import Plan
from kinema.data.steps.stages import Stage


def many_clips(count: int, kinds: int = 40, per_shard: int = 1000) -> Candidates:
    """Clips of so many kinds, in shards of so many clips."""
    tokens = 256 * np.arange(1, kinds + 1)
    return Candidates(
        shapes=[ClipShape(1 + 4 * kind, 64, 64) for kind in range(kinds)],
        shape_tokens=tokens,
        shape_costs=tokens * (1 + tokens / 9216),
        entry_index=np.arange(count, dtype=np.int32),
        shape_ids=np.random.default_rng(0).integers(0, kinds, count, dtype=np.int32),
        shards=(np.arange(count) // per_shard).astype(np.int32),
    )


def peak_mib() -> float:
    """Most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure and print one line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=10_000_000)
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--clips-per-step", type=int, default=4096)
    arguments = parser.parse_args()
    before = peak_mib()
    clips = many_clips(arguments.clips)
    held = peak_mib() - before
    began = time.perf_counter()
    stage = Stage(clips, max_pack_tokens=1 << 30, clips_per_step=arguments.clips_per_step)
    plan = Plan([stage], seed=0, lanes=arguments.lanes, shuffle_block_shards=4)
    built = time.perf_counter() - began
    milliseconds = []
    for step in [*range(100), *range(10**6, 10**6 + 100)]:
        began = time.process_time()  # of this process alone, on a machine that others use too
        plan.step(step)
        milliseconds.append(1e3 * (time.process_time() - began))
    print(f"{arguments.clips} clips: {held:.0f} MiB of columns, plan built in {built:.2f} s, peak {peak_mib():.0f} MiB")
    low, middle, high = (np.quantile(milliseconds, q) for q in (0.05, 0.5, 0.95))
    print(f"a step of {arguments.clips_per_step} clips on {arguments.lanes} lanes: median {middle:.1f} ms "
          f"({low:.1f} to {high:.1f}), mean {statistics.mean(milliseconds):.1f} ms of CPU")  # fmt: skip


if __name__ == "__main__":
    main()

"""Memory of the loader and all its processes over tens of thousands of clips: flat."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from kinema.data.packs.latents import LatentCache, LatentWriter
from kinema.data.packs.loading import make_loader
from kinema.data.steps.candidates import plan_clips
from tests.end_to_end.killing import descendants
from tests.unit.clips import GEOMETRY, SHAPES, build, make_plan

SHAPE = SHAPES[1:]
CLIPS, PER_STEP = 128, 16


def cached(index, folder):
    identity = {"vae_hash": "vae", "data_hash": index.hash, "shapes": SHAPE, "fps": 8.0}
    size = (16, 2, 16, 16)
    with LatentWriter(folder, max_samples=32, **identity) as writer:
        for clip in plan_clips(index, SHAPE, 8.0, GEOMETRY)[0]:
            writer.write(
                index.entries[clip.entry_index].record.key, clip.shape, 0.0, torch.zeros(size), torch.zeros(size)
            )
    return LatentCache.load(folder, **identity)


def memory_mib() -> float:
    """Of this process and all below it: anonymous and shared pages, counted once, not the libraries' files."""
    total = 0
    for pid in [os.getpid(), *descendants(os.getpid())]:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total / 1024


def measured(tmp_path, clips: int, use_latents: bool) -> np.ndarray:
    """Rows of (clips read, MiB), every twentieth part of the way."""
    index = build(tmp_path / "set", CLIPS, per_shard=32)
    cache = cached(index, tmp_path / "latents") if use_latents else None
    plan, steps = make_plan(index, clips_per_step=PER_STEP, shapes=SHAPE), clips // PER_STEP
    rows, shown = [], 0
    loader = make_loader(index, plan, [0, 1], 3, steps, fps=8.0, seed=0, num_workers=2, latents=cache)
    for number, packs in enumerate(loader, start=1):
        shown += sum(int(pack.weights.sum()) for pack in packs)
        if number % (steps // 20) == 0 and number < steps - 4:  # the workers end before the last packs are taken
            rows.append((shown, memory_mib()))
    assert shown == steps * PER_STEP
    return np.array(rows)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("use_latents", [True, False], ids=["latents", "video"])
def test_memory_is_flat_over_20_000_clips(tmp_path, use_latents):
    rows = measured(tmp_path, 20_000, use_latents)
    settled = rows[len(rows) // 4 :]  # after the first epochs, when every process has read every part of the index
    slope = np.polyfit(settled[:, 0], settled[:, 1], 1)[0]
    print("".join(f"\n{int(clips):6d} clips {mib:8.1f} MiB" for clips, mib in rows))
    print(f"slope {slope * 1000:+.3f} MiB per 1,000 clips")
    assert settled[:, 1].max() - settled[:, 1].min() < 0.02 * settled[0, 1] + 8
    assert slope * 20_000 < 8

"""`kinema evaluate`: how often samples of a toy run show the colour, shape and direction that their caption says."""

import argparse
import json
from pathlib import Path

from omegaconf import OmegaConf
from tqdm import tqdm

from kinema.data.dataset.shards import DatasetIndex
from kinema.data.storage.place import resolve_folder
from kinema.data.verbs.contact_sheet import contact_sheet
from kinema.diffusion.solvers import Solver
from kinema.evaluation.toy_check import check_clip, heldout_prompts, is_toy_caption, pass_rates
from kinema.sampling.pipeline import SamplingConfig
from kinema.sampling.sample import advance, load_pipeline
from kinema.training.checkpoints.store import Checkpoint
from kinema.training.run_folder import Weights, checkpoint_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("run", help="run folder of a DiT trained on data_prep/toy.py clips")
    parser.add_argument("--prompts", type=int, default=64, help="held-out captions to sample (default %(default)s)")
    parser.add_argument("--weights", choices=[w.value for w in Weights], default="ema")
    parser.add_argument("--solver", choices=[s.value for s in Solver], default="heun")
    parser.add_argument("--steps", type=int, default=20, help="solver steps (default %(default)s)")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance scale (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32, help="clips denoised together (default %(default)s)")
    parser.add_argument("--at-least", type=float, default=0.8, help="share that passes (default %(default)s)")
    parser.add_argument("--sheet", type=int, default=24, help="clips on the contact sheet (default %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Sample held-out captions, look at each clip, write `evaluation/`; the verdict is PASS or FAIL."""
    checkpoint = checkpoint_of(arguments.run, "run")
    check_toy_data(checkpoint, arguments.run)
    loaded = load_pipeline(checkpoint, Weights(arguments.weights))
    pipeline, shape = loaded.pipeline, loaded.pipeline.shapes[0]
    prompts = [prompt.prompt for prompt in heldout_prompts(arguments.prompts)]
    rows, verdicts = [], []
    bar = tqdm(total=len(prompts) * arguments.steps, desc="held-out captions", unit="step", dynamic_ncols=True)
    for start in range(0, len(prompts), arguments.batch):
        batch = prompts[start : start + arguments.batch]
        config = SamplingConfig(
            Solver(arguments.solver), arguments.steps, arguments.guidance, seed=arguments.seed + start
        )
        pipeline.check(config, shape)
        for frames, prompt in zip(
            pipeline.videos(batch, shape, config, advance(bar, len(batch))),
            batch,
            strict=True,
        ):
            verdict = check_clip(frames.numpy(), prompt)
            verdicts.append(verdict)
            found = verdict.found
            rows.append(
                (
                    frames.numpy(),
                    f"{'ok' if verdict.ok else f'SEEN {found.colour} {found.shape} {found.direction}'}: {prompt}",
                )
            )
    bar.close()
    rates = pass_rates(verdicts)
    folder = loaded.checkpoint.folder.parent.parent / "evaluation"
    folder.mkdir(exist_ok=True)
    contact_sheet(
        rows[: arguments.sheet],
        folder / "captions.png",
        columns=2,
        title=f"held-out captions, {loaded.describe()}",
    )
    record = {
        "step": loaded.checkpoint.step,
        "weights": loaded.weights.value,
        "fingerprint": loaded.fingerprint,
        "prompts": len(prompts),
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("run", "sheet")},
        "rates": rates,
    }
    Path(folder / "captions.json").write_text(json.dumps(record, indent=1) + "\n")
    passed = rates["all"] >= arguments.at_least
    print(
        f"{len(prompts)} held-out captions: colour {rates['colour']:.0%}, shape {rates['shape']:.0%}, direction "
        f"{rates['direction']:.0%}, all three {rates['all']:.0%} (needed {arguments.at_least:.0%}) "
        f"{'PASS' if passed else 'FAIL'} {folder / 'captions.png'}"
    )
    return 0 if passed else 1


def check_toy_data(checkpoint: Checkpoint, run: str) -> None:
    """Refuse weights that were trained on other captions than those of the toy data, or on unknown ones."""
    stored = checkpoint.folder / "config.yaml"
    if not stored.exists():
        raise ValueError(f"run={run} was not trained here: kinema evaluate judges toy captions only. Type a toy run.")
    data = OmegaConf.load(stored).data
    if data.get("mixture"):
        raise ValueError(
            f"run={run} was trained on data.mixture: kinema evaluate judges runs of one toy data set only."
        )
    # Runs of older versions say nothing of how remote or foreign data are read.
    folder = resolve_folder(data.path, data.cache_folder, data.get("storage"), options=data.get("foreign"))
    index = DatasetIndex.load(folder, split=data.train_split)
    if others := {e.record.caption for e in index.entries if not is_toy_caption(e.record.caption)}:
        shown = ", ".join(repr(caption[:80]) for caption in sorted(others)[:3])
        raise ValueError(
            f"run={run} was trained on {data.path}, with {len(others)} captions that kinema evaluate cannot judge, "
            f"such as {shown}. It judges captions of data_prep/toy.py only: look at sample.py's videos instead."
        )

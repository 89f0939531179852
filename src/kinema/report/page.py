"""`kinema report RUN`: one self-contained HTML page of a run."""

import argparse
import html
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from kinema.report import content
from kinema.report.band import Judgement, judge, load_band, make_band, shipped_bands, write_band
from kinema.report.media import LARGEST_PAGE_MIB, MediaShelf
from kinema.report.run_folder import Record, RunRecord, keys_of, read_run, series


@dataclass(frozen=True)
class Check:
    """One line of the verdict. state: good, bad, warn or plain."""

    title: str
    state: str
    text: str


def build_report(run_folder: Path, out: Path | None = None, band: str | None = None) -> Path:
    """Writes the page of a run, finished or not, to `out` (default: RUN/report.html); returns its path.

    band: name of a shipped reference band or path of one; by default the band named as the run's experiment.
    Errors: ValueError when the folder is no run folder or a band that was asked for by name does not exist.
    """
    page, _ = _build(Path(run_folder), out, band)
    return page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `kinema report`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, for example runs/demo")
    parser.add_argument("--out", type=Path, help="where to write the page (default: RUN/report.html)")
    parser.add_argument("--band", help="reference band by name or path (default: the one named as the experiment)")
    parser.add_argument(
        "--make-band",
        metavar="NAME",
        help="instead of a page, make a reference band from the given healthy runs",
    )


def run(args: argparse.Namespace) -> int:
    """Builds the page of each run, or a band from all of them; prints where it is and, last, the verdict."""
    if args.make_band:
        band = make_band(args.runs)
        path = write_band(band, args.make_band)
        print(f"wrote {path}")
        print(f"READY: band of {band['runs']} run(s), steps {band['steps'][0]} to {band['steps'][-1]}")
        return 0
    if args.out and len(args.runs) > 1:
        raise ValueError(f"out={args.out} holds one page, but {len(args.runs)} runs were given; leave out --out.")
    for folder in args.runs:
        page, checks = _build(folder, args.out, args.band)
        print(f"wrote {page}")
        print("; ".join(f"{check.title}: {check.text}" for check in checks))
    return 0


def _build(folder: Path, out: Path | None, band_name: str | None) -> tuple[Path, list[Check]]:
    run = read_run(folder)
    name = band_name or run.experiment
    band = load_band(name)
    title = Path(name).stem
    if band_name and band is None:
        raise ValueError(f"band={band_name} does not ship; choose among {shipped_bands()} or give a .json path.")
    shelf = MediaShelf(folder)
    judgements = _judgements(run, band)
    checks = [_finished(run), _band_check(judgements, title), *_captions(run), _failures(run)]
    context = {
        "run": run,
        "checks": checks,
        "cards": content.cards(run),
        "band": {"name": title, "data": band, "judgements": judgements},
        "facts": content.key_facts(run),
        "config": highlight(run.config_text) if run.config_text else None,
        "losses": content.losses(run, band),
        "speed": content.speed(run),
        "timesteps": content.timesteps(run),
        # Embedded newest first, so that a full page lacks the old ones.
        "reconstructions": content.reconstructions(run, shelf),
        "captions": content.captions(run, shelf),
        "samples": content.samples(run, shelf),
        "ledger": content.ledger_tables(run.ledger),
        "quarantine": content.quarantine(run),
        "events": content.events(run),
        "environment": content.environment(run),
        "shelf": shelf,
        "page_limit_mib": LARGEST_PAGE_MIB,
        "version": version(),
    }
    page = out or folder / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(templates().get_template("page.html").render(context), encoding="utf-8")
    return page, checks


def templates() -> Environment:
    """The pages of this folder, with the style sheet and the words for numbers."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["css"] = Markup((folder / "page.css").read_text(encoding="utf-8"))
    environment.filters["number"] = content.number
    environment.filters["duration"] = content.duration
    return environment


# The verdict


def _finished(run: RunRecord) -> Check:
    planned, last = run.planned_steps, run.last_step
    if planned is None:
        return Check("Run", "plain", f"stands at step {last:,}; the planned number of steps is not recorded")
    losses = [record.get("loss") for record in run.train]
    spoilt = sum(loss is None or not np.isfinite(loss) for loss in losses)
    if spoilt:
        return Check("Run", "bad", f"step {last:,} of {planned:,}; the loss is not a number at {spoilt} step(s)")
    if last >= planned:
        return Check("Run", "good", f"finished, {last:,} of {planned:,} steps")
    ends = [record for record in run.events if record.get("event") == "end" and record["step"] >= last]
    how = ends[-1].get("detail") if ends else f"still running or killed, last record at step {last:,}"
    return Check("Run", "warn", f"not finished, {last:,} of {planned:,} steps: {how}")


def _band_check(judgements: dict[str, Judgement], name: str) -> Check:
    if not judgements:
        return Check("Reference band", "plain", f"none ships for “{name}”")
    if not judgements["loss"].judged:
        return Check("Reference band", "plain", f"too few steps to judge against {name}")
    outside = [curve for curve, judgement in judgements.items() if judgement.judged and not judgement.inside]
    if not outside:
        return Check("Reference band", "good", f"inside {name}")
    return Check("Reference band", "bad", f"outside {name}: {', '.join(outside)}")


def _judgements(run: RunRecord, band: Record | None) -> dict[str, Judgement]:
    """The verdict on the loss and on each noise level that both the run and the band have."""
    if band is None:
        return {}
    found = {"loss": judge(series(run.train, "loss"), band)}
    for name in keys_of(run.train, "loss_by_noise"):
        if name in band["by_noise"]:
            found[f"timesteps {name}"] = judge(series(run.train, "loss_by_noise", name), band, name)
    return found


def _captions(run: RunRecord) -> list[Check]:
    """How many held-out captions the samples follow, once `kinema evaluate` has measured it."""
    if run.captions is None:
        return []
    share, needed = run.captions["rates"]["all"], run.captions["settings"]["at_least"]
    text = f"{share:.0%} of {run.captions['prompts']} followed, {needed:.0%} needed"
    return [Check("Held-out captions", "good" if share >= needed else "bad", text)]


def _failures(run: RunRecord) -> Check:
    if run.quarantine is None:
        return Check("Failed clips", "plain", "not recorded")
    failed = len(run.quarantine)
    return Check("Failed clips", "warn" if failed else "good", f"{failed:,} in quarantine" if failed else "none")


def highlight(text: str) -> Markup:
    """YAML with its keys marked."""
    escaped = html.escape(text, quote=False)
    return Markup(re.sub(r"(?m)^(\s*(?:- )?)([\w./-]+)(:)", r"\1<b>\2</b>\3", escaped))


def version() -> str:
    """Of Kinema, for the foot of a page."""
    try:
        return importlib.metadata.version("kinema")
    except importlib.metadata.PackageNotFoundError:
        return "from source"

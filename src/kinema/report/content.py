"""What the page shows, section by section: plots, tables and pictures out of the records of a run."""

from typing import Any

import numpy as np

from kinema.report import plots
from kinema.report.media import Media, MediaShelf
from kinema.report.plots import Line
from kinema.report.run_folder import Record, RunRecord, Series, keys_of, series

PHASES = ("data", "encode", "forward", "backward", "optimizer", "other")
LANES = {"efficiency": "cost, mean / largest", "slowest": "seconds, largest / mean", "padding": "padding"}
MOST_COLUMNS = 8
"""Columns of the sample grid; of more the page shows an even choice, the first and the last among them."""
MOST_ROWS = 50


# Numbers at a glance


def cards(run: RunRecord) -> list[tuple[str, str, str]]:
    """Name, value and remark of the numbers at the top."""
    cards = []
    for name, records in (("training loss", run.train), ("validation loss", run.validation)):
        steps, values = series(records, "loss")
        if len(values):
            tail = values[-max(1, min(20, len(values) // 10)) :]
            remark = f"step {steps[-1]:,.0f}" if len(tail) == 1 else f"median of the last {len(tail)}"
            cards.append((name, f"{np.median(tail):.4g}", remark))
    steps, values = series(run.validation, "psnr")
    if len(values):
        cards.append(("validation PSNR", f"{values[-1]:.2f} dB", f"step {steps[-1]:,.0f}"))
    times = speed(run)
    if times:
        cards.append(
            (
                "time in steps",
                duration(times["total_seconds"]),
                f"median step {duration(times['step_seconds'])}",
            )
        )
        if times["clips"]:
            cards.append(("throughput", f"{number(times['clips'])} clips/s", "median over the steps"))
        if times["mfu"] is not None:
            cards.append(("MFU, estimated", f"{100 * times['mfu']:.1f} %", "of the measured peak"))
    return cards


KEY_FACTS = {
    "name": ("name",),
    "seed": ("seed",),
    "steps": ("steps",),
    "data": ("data.path",),
    "shapes (frames, height, width)": ("data.shapes",),
    "fps": ("data.fps",),
    "clips a step": ("data.clips_per_step",),
    "lanes": ("data.lanes",),
    "width, depth, heads": ("model.width", "model.depth", "model.num_heads"),
    "patch": ("model.patch_size",),
    "VAE run": ("vae.path",),
    "VAE strides (time, space)": ("vae.temporal_stride", "vae.spatial_stride"),
    "latent channels": ("vae.latent_channels",),
    "learning rate": ("optim.learning_rate",),
    "ZeRO stage": ("parallel.zero_stage",),
    "precision": ("parallel.precision",),
    "timesteps": ("objective.timestep_distribution",),
    "timestep shift": ("objective.timestep_shift",),
    "guidance dropout": ("task.guidance_dropout",),
}


def key_facts(run: RunRecord) -> list[tuple[str, str]]:
    """The choices that a reader asks for first: those of `KEY_FACTS` that the configuration has."""
    facts = []
    for title, keys in KEY_FACTS.items():
        values = [_lookup(run.config, key) for key in keys]
        if all(value is not None for value in values):
            facts.append((title, ", ".join(str(value) for value in values)))
    parameters = run.info.get("parameters")
    if isinstance(parameters, int | float):
        facts.append(("parameters", number(parameters)))
    elif isinstance(parameters, dict):
        facts += [(f"parameters, {name}", number(value)) for name, value in parameters.items()]
    facts += [(key.replace("_", " "), str(run.info[key])) for key in ("config_hash", "data_hash") if run.info.get(key)]
    return facts


def _lookup(config: Record, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def environment(run: RunRecord) -> list[tuple[str, str]]:
    """Command, machine and versions."""
    rows = [(key, run.info.get(key)) for key in ("started", "command", "world_size", "device", "git")]
    versions = run.info.get("versions")
    if isinstance(versions, dict):
        rows += list(versions.items())
    peak = run.info.get("peak_flops_measured")
    if isinstance(peak, int | float):
        rows.append(("measured peak", f"{number(peak)}FLOP/s a rank"))
    return [(key.replace("_", " "), str(value)) for key, value in rows if value not in (None, "")]


# Losses


def losses(run: RunRecord, band: Record | None) -> dict[str, Any]:
    """The plots of the loss section; None where the run has no such numbers."""
    loss = series(run.train, "loss")
    validation = [line for line in _by_weights(run.validation, "loss") if len(line.curve[0])]
    resumes = [record["step"] for record in run.events if record.get("event") == "resume"]
    names = keys_of(run.train, "loss_by_noise")
    by_noise = {name: series(run.train, "loss_by_noise", name) for name in names}
    terms = [Line(name, series(run.train, "terms", name), i) for i, name in enumerate(keys_of(run.train, "terms"))]
    terms = [line for line in terms if len(line.curve[0])]
    grad_norm, lr = series(run.train, "grad_norm"), series(run.train, "lr")
    return {
        "loss": plots.loss_plot(loss, band, validation, resumes, _log(loss)) if len(loss[0]) else None,
        "by_noise": plots.noise_plot(by_noise, band, _log(*by_noise.values())) if by_noise else None,
        "validation": plots.lines_plot("validation", validation) if validation else None,
        "validation_by_noise": _validation_by_noise(run),
        "weights": sorted({str(record["weights"]) for record in run.validation if "weights" in record}),
        "psnr": _psnr_over_steps(run),
        "terms": [
            (
                line.label,
                plots.stream_plot(f"term-{i}", line.curve, log=_log(line.curve), colour=i % 6),
            )
            for i, line in enumerate(terms)
        ],
        "grad_norm": plots.stream_plot("grad-norm", grad_norm, log=_log(grad_norm), colour=3)
        if len(grad_norm[0])
        else None,
        "lr": plots.lines_plot("lr", [Line("lr", lr, 4)], zero=True) if len(lr[0]) else None,
    }


def _by_weights(records: list[Record], *keys: str) -> list[Line]:
    """One line for each kind of weights (EMA, raw) that the validation was run with."""
    kinds = list(dict.fromkeys(record.get("weights") for record in records))
    lines = []
    for index, kind in enumerate(kinds):
        curve = series([record for record in records if record.get("weights") == kind], *keys)
        lines.append(Line(f"validation, {kind}" if kind else "validation", curve, (1, 3)[index % 2], points=True))
    return lines


def _validation_by_noise(run: RunRecord) -> str | None:
    """Validation loss by noise level, of the first kind of weights."""
    kind = run.validation[0].get("weights") if run.validation else None
    records = [record for record in run.validation if record.get("weights") == kind]
    lines = [
        Line(name, series(records, "loss_by_noise", name), i, points=True)
        for i, name in enumerate(keys_of(records, "loss_by_noise"))
    ]
    lines = [line for line in lines if len(line.curve[0])]
    title = f"{kind} weights" if kind else ""
    return plots.lines_plot("validation-noise", lines, title, _log(*(line.curve for line in lines))) if lines else None


def _psnr_over_steps(run: RunRecord) -> str | None:
    lines = [line for line in _by_weights(run.validation, "psnr") if len(line.curve[0])]
    return plots.lines_plot("validation-psnr", lines, "dB") if lines else None


def _log(*curves: Series) -> bool:
    """Whether the values span so much that only a logarithmic axis shows them all."""
    values = np.concatenate([values for _, values in curves]) if curves else np.zeros(0)
    if not len(values) or values.min() <= 0:
        return False
    low, high = np.quantile(values, [0.02, 0.98])
    return bool(high / low > 12)


# Speed


def speed(run: RunRecord) -> dict[str, Any] | None:
    """Seconds by phase, throughput and MFU; None when no step recorded its seconds."""
    records = [record for record in run.train if isinstance(record.get("seconds"), dict)]
    names = keys_of(records, "seconds")
    phases = {name: series(records, "seconds", name) for name in sorted(names, key=_phase_order)}
    phases = {name: curve for name, curve in phases.items() if len(curve[0])}
    if not phases:
        return None
    # A record holds the means of all steps since the record before it.
    steps = dict(zip((r["step"] for r in records), np.diff([0, *(r["step"] for r in records)]), strict=True))
    totals = {
        name: float(sum(steps[int(at)] * value for at, value in zip(*curve, strict=True)))
        for name, curve in phases.items()
    }
    total = sum(totals.values())
    seconds = [_step_seconds(record) for record in records]
    step_seconds = float(np.median(seconds))
    others = [name for name in phases if name not in PHASES]
    colours = {name: PHASES.index(name) if name in PHASES else 1 + others.index(name) % 5 for name in phases}
    rates = {unit: _rates(records, unit) for unit in ("clips", "tokens")}
    return {
        "phases": plots.phases_plot(phases, colours) if len(records) > 1 else None,
        "shares": [(name, totals[name], totals[name] / total if total else 0, colours[name] + 1) for name in totals],
        "total_seconds": total,
        "step_seconds": step_seconds,
        "slowest": max(zip(seconds, (record["step"] for record in records), strict=True)),
        "clips": float(np.median(rates["clips"][1])) if len(rates["clips"][1]) else None,
        "plots": [
            (
                f"{unit.capitalize()} a second",
                plots.stream_plot(f"{unit}-per-second", curve, zero=True, colour=index),
            )
            for index, (unit, curve) in enumerate(rates.items())
            if len(curve[0])
        ]
        + _lanes(records),
        "mfu": _mfu(run.info, step_seconds),
    }


def _lanes(records: list[Record]) -> list[tuple[str, str]]:
    """How evenly steps were dealt to lanes, and what was computed for nothing; empty where no record says it."""
    lines = [Line(label, series(records, "lanes", key), i) for i, (key, label) in enumerate(LANES.items())]
    lines = [line for line in lines if len(line.curve[0])]
    return [("Lanes", plots.lines_plot("lanes", lines, zero=True))] if lines else []


def _phase_order(name: str) -> tuple[int, str]:
    return (PHASES.index(name) if name in PHASES[:-1] else len(PHASES) + (name == "other"), name)


def _step_seconds(record: Record) -> float:
    return float(sum(value for value in record["seconds"].values() if isinstance(value, int | float)))


def _rates(records: list[Record], unit: str) -> Series:
    rated = [
        {"step": record["step"], "rate": record[unit] / _step_seconds(record)}
        for record in records
        if isinstance(record.get(unit), int | float) and _step_seconds(record) > 0
    ]
    return series(rated, "rate")


def _mfu(info: Record, step_seconds: float) -> float | None:
    """Model FLOPs of a step over what the ranks could do in that time at the measured peak."""
    flops, peak = info.get("flops_per_step"), info.get("peak_flops_measured")
    if not flops or not peak or not step_seconds:
        return None
    return float(flops) / (step_seconds * float(peak) * int(info.get("world_size") or 1))


# Pictures


def timesteps(run: RunRecord) -> str | None:
    """The plot of training timesteps over the sampler's grid; None when timesteps.json has none."""
    edges, counts = ((run.timesteps or {}).get(key) for key in ("edges", "counts"))
    if not edges or not counts or len(edges) != len(counts) + 1:
        return None
    return plots.timesteps_plot(edges, counts, (run.timesteps or {}).get("sampler") or [])


def reconstructions(run: RunRecord, shelf: MediaShelf) -> list[dict[str, Any]]:
    """The VAE's strips, newest first."""
    shown: list[dict[str, Any]] = []
    for record in reversed(run.reconstructions):
        frames = record.get("psnr_per_frame") or []
        clips = frames if frames and isinstance(frames[0], list) else [frames]
        clips = [[float(value) for value in clip if value is not None] for clip in clips if clip]
        sheet = record.get("sheet")
        shown.append(
            {
                "step": record["step"],
                "media": shelf.embed(sheet) if sheet else Media("strip", missing="not recorded"),
                "clips": clips,
                "mean": float(np.mean(np.concatenate(clips))) if clips else None,
                "plot": plots.psnr_plot(clips) if clips and not shown else None,
            }
        )
    return shown


def samples(run: RunRecord, shelf: MediaShelf) -> dict[str, Any] | None:
    """The grid: prompts of the newest record as rows, steps as columns."""
    if not run.samples:
        return None
    count = len(run.samples)
    chosen = sorted(set(np.linspace(0, count - 1, min(count, MOST_COLUMNS)).round().astype(int)))
    records = [run.samples[index] for index in chosen]
    columns = []
    for record in reversed(records):
        videos = dict(zip(record.get("prompts") or [], record.get("videos") or [], strict=False))
        columns.append({**record, "media": {prompt: shelf.embed(video) for prompt, video in videos.items()}})
    columns.reverse()
    newest = records[-1]
    sheet = shelf.embed(newest["sheet"]) if newest.get("sheet") else None
    return {
        "columns": columns,
        "prompts": newest.get("prompts") or [],
        "sheet": sheet,
        "left_out": count - len(records),
    }


def captions(run: RunRecord, shelf: MediaShelf) -> dict[str, Any] | None:
    """What `kinema evaluate` measured, and its sheet; None before it ran."""
    if run.captions is None:
        return None
    record = run.captions
    settings = record["settings"]
    return {
        "rates": list(record["rates"].items()),
        "how": f"{record['prompts']} captions, {record['weights']} weights of step {record['step']:,}, "
        f"{settings['solver']} in {settings['steps']} steps, guidance {settings['guidance']}",
        "sheet": shelf.embed("evaluation/captions.png"),
    }


# Data and events


def ledger_tables(ledger: Record | None) -> list[dict[str, Any]]:
    """Tables of the ledger: each dictionary of dictionaries is one, the rest are facts of the first."""
    tables = []
    facts = [(key, value) for key, value in (ledger or {}).items() if not isinstance(value, dict | list)]
    flat = {key: value for key, value in (ledger or {}).items() if isinstance(value, dict)}
    for title, rows in flat.items():
        if rows and all(isinstance(row, dict) for row in rows.values()):
            columns = list(dict.fromkeys(column for row in rows.values() for column in row))
            body = [(name, [row.get(column) for column in columns]) for name, row in rows.items()]
            tables.append({"title": title, "columns": columns, "rows": body})
        elif rows:
            body = [(name, [value]) for name, value in rows.items()]
            tables.append({"title": title, "columns": [""], "rows": body})
    if facts:
        tables.insert(0, {"title": "totals", "columns": [""], "rows": [(name, [value]) for name, value in facts]})
    return tables


def quarantine(run: RunRecord) -> dict[str, Any] | None:
    """Reasons by count and the first clips that failed."""
    if run.quarantine is None:
        return None
    reasons: dict[str, int] = {}
    for record in run.quarantine:
        reason = str(record.get("reason", "not recorded"))
        reasons[reason] = reasons.get(reason, 0) + 1
    columns = list(dict.fromkeys(key for record in run.quarantine for key in record))
    return {
        "reasons": sorted(reasons.items(), key=lambda item: -item[1]),
        "columns": columns,
        "rows": [[record.get(column, "") for column in columns] for record in run.quarantine[:MOST_ROWS]],
        "total": len(run.quarantine),
    }


def events(run: RunRecord) -> dict[str, Any] | None:
    """When what happened, and the last rows of the list."""
    if not run.events:
        return None
    kinds: dict[str, list[int]] = {}
    for record in run.events:
        kinds.setdefault(str(record.get("event", "event")), []).append(record["step"])
    last = max(run.last_step, *(record["step"] for record in run.events))
    return {
        "plot": plots.events_plot(kinds, last),
        "rows": sorted(run.events, key=lambda record: record["step"])[-MOST_ROWS:],
        "total": len(run.events),
    }


# Words


def number(value: Any) -> str:
    """A number in three digits with k, M, G, T, P; integers below 100,000 in full; other things unchanged."""
    if isinstance(value, dict):
        return ", ".join(f"{name} ({number(count)})" for name, count in value.items())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    if isinstance(value, int) and abs(value) < 100_000:
        return f"{value:,}"
    for factor, unit in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would say."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

"""The table of `docs/parity.md`: what the parity tests measured, as JSON and as a page."""

import json
from pathlib import Path
from typing import Any

from kinema.interop.exporting import is_vae
from kinema.interop.presets import PRESETS

DOCS = Path(__file__).parents[2] / "docs"
RECORD, PAGE = DOCS / "parity.json", DOCS / "parity.md"
COMMAND = "OMP_NUM_THREADS=1 python -m pytest tests/parity -k 'presets' --write-parity-table"

Rows = dict[str, dict[str, Any]]

HEADER = f"""# Parity with the published models

Each preset beside the class of `diffusers` that has its weights: a small model of that class, every parameter random
and none of them zero, odd grids that are not square, two clips with different timesteps, float32, one CPU thread.
*Output* and *gradients* are the largest difference over the largest value, of the prediction and of the gradient of
each parameter under its published name. *Released sizes* are checked without memory: every published tensor has its
place, one to one, by name and shape. The way back, published to Kinema to published, is bit-equal for all of them,
which the same tests check. This page is written by them:

    {COMMAND}

"""
DIT_NOTE = """
`Kandinsky5Transformer3DModel` rounds queries and keys to bfloat16 where it turns them, even in float32: it is compared
without that rounding, and a test of its own shows that what then remains is the rounding's.
"""
VAE_NOTE = """
Latents, log-variances and videos of 1, 5 and 9 frames (stride 4); gradients in float64, where sums of small numbers of
either sign keep their digits. *Causal* is no where a latent or a frame depends on later ones: by GroupNorm statistics
over time (HunyuanVideo), or by choice (LTX-2's decoder). What is causal gives the same bits in any chunks; what is not
refuses to be cut.
"""


def released(row: dict[str, Any]) -> str:
    """`14B: 1,095 tensors, 14.288 B`, one for each release."""
    sizes = {f"{name}:" if name else "": size for name, size in row.get("released", {}).items()}.items()
    lines = [f"{name} {size['tensors']:,} tensors, {size['parameters'] / 1e9:.3f} B" for name, size in sizes]
    return "<br>".join(line.strip() for line in lines) or "as above"


def page(rows: Rows) -> str:
    """The record as Markdown."""
    dits = {name: row for name, row in rows.items() if "causal" not in row}
    vaes = {name: row for name, row in rows.items() if "causal" in row}
    lines = ["## Transformers", "", "| model | class | released sizes | output | gradients |", "|---|---|---|---|---|"]
    lines += [_line(name, row, released(row), row["output"], row["gradients"]) for name, row in dits.items()]
    lines += [
        DIT_NOTE,
        "## Autoencoders",
        "",
        "| model | class | released size | output | gradients | causal | in chunks |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    lines += [_line(n, r, released(r), r["output"], r["gradients"], r["causal"], r["chunks"]) for n, r in vaes.items()]
    return HEADER + "\n".join(lines) + "\n" + VAE_NOTE


def _line(name: str, row: dict[str, Any], *cells: Any) -> str:
    shown = [f"{cell:.1e}" if isinstance(cell, float) else cell for cell in cells]
    return f"| {name} | `{row['class']}` | {' | '.join(shown)} |"


def write(rows: Rows) -> None:
    """Both files; rows of tests that did not run this time stay."""
    before = read() if RECORD.exists() else {}
    kept = {name: row for name, row in before.items() if row["preset"] in BY_NAME}
    merged = {name: {**kept.get(name, {}), **rows.get(name, {})} for name in dict.fromkeys([*kept, *rows])}
    for name in kept.keys() & rows.keys():
        sizes = {**kept[name].get("released", {}), **rows[name].get("released", {})}
        merged[name] |= {"released": sizes} if sizes else {}
    RECORD.write_text(json.dumps(merged, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(merged))


def read() -> Rows:
    """The committed record."""
    return json.loads(RECORD.read_text())


BY_NAME = {preset.name: preset for preset in PRESETS}


class Recorder:
    """Collects figures of rows while tests run."""

    def __init__(self) -> None:
        self.rows: Rows = {}

    def note(self, row: str, preset: str, **figures: Any) -> None:
        """Add to a row; figures of several tests are merged, and of the same name the largest counts."""
        found = self.rows.setdefault(row, {"preset": preset, "class": BY_NAME[preset].reference})
        for name, figure in figures.items():
            if isinstance(figure, float):
                found[name] = max(float(f"{figure:.1e}"), found.get(name, 0.0))
            elif isinstance(figure, dict):
                found.setdefault(name, {}).update(figure)
            else:
                found[name] = figure

    def size(self, row: str, preset: str, release: str, tensors: dict[str, Any]) -> None:
        """Tensors and parameters of a released size."""
        parameters = sum(tensor.numel() for tensor in tensors.values())
        self.note(row, preset, released={release: {"tensors": len(tensors), "parameters": parameters}})


def problems(rows: Rows, limit: float) -> list[str]:
    """What makes a record no table: presets without a row, rows without a figure, figures above the limit."""
    known = {row["preset"] for row in rows.values()}
    found = [f"no row of {name}" for name in BY_NAME if name not in known]
    for name, row in rows.items():
        wanted = ["output", "gradients", *(["causal", "chunks"] if is_vae(BY_NAME[row["preset"]]) else [])]
        found += [f"{name}: no {key}" for key in wanted if key not in row]
        found += [f"{name}: {key} {row[key]}" for key in ("output", "gradients") if not row.get(key, 0) <= limit]
    return found

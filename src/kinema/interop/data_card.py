"""The part of a model card that says which data the weights have seen, under which licences, and what was allowed."""

from typing import Any

MOST_LINES = 100
"""Sources and attributions beyond these are counted; `manifest.json` names them all."""
TITLES = {"licenses": "Licence", "sources": "Source", "generated": "Made by a generative model", "consent": "Consent"}
Seen = dict[str, dict[str, dict[str, float]]]


def licenses_seen(manifest: dict[str, Any]) -> list[str]:
    """Licences of all clips that the weights were shown, also before this training."""
    parts = [seen for _, seen in _trainings(manifest) if seen]
    return sorted({license for seen in parts for license in seen["licenses"]})


def data_section(manifest: dict[str, Any]) -> str:
    """`## Data seen`: tables by licence, source, generation and consent, attributions, and what was allowed."""
    if "published" in manifest:
        return ""
    parts = ["## Data seen"]
    for title, seen in _trainings(manifest):
        parts += [title] if title else []
        parts += _tables(seen) if seen else ["Not known."]
    if rights := manifest.get("data", {}).get("rights"):
        parts.append("What this training allowed (`data.rights`):\n\n" + "\n".join(_rights(rights)))
    return "\n\n".join(parts)


def _trainings(manifest: dict[str, Any]) -> list[tuple[str, Seen | None]]:
    """A heading and what was seen, for this training and for the weights that it started from; None is not known."""
    data = manifest.get("data", {})
    found: list[tuple[str, Seen | None]] = [("", data.get("seen"))]
    if start := data.get("start"):
        found[0] = ("### In this training", found[0][1])
        found.append((f"### Before it, in `{start['origin']}`", start["seen"] if start["is_known"] else None))
    return found


def _tables(seen: Seen) -> list[str]:
    tables = [_table(title, seen[kind]) for kind, title in TITLES.items() if seen[kind]]
    if lines := [f"- {attribution}" for attribution in seen["attributions"]]:
        tables.append("Attribution:\n\n" + "\n".join(_first(lines, "- ... and {} more in `manifest.json`")))
    return tables


def _table(title: str, rows: dict[str, dict[str, float]]) -> str:
    seconds = sum(row["seconds"] for row in rows.values()) or 1
    lines = [
        f"| {name} | {row['clips']} | {row['shown']} | {row['seconds']:.1f} | {row['seconds'] / seconds:.1%} |"
        for name, row in sorted(rows.items(), key=lambda item: -item[1]["seconds"])
    ]
    head = [f"| {title} | clips | times shown | seconds shown | share |", "|---|---|---|---|---|"]
    return "\n".join(head + _first(lines, "| ... and {} more in `manifest.json` | | | | |"))


def _rights(rights: dict[str, list[str]]) -> list[str]:
    keys = rights.get("excluded_keys", [])
    lines = [f"- {name}: {', '.join(words)}" for name, words in rights.items() if words and name != "excluded_keys"]
    return [*lines, *([f"- excluded_keys: {len(keys)} key(s), in `manifest.json`"] if keys else [])]


def _first(lines: list[str], more: str) -> list[str]:
    return lines if len(lines) <= MOST_LINES else [*lines[:MOST_LINES], more.format(len(lines) - MOST_LINES)]

"""The model card of an export: what the weights are, and what they have seen."""

import json
from typing import Any

from kinema.interop.data_card import data_section, licenses_seen
from kinema.interop.loading import Held
from kinema.interop.preset import Preset


def model_card(held: Held, presets: dict[str, Preset], weights: str, lines: list[str]) -> str:
    """README.md: the facts of the manifest for people, with the header that model hubs read."""
    manifest = held.manifest or {}
    sections = [
        _header(manifest, presets),
        f"# {manifest.get('name', 'model')}",
        f"{_origin(manifest)} `manifest.json` holds all of this for programs.",
        _table({"weights": weights, **_facts(manifest, presets)}),
        "## Compared after loading\n\n" + "\n".join(f"- {line}" for line in lines),
        data_section(manifest),
        _text(manifest),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _origin(manifest: dict[str, Any]) -> str:
    if (published := manifest.get("published")) is None:
        return "Trained and exported with Kinema."
    return f"Imported from {published['preset']} (`{published['class']}`) and exported with Kinema, not trained."


def _header(manifest: dict[str, Any], presets: dict[str, Preset]) -> str:
    licences = licenses_seen(manifest)
    license_name = licences[0].lower() if len(licences) == 1 else "other"
    lines = ["---", f"license: {license_name}", "library_name: diffusers", "tags: [kinema, video]"]
    if "transformer" in presets:
        lines.append("pipeline_tag: text-to-video")
    return "\n".join([*lines, "---"])


def _facts(manifest: dict[str, Any], presets: dict[str, Preset]) -> dict[str, str]:
    data, objective = manifest.get("data", {}), manifest.get("objective", {})
    is_trained = "published" not in manifest
    facts = {name: f"{preset.name}: `{preset.reference}`" for name, preset in presets.items()}
    if is_trained:
        facts["steps"] = str(manifest["step"]) if "step" in manifest else "not known"
        facts["data"] = f"hash `{data['hash']}`, {data['kept']}" if data else "not known"
    facts["fingerprints"] = ", ".join(f"{k} `{v}`" for k, v in manifest.get("fingerprints", {}).items()) or "none"
    if objective:
        facts["objective"] = ", ".join(f"{key} {value}" for key, value in objective.items() if value is not None)
    if "fps" in manifest:
        facts["frames per second"] = f"{manifest['fps']:g}"
        facts["shapes (frames, height, width)"] = ", ".join(map(str, manifest["shapes"])) or "not known"
    if is_trained and "guidance_dropout" in manifest:
        facts["captions dropped for guidance"] = f"{manifest['guidance_dropout']:.0%}"
    for part, reason in manifest.get("vae", {}).get("looks_ahead", {}).items():
        facts[f"not causal: the VAE's {part}"] = reason
    return facts


def _table(facts: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])


def _text(manifest: dict[str, Any]) -> str:
    policy = manifest.get("text", {}).get("policy")
    if policy is None:
        return ""
    shown = json.dumps(policy, indent=1)
    return f"## Captions\n\nEncoded with this policy, and with no other:\n\n```json\n{shown}\n```"

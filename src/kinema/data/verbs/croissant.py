"""`kinema data croissant`: a data set in the words of Croissant 1.0 and its RAI extension, for catalogues and loaders.

https://docs.mlcommons.org/croissant/docs/croissant-spec.html and croissant-rai-spec.html. Each shard is a FileObject,
the members of one extension are a FileSet over all shards, and the records beside the clips are a RecordSet.
"""

import argparse
import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

from kinema.data.account.licenses import is_known, licenses_named
from kinema.data.dataset.opened import local_folder
from kinema.data.dataset.sample import ClipRecord
from kinema.data.dataset.shards import DatasetIndex, index_name, write_aside

FILE = "croissant.json"
CONFORMS_TO = ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"]
MEDIA_TYPES = {"mp4": "video/mp4", "json": "application/json", "txt": "text/plain"}
DATA_TYPES = {str: "sc:Text", int: "sc:Integer", float: "sc:Float", bytes: "sc:VideoObject"}
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "citeAs": "cr:citeAs",
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "includes": "cr:includes",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "source": "cr:source",
    "transform": "cr:transform",
}
"""The words of the standard that are used here."""


def describe(index: DatasetIndex, stated: dict[str, str]) -> dict[str, Any]:
    """The data set as JSON-LD. `stated` are properties that no index knows: url, description, version, ..."""
    manifest = index.manifest
    described = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        "name": manifest["name"],
        "description": f"{len(index.entries)} video clips with captions, {manifest['seconds'] / 60:.1f} minutes.",
        "license": [_license(name) for name in _names(index, "license")],
        **({"creditText": " | ".join(texts)} if (texts := _names(index, "attribution")) else {}),
        **_responsible_use(index),
        **stated,
    }
    shards = [_shard(shard) for shard in manifest["shards"]]
    extensions = sorted({ext for entry in index.entries for ext in entry.members})
    described["distribution"] = shards + [_members(ext, shards) for ext in extensions]
    described["distribution"].append(_index_files())
    described["recordSet"] = [_clips(), _videos()]
    return described


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("path", type=local_folder, help="folder with a data set")
    parser.add_argument("--to", type=Path, help=f"file to write (default: PATH/{FILE})")
    parser.add_argument("--url", help="where the data set is published")
    parser.add_argument("--description", help="what it is")
    parser.add_argument("--version", help="of the data set, e.g. 1.0.0")
    parser.add_argument("--date-published", help="e.g. 2026-01-31")
    parser.add_argument("--cite-as", help="how to cite it")
    parser.add_argument("--json", action="store_true", help="print what is written, and the verdict, as one object")


def run(arguments: argparse.Namespace) -> int:
    """Write the description; returns 0."""
    to = arguments.to or arguments.path / FILE
    given = vars(arguments)
    words = {"url": "url", "description": "description", "version": "version"}
    words |= {"date_published": "datePublished", "cite_as": "citeAs"}
    index = DatasetIndex.load(arguments.path)
    described = describe(index, {word: given[name] for name, word in words.items() if given[name]})
    odd = sum(not is_known(entry.record.license) for entry in index.entries)
    write_aside(to, (json.dumps(described, indent=1, ensure_ascii=False) + "\n").encode())
    fields_ = len(described["recordSet"][0]["field"])
    verdict = (
        f"WRITTEN {to}: {len(described['license'])} licence(s), {odd} clips under no SPDX licence, {fields_} fields"
    )
    print(json.dumps({**described, "verdict": verdict}, ensure_ascii=False) if arguments.json else verdict)
    return 0


def _names(index: DatasetIndex, fact: str) -> list[str]:
    return sorted({value for entry in index.entries if (value := getattr(entry.record, fact))})


def _license(name: str) -> str:
    """SPDX has a page for each licence of its list; an expression, or another text, stays as it is."""
    listed = (
        is_known(name) and licenses_named(name) == (name,) and name != "unknown" and not name.startswith("LicenseRef")
    )
    return f"https://spdx.org/licenses/{name}.html" if listed else name


def _responsible_use(index: DatasetIndex) -> dict[str, str]:
    """What the records state, in the RAI extension's words; nothing is said of what nobody stated."""
    days = _names(index, "collected")
    sources = dict.fromkeys((entry.record.source, entry.record.source_url) for entry in index.entries)
    collected = "; ".join(f"{source} ({url})" if url else source for source, url in sources)
    return {
        "rai:dataCollection": f"Clips of {collected}.",
        **({"rai:dataCollectionTimeFrame": f"{days[0]}/{days[-1]}"} if days else {}),
        "rai:dataPreprocessingProtocol": f"Made by: {index.manifest['command']}",
        "rai:personalSensitiveInformation": f"Consent of people seen, in clips: {_counts(index, 'consent')}.",
        "rai:dataLimitations": (
            f"Made by generative models, in clips: {_counts(index, 'generated')}. "
            f"Licences, in clips: {_counts(index, 'license')}."
        ),
    }


def _counts(index: DatasetIndex, fact: str) -> str:
    counts = Counter(getattr(entry.record, fact) for entry in index.entries)
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def _shard(shard: dict[str, Any]) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": shard["file"],
        "name": shard["file"],
        "contentUrl": shard["file"],
        "contentSize": f"{shard['bytes']} B",
        "encodingFormat": "application/x-tar",
        "sha256": shard["sha256"],
    }


def _members(ext: str, shards: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": f"{ext}-files",
        "name": f"{ext}-files",
        "containedIn": [{"@id": shard["@id"]} for shard in shards],
        "encodingFormat": MEDIA_TYPES.get(ext, "application/octet-stream"),
        "includes": f"*.{ext}",
    }


def _index_files() -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": "index-files",
        "name": "index-files",
        "description": "One beside each shard: where its members lie, and the records that stand in it.",
        "encodingFormat": "application/json",
        "includes": index_name("*"),
    }


def _clips() -> dict[str, Any]:
    """The records, read from the indexes: one column for each field."""
    found = [
        _field("clips", f.name, f.type, "index-files", jsonPath=f"$.samples[*].record.{f.name}")
        for f in fields(ClipRecord)
        if f.type in DATA_TYPES
    ]
    return {"@type": "cr:RecordSet", "@id": "clips", "name": "clips", "key": {"@id": "clips/key"}, "field": found}


def _videos() -> dict[str, Any]:
    """The files in the tars; the name up to its first dot is the key of the clip."""
    name = _field("videos", "key", str, "mp4-files", fileProperty="filename")
    name["source"]["transform"] = {"regex": r"^([^.]*)"}
    name["references"] = {"field": {"@id": "clips/key"}}
    return {
        "@type": "cr:RecordSet",
        "@id": "videos",
        "name": "videos",
        "key": {"@id": "videos/key"},
        "field": [name, _field("videos", "content", bytes, "mp4-files", fileProperty="content")],
    }


def _field(record_set: str, name: str, kind: Any, files: str, **extract: str) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"{record_set}/{name}",
        "name": name,
        "dataType": DATA_TYPES[kind],
        "source": {"fileSet": {"@id": files}, "extract": extract},
    }

"""`kinema data index`: make a WebDataset that Kinema did not write readable by random access."""

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

from kinema.data.dataset.foreign import ForeignOptions
from kinema.data.dataset.indexing import index_shards
from kinema.data.dataset.shards import DatasetIndex, read_member
from kinema.data.storage.address import Address
from kinema.data.storage.place import resolve_folder

JSON_SEEN = 100
"""Clips whose json is looked into where no caption was found."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("folder", help="folder of tar shards, or an address: https://HOST/FOLDER/part-{000..099}.tar")
    parser.add_argument("--name", help="name of the data set (default: the folder's)")
    parser.add_argument(
        "--field", action="append", default=[], metavar="OURS=THEIRS",
        help="where the json has a fact, e.g. --field caption=long_caption --field license=meta.license",
    )  # fmt: skip
    parser.add_argument(
        "--max-refused", type=float, default=ForeignOptions.max_refused_fraction,
        help="largest share of samples that may be left out (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--cache-folder", default="~/.cache/kinema/data",
        help="where the index of an address goes; data.cache_folder of the training (default %(default)s)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Write an index of each shard and a manifest; the shards themselves stay as they are."""
    options = ForeignOptions(dict(map(parse_field, arguments.field)), arguments.max_refused)
    if address := Address.parse(arguments.folder):
        index = DatasetIndex.load(resolve_folder(arguments.folder, arguments.cache_folder, options=options))
    else:
        index = index_shards(arguments.folder, name=arguments.name, options=options)
    shards, shown = len(index.manifest["shards"]), address or arguments.folder
    captioned = int(index.columns.captioned.sum())
    if not captioned:
        print(f"no clip has a caption. {_where_captions_may_be(index)}")
    clips = f"{len(index.entries)} clips, {captioned} with a caption,"
    print(f"indexed {clips} in {shards} shard(s), hash {index.hash[:16]} READY {shown}")
    return 0


def parse_field(pair: str) -> tuple[str, str]:
    """`caption=long_caption` as its two names; raises ValueError without the sign between them."""
    ours, sign, theirs = pair.partition("=")
    if not (ours and sign and theirs):
        raise ValueError(f"--field {pair} must be OURS=THEIRS, e.g. --field caption=long_caption.")
    return ours, theirs


def _where_captions_may_be(index: DatasetIndex) -> str:
    """The keys of the first json members, as --field takes them."""
    first = [entry for entry in islice(index.entries, JSON_SEEN) if "json" in entry.members]
    keys = {key for entry in first for key in _keys(json.loads(read_member(index.folder, entry, "json")))}
    if not keys:
        return f"The first {JSON_SEEN} clips have no json either: add txt or json members to the tars."
    return f"Their json has: {', '.join(sorted(keys))}. Type --field caption=KEY with the one that holds it."


def _keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"

"""`kinema data index`: make a WebDataset that Kinema did not write readable by random access."""

import argparse

from kinema.data.address import Address
from kinema.data.foreign import ForeignOptions
from kinema.data.indexing import index_shards
from kinema.data.shards import DatasetIndex
from kinema.data.storage import resolve_folder


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
    fields = dict(pair.split("=", 1) for pair in arguments.field)
    options = ForeignOptions(fields, arguments.max_refused)
    if address := Address.parse(arguments.folder):
        index = DatasetIndex.load(resolve_folder(arguments.folder, arguments.cache_folder, options=options))
    else:
        index = index_shards(arguments.folder, name=arguments.name, options=options)
    shards, shown = len(index.manifest["shards"]), address or arguments.folder
    print(f"indexed {len(index.entries)} clips in {shards} shard(s), hash {index.hash[:16]} READY {shown}")
    return 0

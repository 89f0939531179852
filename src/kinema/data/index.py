"""`kinema data index`: make a WebDataset that Kinema did not write readable by random access."""

import argparse

from kinema.data.shards import index_shards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("folder", help="folder of tar shards with KEY.mp4 and KEY.json or KEY.txt")
    parser.add_argument("--name", help="name of the data set (default: the folder's)")


def run(arguments: argparse.Namespace) -> int:
    """Write an index beside each shard and a manifest; the shards themselves stay as they are."""
    index = index_shards(arguments.folder, name=arguments.name)
    shards = len(index.manifest["shards"])
    print(f"indexed {len(index.entries)} clips in {shards} shard(s), hash {index.hash[:16]} READY {arguments.folder}")
    return 0

"""A data set to look at: one of Kinema's, or a folder of WebDataset tars, which stays as it is."""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kinema.data.config import DataConfig
from kinema.data.dataset.indexing import index_shards
from kinema.data.dataset.shards import DatasetIndex
from kinema.data.storage.address import Address, redacted
from kinema.data.storage.place import resolve_folder
from kinema.data.storage.store import MANIFEST


@contextmanager
def opened(folder: str | Path) -> Iterator[DatasetIndex]:
    """The index of a data set; that of foreign tars is made in a temporary folder, and gone afterwards.

    That of an address stays in the cache, where the training finds it.
    """
    if isinstance(folder, str) and Address.parse(folder):
        yield DatasetIndex.load(resolve_folder(folder, DataConfig.cache_folder))
        return
    folder = Path(folder)
    tars = sorted(folder.glob("*.tar"))
    if (folder / MANIFEST).exists() or not tars:
        yield DatasetIndex.load(folder)
        return
    with tempfile.TemporaryDirectory(prefix="kinema-index-") as aside:
        for tar in tars:
            (Path(aside) / tar.name).symlink_to(tar.resolve())
        yield index_shards(aside, name=folder.resolve().name)


def local_folder(text: str) -> Path:
    """Type of a command's argument that must be a folder of this machine."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{redacted(text)} is an address, and this takes a folder: copy the data set here first. "
            "Addresses are taken by kinema data index, stats, show and diff, and by data.path."
        )
    return Path(text)

"""A data set to look at: one of Kinema's, or a folder of WebDataset tars, which stays as it is."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kinema.data.indexing import index_shards
from kinema.data.shards import DatasetIndex
from kinema.data.store import MANIFEST


@contextmanager
def opened(folder: str | Path) -> Iterator[DatasetIndex]:
    """The index of a data set; that of foreign tars is made in a temporary folder, and gone afterwards."""
    folder = Path(folder)
    tars = sorted(folder.glob("*.tar"))
    if (folder / MANIFEST).exists() or not tars:
        yield DatasetIndex.load(folder)
        return
    with tempfile.TemporaryDirectory(prefix="kinema-index-") as aside:
        for tar in tars:
            (Path(aside) / tar.name).symlink_to(tar.resolve())
        yield index_shards(aside, name=folder.resolve().name)

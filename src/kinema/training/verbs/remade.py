"""A new run folder with one checkpoint that is made of others, complete in itself as theirs are."""

import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kinema.training.checkpoints.pieces import Written, share, whole, write_pieces
from kinema.training.checkpoints.save import fingerprints_of, is_part, part_name
from kinema.training.checkpoints.store import (
    CARRIED,
    MANIFEST,
    Checkpoint,
    CheckpointStore,
    FileSum,
    Writer,
    json_writer,
    link_writer,
    read_seal,
    write_synced,
)


def remake(
    source: Checkpoint,
    to: Path,
    tensors: Mapping[str, Callable[[], dict[str, Tensor]]],
    *,
    ranks: int = 1,
    documents: tuple[str, ...] = (),
    note: dict[str, Any] | None = None,
) -> Checkpoint:
    """Publish a checkpoint of the step of `source` in the new run folder `to`.

    `tensors` gives those of `model`, `ema` and so on, one set at a time; they are laid out as by `ranks` ranks. Of
    `source` come the manifest, with `note` added, the `documents`, and the VAE and base of its run.
    """
    store = CheckpointStore(to)
    if to.exists() and any(to.iterdir()):
        raise ValueError(f"--to {to} is not empty; name a new folder.")
    aside = store.aside(source.step)
    aside.mkdir(parents=True)
    parts: dict[str, Written] = {}
    for name, make in tensors.items():
        pieces = list(itertools.starmap(whole, make().items()))
        for rank in range(ranks):
            file = part_name(name, rank, ranks)
            parts[file] = write_pieces(aside / file, list(share(pieces, rank, ranks)))
    manifest = {**source.document("manifest"), **(note or {}), "fingerprints": fingerprints_of(parts)}
    writers: dict[str, Writer] = {name: link_writer(source.folder / name) for name in documents}
    files = {name: FileSum(found.num_bytes, found.crc32) for name, found in parts.items()}
    for name, write in {**writers, MANIFEST: json_writer(manifest)}.items():
        files[name] = write_synced(aside / name, write)
    store.seal(aside, source.step, files)
    _carry(source.folder.parent.parent, to)
    return store.announce(source.step)


def documents_of(source: Checkpoint) -> list[str]:
    """The files of a checkpoint beside its tensors and its manifest, which `remake` writes anew."""
    return [file for file in read_seal(source.folder)["files"] if not is_part(file) and file != MANIFEST]


def _carry(run: Path, to: Path) -> None:
    for name in CARRIED:
        if (run / name).exists():
            shutil.copytree(run / name, to / name)

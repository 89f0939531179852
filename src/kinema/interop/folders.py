"""Folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def published_folder(target: Path, option: str = "--to") -> Iterator[Path]:
    """A folder beside `target` to write in, which takes its name at the end; on any error nothing is left of it."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{option} {target} exists and is not empty: name a new folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".writing-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        if target.exists():
            target.rmdir()  # empty, as was checked
        os.rename(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise

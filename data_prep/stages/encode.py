"""Stage encode: latents and text embeddings of the data set that was written, by the commands that make them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from data_prep.pipeline.rows import Outcome, Row, write_json
from data_prep.pipeline.stage import Place, Stage
from kinema.data.dataset.shards import load_manifest


@dataclass
class Encode(Stage):
    """Types `kinema data encode` and `kinema data encode-text` for you, so that caches are equal to theirs."""

    light: ClassVar[bool] = True

    data: str = ""
    """Folder of the data set; the caches lie beside it, as FOLDER.latents and FOLDER.text."""
    overwrite: bool = False
    """Replace latents that lie there."""
    vae: str | None = None
    """Run folder of a trained VAE; null makes no latents."""
    weights: str = "ema"
    shapes: list[str] = field(default_factory=list)
    """Clip shapes, FRAMESxHEIGHTxWIDTH."""
    fps: float = 8.0
    windows: int = 1
    """Windows of each clip, spread over its length."""
    text: list[str] = field(default_factory=list)
    """Words of the training command that choose a text encoder, such as ["text=wan","text.path=DIR"]."""
    text_of_run: str | None = None
    """Or a run whose text encoder is used."""

    def __post_init__(self) -> None:
        if self.vae is not None and not self.shapes:
            raise ValueError("encode.shapes=[] must name the clip shapes, e.g. encode.shapes=[17x256x256].")
        if self.text and self.text_of_run:
            raise ValueError("encode.text and encode.text_of_run exclude each other: give one.")

    def apply(self, row: Row, place: Place) -> Iterable[Outcome]:
        """Every row as it is."""
        return [row]

    def finish(self, rows: Iterator[Row], place: Place) -> Iterable[Outcome]:
        """Encode; the rows stay as they are."""
        yield from rows
        if not self.commands():
            raise ValueError("encode has nothing to do: give encode.vae, encode.text or encode.text_of_run.")
        for name, words in self.commands().items():
            self.run(name, words, place)

    def commands(self) -> dict[str, list[str]]:
        """What is typed, by the suffix of the folder that it makes."""
        found = {}
        if self.vae is not None:
            shapes = [word for shape in self.shapes for word in ("--shape", shape)]
            settings = ["--vae", self.vae, "--weights", self.weights, "--fps", str(self.fps)]
            found["latents"] = ["encode", *settings, "--windows", str(self.windows), *shapes]
        if self.text or self.text_of_run:
            source = ["--config", *self.text] if self.text else ["--run", str(self.text_of_run)]
            found["text"] = ["encode-text", *source]
        return found

    def run(self, name: str, words: list[str], place: Place) -> None:
        """Run one command, unless it was run before on the same data; raises ValueError if it fails."""
        out, note = Path(f"{self.data}.{name}"), place.folder / f"{name}.json"
        wanted = {"words": words, "data_hash": load_manifest(self.data)["hash"]}
        if out.exists() and note.exists() and json.loads(note.read_text()) == wanted:
            return
        if name == "latents" and out.exists() and self.overwrite:
            shutil.rmtree(out)
        command, *options = words
        line = ["-m", "kinema.cli", "data", command, self.data, "--out", str(out), *options]
        if subprocess.run([sys.executable, *line], check=False).returncode:
            raise ValueError(f"encode: kinema {' '.join(line[2:])} failed; its message stands above.")
        write_json(note, wanted)

"""Stage caption: a text for every clip, from a column, a vision-language model or a program of yours."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.captioners.cache import CaptionCache
from data_prep.captioners.captioner import Captioner
from data_prep.captioners.command import CommandCaptioner
from data_prep.captioners.vision_language import VisionLanguageCaptioner
from data_prep.pipeline.rows import Dropped, Outcome, Row
from data_prep.pipeline.stage import Place, Stage

EMPTY = "empty caption"


@dataclass
class CaptionFromColumns(Stage):
    """Takes the first text that the row has under these names: a string, or the first of a list that is not blank."""

    columns: list[str] = field(default_factory=lambda: ["caption", "captions", "text", "texts"])
    suffixes: list[str] = field(default_factory=list)
    """Else a file beside the source video, such as .txt or .json (its `caption`, or one of `columns`)."""
    drop_empty: bool = True

    def apply(self, row: Row, place: Place) -> Iterable[Outcome]:
        """The row with its caption, or dropped without one."""
        caption = first_text({**row.get("listed", {}), **row}, self.columns) or (
            self.beside(Path(row["path"])) if "path" in row else ""
        )
        found = row | {"caption": caption}
        yield Dropped(found, EMPTY) if self.drop_empty and not caption else found

    def beside(self, video: Path) -> str:
        """The text of the first of the files that there is, or nothing."""
        for suffix in self.suffixes:
            path = video.with_suffix(suffix)
            if path.is_file():
                return read_text(path, self.columns)
        return ""


@dataclass
class CaptionWith(Stage):
    """What every captioner shares: which clips it is asked about, and where its answers are kept."""

    replace: bool = True
    """Also caption clips that have a caption; false fills only the gaps."""
    frames: int = 8
    """Frames, evenly spread, that the captioner is shown."""
    prompt: str = "Describe this video in one or two sentences: who or what is seen, how it moves, and where."
    cache: str | None = None
    """Folder of all answers, by clip and captioner, kept over changes of other settings; null is in `work`."""

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"caption.frames={self.frames} must be at least 1.")

    def captioner(self) -> Captioner:
        """The one that is configured."""
        raise NotImplementedError

    def start(self) -> None:
        """Load it."""
        self.loaded = self.captioner()

    def apply(self, row: Row, place: Place) -> Iterable[Outcome]:
        """The row with its caption; dropped if that is empty. Raises RowFailed if there is none."""
        if row.get("caption", "").strip() and not self.replace:
            return [row]
        cache = CaptionCache(Path(self.cache) if self.cache else place.work / "captions", self.loaded.identity)
        caption = cache.read(row["sha256"])
        if caption is None:
            caption = " ".join(self.loaded.caption(place.find(row["clip"]), row["num_frames"]).split())
            cache.write(row["sha256"], caption)
        found = row | {"caption": caption, "captioner": self.loaded.identity}
        return [found if caption else Dropped(found, EMPTY)]


@dataclass
class CaptionWithCommand(CaptionWith):
    """Asks a program for each clip; its standard output is the caption."""

    command: list[str] = field(default_factory=list)
    """Program and arguments, never a shell. {clip} is the path of the mp4, {frames} a folder of jpg files in the order
    of their names, {prompt} the prompt.
    """
    timeout_seconds: float = 60.0
    """A program that takes longer is ended, with all that it started, and the clip fails."""
    version_of_command: str = ""
    """Change it when the program's answers change: they are cached."""

    def captioner(self) -> Captioner:
        """The program."""
        return CommandCaptioner(
            self.command, self.prompt, self.frames, self.timeout_seconds, version=self.version_of_command
        )


@dataclass
class CaptionWithModel(CaptionWith):
    """Asks a vision-language model of `transformers`: any that AutoModelForImageTextToText loads."""

    model: str = ""
    """Folder, or a name on the hub."""
    revision: str | None = None
    """Of the hub: a commit, so that equal settings are equal captions."""
    max_new_tokens: int = 128
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: the GPU if there is one."""
    dtype: str = "auto"
    """`float32`, `bfloat16`, ...; `auto` is what the model was saved in."""

    def captioner(self) -> Captioner:
        """The model, loaded."""
        return VisionLanguageCaptioner(
            self.model,
            self.prompt,
            self.frames,
            revision=self.revision,
            max_new_tokens=self.max_new_tokens,
            device=self.device,
            dtype=self.dtype,
        )


def first_text(values: Row, names: Iterable[str]) -> str:
    """The first string under these names that is not blank, in one line; lists are gone through."""
    for name in names:
        value = values.get(name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text.strip():
                return " ".join(text.split())
    return ""


def read_text(path: Path, names: Iterable[str]) -> str:
    """A caption from a text file, or from the fields of a json file; raises ValueError for damaged json."""
    import json

    content = path.read_text(encoding="utf-8")
    if path.suffix.lower() != ".json":
        return " ".join(content.split())
    values = json.loads(content)
    return first_text(values if isinstance(values, dict) else {"caption": values}, ["caption", *names])

"""What every captioner is."""

from pathlib import Path
from typing import Protocol


class Captioner(Protocol):
    """Writes a text about a clip."""

    identity: str
    """Changes whenever its answers may: model, prompt, frames, settings. Answers are cached under it."""

    def caption(self, clip: Path, num_frames: int) -> str:
        """The text about an mp4 with so many frames; raises RowFailed if there is none."""

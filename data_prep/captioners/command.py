"""Captions from a program that anyone may write, in any language."""

import os
import signal
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from data_prep.clip_frames import spread_frames
from data_prep.pipeline.rows import RowFailed
from kinema.identity import digest

PLACES = ("{clip}", "{frames}")


class CommandCaptioner:
    """Runs `command` for each clip. Nothing is ever read by a shell: a caption or file name cannot become code."""

    def __init__(
        self, command: list[str], prompt: str, frames: int, timeout_seconds: float, *, version: str = ""
    ) -> None:
        if not command or not any(place in word for word in command for place in PLACES):
            raise ValueError(
                f"caption.command={command} must be a program and its arguments, one of which holds {{clip}} or "
                "{frames}, e.g. [python,describe.py,'{clip}']."
            )
        if not timeout_seconds > 0:
            raise ValueError(f"caption.timeout_seconds={timeout_seconds} must be above 0.")
        self.command, self.prompt, self.frames, self.timeout_seconds = command, prompt, frames, timeout_seconds
        self.identity = digest({"command": command, "prompt": prompt, "frames": frames, "version": version})

    def caption(self, clip: Path, num_frames: int) -> str:
        """Standard output of the program; raises RowFailed if it fails, takes too long or writes no UTF-8."""
        with tempfile.TemporaryDirectory() as folder:
            if any("{frames}" in word for word in self.command):
                write_frames(clip, num_frames, self.frames, Path(folder))
            values = {"{clip}": str(clip.resolve()), "{frames}": folder, "{prompt}": self.prompt}
            return run([filled(word, values) for word in self.command], self.timeout_seconds)


def filled(word: str, values: dict[str, str]) -> str:
    """An argument with its places filled in one pass, so that what a value says is never looked at."""
    import re

    return re.sub("|".join(map(re.escape, values)), lambda found: values[found[0]], word)


def write_frames(clip: Path, num_frames: int, count: int, folder: Path) -> None:
    """frame-000.jpg, frame-001.jpg, ... evenly spread over the clip."""
    for number, frame in enumerate(spread_frames(clip, num_frames, count)):
        Image.fromarray(frame).save(folder / f"frame-{number:03d}.jpg", quality=95)


def run(command: list[str], timeout_seconds: float) -> str:
    """Run a program in a process group of its own, which is ended as a whole when the time is over."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise RowFailed(f"caption command cannot be started: {error}") from error
    try:
        output, complaint = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise RowFailed(f"caption command took too long: over {timeout_seconds:g} s") from None
    if process.returncode:
        last = complaint.decode(errors="replace").strip().splitlines()[-1:]
        raise RowFailed(f"caption command failed: exit code {process.returncode}{': ' if last else ''}{''.join(last)}")
    try:
        return output.decode()
    except UnicodeDecodeError as error:
        raise RowFailed(f"caption command wrote no UTF-8: {error}") from error

"""Checkpoints at an address (S3, ...): copied there once they are published, fetched where a machine has none."""

import functools
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from kinema.data.storage.address import REMOTE_SCHEMES, Address
from kinema.data.storage.remote import StorageConfig, open_filesystem
from kinema.data.storage.transient import is_transient, pause_seconds
from kinema.training.checkpoints.store import (
    CARRIED,
    CONFIG,
    SEAL,
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    folder_name,
    read_seal,
)

RUN_FILES = ("rights.json",)
"""What a run that goes on elsewhere needs beside its checkpoints."""
WRITABLE_SCHEMES = tuple(scheme for scheme in REMOTE_SCHEMES if scheme not in ("http", "https"))
Result = TypeVar("Result")


def run_address(text: str, key: str) -> Address:
    """A folder at an address that `key` names; ValueError for one that is none, or that holds a secret."""
    parsed = Address(text)
    if parsed.scheme not in WRITABLE_SCHEMES or str(parsed) != text:
        raise ValueError(
            f"{key}={parsed} must be a folder such as s3://BUCKET/FOLDER that can be written to (it begins with one of "
            f"{', '.join(WRITABLE_SCHEMES)}), without user, password or query: credentials belong into the environment."
        )
    return parsed


class Mirror:
    """A run at an address: its checkpoints and what they need. A folder counts once its seal is there, the last."""

    def __init__(self, address: Address, run_dir: Path, settings: StorageConfig | None = None) -> None:
        """`run_dir` is the same run here, also if it does not exist yet. Nothing is asked of the store now."""
        self.address = address
        self._run_dir, self._settings = run_dir, settings or StorageConfig()
        self._filesystem: Any = None

    @classmethod
    def below(cls, remote: str, run_dir: Path, settings: StorageConfig | None = None) -> "Mirror":
        """That of a run under `checkpoint.remote`, where each has a folder of its name."""
        return cls(Address(run_address(remote, "checkpoint.remote").of(run_dir.name)), run_dir, settings)

    def upload(self, checkpoint: Checkpoint) -> int:
        """Copy a published checkpoint, what it needs before it; returns the bytes, 0 if all is there already.

        OSError when the store does not take it.
        """
        if self._holds(checkpoint.folder):
            return 0
        for name in RUN_FILES:
            if (self._run_dir / name).exists():
                self._put(self._run_dir / name, name)
        carried = [CheckpointStore(self._run_dir / name) for name in CARRIED]
        folders = [store.at(step).folder for store in carried for step in store.steps()]
        return sum(self._send(folder) for folder in (*folders, checkpoint.folder))

    def steps(self, of: str = "") -> list[int]:
        """Steps of all folders that are sealed, oldest first; `of` what the run carries, by default its own."""
        self._files.invalidate_cache()
        seals = self._try(lambda: self._files.glob(self.address.of(f"{of}step-*/{SEAL}")))
        return sorted(int(seal.rsplit("/", 2)[-2].removeprefix("step-")) for seal in seals)

    def bring(self, step: int, only: Collection[str] | None = None) -> Checkpoint:
        """Copy what lies there of a checkpoint as it is, whole or not; `only` these files."""
        found = CheckpointStore(self._run_dir).at(step)
        found.folder.mkdir(parents=True, exist_ok=True)
        folder = self.address.of(found.folder.name)
        for path in self._try(lambda: self._files.ls(folder, detail=False)):
            name = path.rsplit("/", 1)[-1]
            if only is None or name in only:
                self._get(f"{found.folder.name}/{name}", found.folder / name)
        written = self._try(lambda: self._files.modified(f"{folder}/{SEAL}")).timestamp()
        os.utime(found.folder / SEAL, (written, written))
        return found

    def fetch(self, step: int) -> Checkpoint:
        """Publish the checkpoint of a step here, and what it needs; CheckpointError if it is damaged there."""
        for name in CARRIED:
            store = CheckpointStore(self._run_dir / name)
            for carried in self.steps(f"{name}/"):
                if carried not in store.steps():
                    self._adopt(store, carried, f"{name}/")
        for name in RUN_FILES:
            path = self.address.of(name)
            if self._try(functools.partial(self._files.exists, path)):
                self._get(name, self._run_dir / name)
        store = CheckpointStore(self._run_dir)
        self._adopt(store, step)
        shutil.copyfile(store.at(step).folder / CONFIG, self._run_dir / CONFIG)
        return store.announce(step)

    def fetch_newest(self, report: Callable[[str], object]) -> Checkpoint | None:
        """Bring the newest checkpoint that is whole; None if there is none, CheckpointError if all are damaged."""
        damages = []
        for step in reversed(self.steps()):
            try:
                found = self.fetch(step)
            except CheckpointError as error:
                damages.append(f"step {step} of {self.address}: {error}")
                continue
            for line in damages:
                report(f"skipped a damaged checkpoint: {line}")
            report(f"{found.folder.name} was fetched from {self.address}")
            return found
        if damages:
            raise CheckpointError(f"every checkpoint at {self.address} is damaged:\n  " + "\n  ".join(damages))
        return None

    def restore(self, report: Callable[[str], object]) -> None:
        """Bring the newest checkpoint and its configuration into a run folder that has none.

        CheckpointError if the store cannot be asked: a run must not start anew because a network is down.
        """
        if CheckpointStore(self._run_dir).steps():
            return
        try:
            self.fetch_newest(report)
        except OSError as error:
            raise CheckpointError(f"checkpoint.remote: nobody can say what to go on from ({error})") from error

    def _adopt(self, store: CheckpointStore, step: int, of: str = "") -> None:
        aside, folder = store.aside(step), f"{of}{folder_name(step)}"
        aside.mkdir(parents=True, exist_ok=True)
        self._get(f"{folder}/{SEAL}", aside / SEAL)
        store.adopt(aside, step, lambda name: self._get(f"{folder}/{name}", aside / name))

    def _send(self, folder: Path) -> int:
        """Copy a sealed folder, its seal last; returns the bytes."""
        if self._holds(folder):
            return 0
        files = read_seal(folder)["files"]
        for name in (*files, SEAL):
            self._put(folder / name, f"{self._place(folder)}/{name}")
        return sum(entry["bytes"] for entry in files.values())

    def _holds(self, folder: Path) -> bool:
        seal = self.address.of(f"{self._place(folder)}/{SEAL}")
        self._files.invalidate_cache()
        if not self._try(lambda: self._files.exists(seal)):
            return False
        return self._try(lambda: self._files.cat_file(seal)) == (folder / SEAL).read_bytes()

    def _place(self, folder: Path) -> str:
        """Of a checkpoint's folder, below the address: `step-...`, or `vae/step-...`."""
        return "/".join((*folder.parent.parent.relative_to(self._run_dir).parts, folder.name))

    @property
    def _files(self) -> Any:
        if self._filesystem is None:
            self._filesystem = open_filesystem(self.address, self._settings, "checkpoint.remote")
        return self._filesystem

    def _put(self, path: Path, name: str) -> None:
        target = self.address.of(name)

        def put() -> None:
            if self.address.scheme == "file":
                self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(path), target)

        self._try(put)

    def _get(self, name: str, path: Path) -> None:
        self._try(lambda: self._files.get_file(self.address.of(name), str(path)))

    def _try(self, attempt: Callable[[], Result]) -> Result:
        """Try again while it may help; OSError without the secrets of the address."""
        for failures in range(1, self._settings.retries + 2):
            try:
                return attempt()
            except Exception as error:
                if failures > self._settings.retries or not is_transient(error):
                    problem = self.address.scrub(f"{type(error).__name__}: {error}")
                    raise OSError(f"{self.address}: {problem} (tried {failures} times)") from None
                time.sleep(pause_seconds(self._settings.longest_pause(failures), error))
        raise AssertionError("it returns or raises")


class Uploads:
    """Uploads in a thread of their own, the newest first; what is slow or fails costs no step and is told."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._change = threading.Condition()
        self._waiting: Checkpoint | None = None
        self._busy = False
        self._told: list[dict[str, Any]] = []
        threading.Thread(target=self._run, name="uploads", daemon=True).start()

    def offer(self, checkpoint: Checkpoint) -> None:
        """Upload this checkpoint next; one that still waits is left out."""
        with self._change:
            if self._waiting is not None:
                self._tell(self._waiting.step, "upload left out", "the store takes them more slowly than they come")
            self._waiting = checkpoint
            self._change.notify_all()

    def take_events(self) -> list[dict[str, Any]]:
        """What happened since the last call: {step, event, detail}."""
        with self._change:
            told, self._told = self._told, []
            return told

    def finish(self, seconds: float) -> None:
        """Wait for what is under way, but not longer; what is left is told, and done when the run starts again."""
        with self._change:
            if not self._change.wait_for(lambda: self._waiting is None and not self._busy, seconds):
                waited = f"not finished within {seconds:.0f} s; the same command uploads it again"
                self._tell(self._waiting.step if self._waiting else -1, "upload left out", waited)

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting is not None)
                checkpoint, self._waiting, self._busy = self._waiting, None, True
            assert checkpoint is not None
            began = time.perf_counter()
            try:
                mib = self._mirror.upload(checkpoint) / 2**20
                event = "uploaded", f"{mib:.1f} MiB to {self._mirror.address} in {time.perf_counter() - began:.1f} s"
            except Exception as error:  # whatever a store does, training goes on
                event = "upload failed", f"{type(error).__name__}: {error}"
            with self._change:
                self._tell(checkpoint.step, *event)
                self._busy = False
                self._change.notify_all()

    def _tell(self, step: int, event: str, detail: str) -> None:
        self._told.append({"step": step, "event": event, "detail": detail})

"""Checkpoints at an address (S3, ...): copied there once they are published, fetched where a machine has none."""

import functools
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from kinema.data.address import REMOTE_SCHEMES, Address
from kinema.data.remote import StorageConfig, open_filesystem
from kinema.data.transient import is_transient, pause_seconds
from kinema.training.checkpoint import SEAL, Checkpoint, CheckpointError, CheckpointStore, folder_name, read_seal

RUN_FILES = ("rights.json",)
"""What a run that goes on elsewhere needs beside its checkpoints."""
WRITABLE_SCHEMES = tuple(scheme for scheme in REMOTE_SCHEMES if scheme not in ("http", "https"))
Result = TypeVar("Result")


class Mirror:
    """The checkpoints of one run under `ADDRESS/NAME/`. A folder counts once its seal is there, which comes last."""

    def __init__(self, address: str, run_dir: Path, settings: StorageConfig | None = None) -> None:
        """Nothing is asked of the store yet. ValueError for an address that is none, or that holds a secret."""
        parsed = Address(address)
        if parsed.scheme not in WRITABLE_SCHEMES or str(parsed) != address:
            raise ValueError(
                f"checkpoint.remote={parsed} must be a folder such as s3://BUCKET/FOLDER that can be written to (it "
                f"begins with one of {', '.join(WRITABLE_SCHEMES)}), without user, password or query: credentials "
                "belong into the environment."
            )
        self.address = Address(parsed.of(run_dir.name))
        self._run_dir, self._settings = run_dir, settings or StorageConfig()
        self._filesystem: Any = None

    def upload(self, checkpoint: Checkpoint) -> int:
        """Copy a published checkpoint, its seal last; returns the bytes, 0 if it is there already.

        OSError when the store does not take it.
        """
        files = read_seal(checkpoint.folder)["files"]
        if self._holds(checkpoint):
            return 0
        for name in RUN_FILES:
            if (self._run_dir / name).exists():
                self._put(self._run_dir / name, name)
        for name in (*files, SEAL):
            self._put(checkpoint.folder / name, f"{checkpoint.folder.name}/{name}")
        return sum(entry["bytes"] for entry in files.values())

    def steps(self) -> list[int]:
        """Steps of all folders that are sealed, oldest first."""
        self._files.invalidate_cache()
        seals = self._try(lambda: self._files.glob(self.address.of(f"step-*/{SEAL}")))
        return sorted(int(seal.rsplit("/", 2)[-2].removeprefix("step-")) for seal in seals)

    def fetch_newest(self, store: CheckpointStore, report: Callable[[str], object]) -> Checkpoint | None:
        """Bring the newest checkpoint that is whole into a store that has none; None if there is none here, either.

        Damaged ones are told of; CheckpointError if all are.
        """
        damages = []
        for step in reversed(self.steps()):
            try:
                self._fetch(step, store)
            except ValueError as error:
                damages.append(f"step {step} of {self.address}: {error}")
                continue
            for line in damages:
                report(f"skipped a damaged checkpoint: {line}")
            return store.announce(step)
        if damages:
            raise CheckpointError("every checkpoint at checkpoint.remote is damaged:\n  " + "\n  ".join(damages))
        return None

    def _fetch(self, step: int, store: CheckpointStore) -> None:
        aside, folder = store.aside(step), folder_name(step)
        aside.mkdir(parents=True, exist_ok=True)
        self._get(f"{folder}/{SEAL}", aside / SEAL)
        store.adopt(aside, step, lambda name: self._get(f"{folder}/{name}", aside / name))
        for name in RUN_FILES:
            path = self.address.of(name)
            if self._try(functools.partial(self._files.exists, path)):
                self._get(name, self._run_dir / name)

    def restore(self, store: CheckpointStore, report: Callable[[str], object]) -> None:
        """Bring the newest checkpoint and its configuration into a run folder that has none.

        CheckpointError if the store cannot be asked: a run must not start anew because a network is down.
        """
        if store.steps():
            return
        try:
            found = self.fetch_newest(store, report)
        except OSError as error:
            raise CheckpointError(f"checkpoint.remote: nobody can say what to go on from ({error})") from error
        if found is not None:
            report(f"{found.folder.name} was fetched from {self.address}")
            shutil.copyfile(found.folder / "config.yaml", self._run_dir / "config.yaml")

    def _holds(self, checkpoint: Checkpoint) -> bool:
        seal = self.address.of(f"{checkpoint.folder.name}/{SEAL}")
        self._files.invalidate_cache()
        if not self._try(lambda: self._files.exists(seal)):
            return False
        return self._try(lambda: self._files.cat_file(seal)) == (checkpoint.folder / SEAL).read_bytes()

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

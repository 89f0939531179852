"""From a step and a lane to a pack of decoded clips, or of cached latents."""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from kinema.data.account.refusals import Refusals
from kinema.data.account.rights import RightsPolicy
from kinema.data.dataset.shards import DamagedSample, DatasetIndex
from kinema.data.decode.decoders.video import DecodeError, DecoderDied
from kinema.data.geometry import ClipShape
from kinema.data.packs.pack import Failure, Fallback, Pack
from kinema.data.steps.plan import Plan, Slot


class Contents(Protocol):
    """What packs are filled with: `DecodedClips` or `CachedClips`."""

    kind: str
    """The field of a pack that takes them."""

    def expect(self, slots: Sequence[Slot]) -> Sequence[Any]:
        """What `read` takes for each of these clips, which are read next, and no others."""
        ...

    def read(self, found: Any) -> Any:
        """The contents of one clip; raises DamagedSample or DecodeError."""
        ...

    def blank(self, shape: ClipShape) -> Any:
        """What stands in the place of a clip that could not be read."""
        ...

    def take_counts(self) -> dict[str, float]:
        """What reading from addresses took since the last call."""
        ...

    def take_fallbacks(self) -> list[Fallback]:
        """The clips read since the last call that another decoder read than the first one."""
        ...

    def close(self) -> None:
        """End what was begun."""
        ...


class ClipReader(Dataset):
    """Map-style data set whose items are the packs, by (step, lane)."""

    def __init__(
        self,
        index: DatasetIndex,
        plan: Plan,
        contents: Contents,
        *,
        fps: float,
        rights: RightsPolicy | None = None,
        condemned: Mapping[str, str] | None = None,
    ) -> None:
        self.index, self.plan, self.contents, self.fps = index, plan, contents, fps
        self.refusals = Refusals(rights, index)
        self.condemned = dict(condemned or {})  # keys of clips that killed or hung a process, with the reason
        self.progress = torch.full((1, 3), -1, dtype=torch.int64)
        self.worker = 0

    def start_worker(self, worker: int) -> None:
        """Called in each new worker process."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which then saves
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the handler that was inherited
        torch.set_num_threads(1)
        self.worker = worker
        self.progress[worker, 0] = os.getpid()

    def __getitem__(self, step_and_lane: tuple[int, int]) -> "Pack":
        began = time.perf_counter()
        step, lane = step_and_lane
        slots = self.plan.step(step)[lane]
        numbers = [slot.clip.entry_index for slot in slots]
        keys = [self.index.key(number) for number in numbers]
        failures, withdrawn = [], []
        read: dict[int, Any] = {}  # by place in the pack; the others are blank
        due = []
        for place, (number, key) in enumerate(zip(numbers, keys, strict=True)):
            if reason := self.refusals[number]:
                withdrawn.append(self._failure(number, reason))
            elif key in self.condemned:
                failures.append(self._failure(number, self.condemned[key], fatal=True))
            else:
                due.append(place)
        found = self.contents.expect([slots[place] for place in due])
        watched = self.progress[self.worker].numpy()  # the shared numbers themselves: setting a tensor's costs more
        for place, where in zip(due, found, strict=True):
            watched[1], watched[2] = numbers[place], time.monotonic_ns()
            try:
                read[place] = self.contents.read(where)
            except (DamagedSample, DecodeError) as error:
                reason = error.reason if isinstance(error, DamagedSample) else str(error)
                fatal = isinstance(error, DecoderDied)
                failures.append(self._failure(numbers[place], reason, fatal=fatal))
                if fatal:
                    self.condemned[keys[place]] = reason
            finally:
                watched[1] = -1
        contents = [
            read[place] if place in read else self.contents.blank(slot.clip.shape) for place, slot in enumerate(slots)
        ]
        return Pack(
            step=step,
            lane=lane,
            keys=keys,
            captions=[self.index.text("caption", number) for number in numbers],
            shapes=[slot.clip.shape for slot in slots],
            frames=contents if self.contents.kind == "frames" else None,
            latents=contents if self.contents.kind == "latents" else None,
            weights=torch.tensor([float(place in read) for place in range(len(slots))]),
            cost=sum(slot.clip.cost for slot in slots),
            positions=[slot.position for slot in slots],
            epochs=[slot.epoch for slot in slots],
            failures=failures,
            fps=self.fps,
            seconds=time.perf_counter() - began,
            entries=numbers,
            withdrawn=withdrawn,
            fallbacks=self.contents.take_fallbacks(),
            storage=self.contents.take_counts(),
        )

    def _failure(self, number: int, reason: str, *, fatal: bool = False) -> Failure:
        return Failure(self.index.key(number), self.index.entries[number].shard, reason, fatal)

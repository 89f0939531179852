"""Decoding in a process of its own, with a deadline, a bound on memory, and decoders that step in."""

import math
import mmap
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kinema.data.decode.decoders.video import DecodeError, Decoder, DecoderDied
from kinema.data.decode.decoding import check_installed, decode_clip
from kinema.data.decode.isolation import CallDied, CallKilled, Isolated
from kinema.data.geometry import ClipShape

OVERHEAD_MIB = 1024
"""Of a decoding process beside pictures: libraries, the file, the decoder's own frames."""
RENEW_AFTER = 10_000
"""Clips; torchcodec 0.13 leaks about a kilobyte with each."""


@dataclass(frozen=True)
class DecodingRules:
    """Which decoder reads clips, which step in for it, and what a clip may take."""

    decoder: Decoder = Decoder.decord
    fallback: Sequence[Decoder] = ()
    timeout_seconds: float = 30.0
    """For one clip with one decoder."""
    max_mib: float = 4096.0
    """Of the frames of one clip at their full size, as RGB."""

    @property
    def decoders(self) -> list[Decoder]:
        """All of them, in the order in which they are tried."""
        return [self.decoder, *self.fallback]


class Decoded(NamedTuple):
    """A clip, and who decoded it."""

    frames: Tensor
    """uint8 (T, H, W, 3) RGB."""
    decoder: Decoder
    refusals: list[tuple[Decoder, str]]
    """Decoders that were tried before, and why each failed."""


class ClipDecoder:
    """`decode_clip` in another process, by the first decoder that can."""

    def __init__(self, rules: DecodingRules) -> None:
        self.rules = rules
        self._buffer = mmap.mmap(-1, 1)
        self._process: Isolated | None = None

    def decode(
        self, mp4: bytes, shape: ClipShape, fps: float, start_seconds: float, crop: tuple[float, float] = (0.5, 0.5)
    ) -> Decoded:
        """As `decode_clip`; raises DecodeError with the decoders' reasons, DecoderDied if one of them died.

        A decoder whose process somebody else killed is tried once more: the kernel takes any process where memory is
        short, so that one such death accuses no clip. It stands among the refusals.
        """
        refusals: list[tuple[Decoder, str]] = []
        died = False
        due = deque(self.rules.decoders)
        while due:
            decoder = due.popleft()
            try:
                frames = self._decode_with(decoder, shape, (mp4, shape, fps, start_seconds, decoder, crop))
            except DecodeError as error:
                if isinstance(error.__cause__, CallKilled) and decoder not in (tried for tried, _ in refusals):
                    due.appendleft(decoder)
                else:
                    died |= isinstance(error, DecoderDied)
                refusals.append((decoder, str(error)))
            else:
                return Decoded(frames, decoder, refusals)
        kind = DecoderDied if died else DecodeError
        raise kind("; ".join(dict.fromkeys(reason for _, reason in refusals)))

    def close(self) -> None:
        """End the other process."""
        if self._process is not None:
            self._process.close()

    def _decode_with(self, decoder: Decoder, shape: ClipShape, request: tuple[Any, ...]) -> Tensor:
        size = math.prod(shape) * 3
        try:
            self._process_for(size)(*request)
        except CallDied as error:
            raise DecoderDied(f"{decoder.name}: decoding it {error}") from error
        return torch.frombuffer(self._buffer, dtype=torch.uint8, count=size).view(*shape, 3).clone()

    def _process_for(self, size: int) -> Isolated:
        """The process, which shares with this one a buffer of at least `size` bytes."""
        if self._process is None or size > len(self._buffer):
            self.close()
            for decoder in self.rules.decoders:
                check_installed(decoder)  # here, so that a process that replaces a dead one need not import it again
            self._buffer = mmap.mmap(-1, size)
            function = partial(_decode_into, self._buffer, self.rules.max_mib)
            memory = 2 * self.rules.max_mib + OVERHEAD_MIB
            self._process = Isolated(function, self.rules.timeout_seconds, memory, RENEW_AFTER)
        return self._process


def _decode_into(buffer: mmap.mmap, max_mib: float, *request: Any) -> None:
    mp4, shape, fps, start_seconds, decoder, crop = request
    frames = decode_clip(mp4, shape, fps, start_seconds, decoder, crop=crop, max_mib=max_mib)
    np.frombuffer(buffer, np.uint8, frames.numel())[:] = frames.flatten().numpy()

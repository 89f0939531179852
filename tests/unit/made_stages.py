"""Stages for the tests of the pipeline engine; worker processes import this file, so it imports little."""

import os
import signal
import time
from dataclasses import dataclass

from data_prep.pipeline.rows import Dropped, RowFailed
from data_prep.pipeline.stage import Stage


@dataclass
class Square(Stage):
    """Squares numbers; some rows misbehave as real decoders do."""

    calls: str = ""
    """A file that gets one letter for each row worked on."""

    def apply(self, row, place):
        if self.calls:
            with open(self.calls, "a") as file:
                file.write("x")
        match row.get("misbehave"):
            case "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "hang":
                signal.pause()
            case "fail":
                raise RowFailed("odd: nobody knows why")
            case "memory":
                bytearray(2**31)
            case "bug":
                raise KeyError("caption")
        if row["n"] % 5 == 4:
            return [Dropped(row, "a five")]
        return [{**row, "key": f"{row['key']}-{part}", "square": row["n"] ** 2} for part in range(2)]


@dataclass
class Where(Stage):
    """Notes on which node a row was worked on, and waits until all nodes are at work."""

    nodes: int = 2
    seconds: float = 0.0

    def apply(self, row, place):
        mine, until = os.environ["RAY_RAYLET_PID"], time.monotonic() + 60
        place.path_for("x").with_name(f"raylet-{mine}").touch()
        while len(list(place.folder.rglob("raylet-*"))) < self.nodes and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(self.seconds)
        return [{**row, "raylet": mine}]

"""The process that talks to Weights & Biases. It may wait as long as it likes; training neither waits nor ends with it.

Lines of JSON on stdin: first what to start, then records, then null. Trouble is told on stdout; without a connection
the run is kept offline, for `wandb sync`.
"""

import json
import signal
import sys
from typing import Any

INIT_SECONDS = 30


def start(order: dict[str, Any]) -> Any:
    """The Weights & Biases run: as ordered, or offline if its server cannot be had."""
    import wandb

    settings = wandb.Settings(init_timeout=INIT_SECONDS, console="off", x_disable_meta=True, x_disable_stats=True)
    try:
        return wandb.init(**order, settings=settings)
    except Exception as error:
        if order["mode"] != "online":
            raise
        print(f"{type(error).__name__}: {error}. Kept offline: `wandb sync`".replace("\n", " "), flush=True)
        wandb.teardown()
        return wandb.init(**{**order, "mode": "offline"}, settings=settings)


def main() -> None:
    """Until null comes or stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's business
    run, newest = start(json.loads(sys.stdin.readline())), 0
    while record := json.loads(sys.stdin.readline() or "null"):
        newest = max(newest, record["step"])  # of an older step, as a save that has ended, nothing would be taken
        run.log(record["values"], step=newest)
    run.finish()


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        print(f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)
        sys.exit(1)

"""Losses that jump: judged against the steps before, by a measure that single outliers do not move."""

import enum
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


class SpikeAction(enum.Enum):
    """What is done about a step whose loss jumped."""

    ignore = "ignore"
    warn = "warn"
    """Say so."""
    rollback = "rollback"
    """Go back to the newest checkpoint, and on without that step."""
    stop = "stop"
    """End the run with status 70."""


@dataclass
class SpikeConfig:
    """A spike is a loss far above the median of the last steps, in units of their scatter (median deviation)."""

    action: SpikeAction = SpikeAction.warn
    """ignore, warn, rollback or stop."""
    deviations: float = 20.0
    """How far above the median is too far. Losses of few clips a step have heavy tails: less gives false alarms."""
    window: int = 100
    """Steps that a loss is compared with; nothing is judged before half of them have been seen."""

    def __post_init__(self) -> None:
        if self.deviations <= 0:
            raise ValueError(f"guard.spike.deviations={self.deviations} must be positive.")
        if self.window < 10:
            raise ValueError(f"guard.spike.window={self.window} must be at least 10.")


def deviations_above(loss: float, before: Sequence[float]) -> float:
    """(loss - median) over the scaled median absolute deviation of `before`, which equals the deviation of a normal."""
    median = statistics.median(before)
    scatter = 1.4826 * statistics.median(abs(value - median) for value in before)
    return (loss - median) / max(scatter, 1e-3 * abs(median), 1e-12)


def is_spike(config: SpikeConfig, loss: float, before: Sequence[float]) -> float | None:
    """How many deviations above the last steps the loss lies, if that is too far."""
    recent = before[-config.window :]
    if config.action is SpikeAction.ignore or len(recent) < config.window // 2:
        return None
    found = deviations_above(loss, recent)
    return found if found > config.deviations else None

"""What a published config can be here: a rule that it breaks is an error that names the key and its value."""

import numpy as np

from kinema.interop.preset import Record


def fixed_choices(config: Record, **choices: object) -> None:
    """ValueError when a config of the reference has another value than the only one that is implemented here."""
    for name, value in choices.items():
        found = list(config[name]) if isinstance(config[name], tuple) else config[name]
        if found != value:
            raise ValueError(f"{name}={found}: only {value} is implemented")


def require(holds: bool, config: Record, key: str, rule: str) -> None:
    """ValueError, `key=value: rule`, unless that holds."""
    if not holds:
        raise ValueError(f"{key}={config[key]}: {rule}")


def shortest(value: float) -> float:
    """The number of fewest decimal digits that is the same float32, as its maker wrote it."""
    return float(str(np.float32(value)))


def width_of(config: Record, prefix: str = "") -> int:
    """Channels of a token: those of all heads."""
    return config[f"{prefix}num_attention_heads"] * config[f"{prefix}attention_head_dim"]


def channels_out(config: Record) -> int:
    """Channels of the head; None stands for as many as go in."""
    return config["out_channels"] or config["in_channels"]


def same_width(config: Record, prefix: str = "") -> None:
    """ValueError unless cross-attention reads captions at the width of the stream."""
    fixed_choices(config, **{f"{prefix}cross_attention_dim": width_of(config, prefix)})


def same_channels(config: Record, prefix: str = "") -> None:
    """ValueError unless as many channels come out as go in."""
    key, given = f"{prefix}out_channels", config[f"{prefix}in_channels"]
    require(config[key] in (None, given), config, key, f"only None or {prefix}in_channels, {given}, is implemented")

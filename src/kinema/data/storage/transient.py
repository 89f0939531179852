"""Which failures of a network pass, and how long to wait until then."""

import asyncio
import random
import sys

from kinema.data.storage.store import WrongBytes

LONGEST_PAUSE_SECONDS = 30.0
_jitter = random.SystemRandom()  # not the generator that anything else draws from


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    import aiohttp

    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status in (408, 425, 429) or status >= 500
    types: tuple[type[BaseException], ...] = (OSError, asyncio.TimeoutError, aiohttp.ClientError, WrongBytes)
    if botocore := sys.modules.get("botocore.exceptions"):
        types = (*types, botocore.HTTPClientError)
    return isinstance(error, types) and not is_refusal(error)


def is_refusal(error: Exception) -> bool:
    """Whether asking again is no use: the file is not there, or not for us."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return not is_transient(error)
    if (botocore := sys.modules.get("botocore.exceptions")) and isinstance(error, botocore.BotoCoreError):
        return not isinstance(error, botocore.HTTPClientError)  # no credentials, for example
    return isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError)


def pause_seconds(longest: float, error: Exception) -> float:
    """Between nothing and the longest pause, so that many workers do not come back at once; or as the server asks."""
    asked = (getattr(error, "headers", None) or {}).get("Retry-After", "")
    if asked.isdigit():
        return min(float(asked), LONGEST_PAUSE_SECONDS)
    return _jitter.uniform(0, longest)

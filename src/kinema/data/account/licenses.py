"""Licences as clips state them: SPDX expressions, https://spdx.org/licenses, checked by the `packaging` library."""

import re
from functools import lru_cache

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

UNSTATED = "unknown"
"""What a record says when nobody stated its licence."""


@lru_cache(maxsize=4096)
def is_known(license: str) -> bool:
    """Whether it is an SPDX expression (LicenseRef-... included), or openly `unknown`."""
    if license == UNSTATED:
        return True
    try:
        canonicalize_license_expression(license)
    except InvalidLicenseExpression:
        return False
    return True


@lru_cache(maxsize=4096)
def licenses_named(expression: str) -> tuple[str, ...]:
    """The licences in `A AND (B OR C WITH D)`: A, B, `C WITH D`; any other text is one licence."""
    parts = re.split(r"[()]|\s(?:AND|OR)\s", f" {expression} ")
    return tuple(part.strip() for part in parts if part.strip()) if is_known(expression) else (expression,)

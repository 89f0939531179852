"""Addresses of remote data sets: joined, and shown without what is secret in them."""

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit, urlunsplit

from braceexpand import braceexpand

REMOTE_SCHEMES = ("file", "http", "https", "s3", "gs", "hf")
"""Address schemes that data.path may have, or another key for a folder; never `pipe`, which runs commands."""
HIDDEN = "***"


@dataclass(frozen=True)
class Address:
    """A folder at some server, e.g. https://HOST/FOLDER?token=..., as a person typed it."""

    text: str

    @classmethod
    def parse(cls, text: str, key: str = "data.path") -> "Address | None":
        """The address, or None for a plain path; ValueError that names `key` for a scheme outside REMOTE_SCHEMES."""
        scheme, colon, _ = text.partition(":")
        if not colon:
            return None
        if scheme not in REMOTE_SCHEMES:
            raise ValueError(
                f"{key}={redacted(text)} must be a folder, or begin with one of {', '.join(REMOTE_SCHEMES)}."
            )
        return cls(text)

    @property
    def scheme(self) -> str:
        """`https`, `s3`, ..."""
        return self.text.partition(":")[0]

    @property
    def name(self) -> str:
        """Last part of the folder's path."""
        return urlsplit(self.text).path.rstrip("/").rsplit("/", 1)[-1] or urlsplit(self.text).netloc.rsplit("@")[-1]

    def split_tars(self) -> tuple["Address", list[str]]:
        """The folder, and the names of an address such as .../part-{000..099}.tar; no names for any other."""
        parts = urlsplit(self.text)
        folder, _, last = parts.path.rpartition("/")
        if not last.endswith(".tar"):
            return self, []
        return Address(urlunsplit(parts._replace(path=folder))), list(braceexpand(last))

    def of(self, file: str) -> str:
        """Address of a file in the folder: the query, if any, stays at the end."""
        parts = urlsplit(self.text)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{file}"))

    def __str__(self) -> str:
        return redacted(self.text)

    def scrub(self, text: str) -> str:
        """A message of some library without the secrets of this address."""
        parts = urlsplit(self.text)
        secrets = [parts.query, parts.netloc.rpartition("@")[0], parts.password or "", parts.fragment]
        secrets += [pair.partition("=")[2] for pair in parts.query.split("&")]
        for secret in sorted({form for s in secrets for form in (s, unquote(s)) if len(form) > 3}, key=len)[::-1]:
            text = text.replace(secret, HIDDEN)
        return text


def redacted(text: str) -> str:
    """Any text, every address in it without user, password, query and fragment."""
    return re.sub(r"\w+://[^\s'\"]+", lambda found: _shown(found[0]), text)


def _shown(address: str) -> str:
    parts = urlsplit(address)
    if not (parts.query or parts.fragment or "@" in parts.netloc):
        return address
    host = parts.netloc.rpartition("@")[2]
    shown = parts._replace(netloc=f"{HIDDEN}@{host}" if "@" in parts.netloc else host)
    return urlunsplit(shown._replace(query=HIDDEN if parts.query else "", fragment=HIDDEN if parts.fragment else ""))

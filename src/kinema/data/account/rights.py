"""What of a data set may be used: the policy `data.rights`, and whether a clip's bytes say what its index says."""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import translate
from functools import cached_property
from pathlib import Path
from typing import Any

from kinema.data.account.licenses import UNSTATED, licenses_named
from kinema.data.dataset.sample import CONSENT, GENERATED, ClipRecord

STATED = ("source", "license", "consent", "attribution", "source_url", "collected", "generated", "generator")
"""Fields of a record that state where a clip comes from and what may be done with it."""


@dataclass
class RightsConfig:
    """What may be used. In all lists `*` and `?` stand for any letters, and licences match in any case.

    The clip must pass every line. Of a licence such as `A AND B` or `A OR B` every part must pass.
    """

    allowed_licenses: list[str] = field(default_factory=lambda: ["*"])
    """Licences as the clips state them, e.g. [CC0-1.0,CC-BY-*]; "*" allows all, even `unknown`."""
    denied_licenses: list[str] = field(default_factory=list)
    """Never these, although allowed_licenses has them, e.g. ["*-NC-*","*-ND-*"], which CC-BY-* lets pass."""
    allowed_consent: list[str] = field(default_factory=lambda: ["*"])
    """What the clips state about the people seen, e.g. [given,none-visible,synthetic]."""
    allowed_generated: list[str] = field(default_factory=lambda: list(GENERATED))
    """How much a generative model may have made: of no, partly, fully, unknown."""
    excluded_sources: list[str] = field(default_factory=list)
    """Sources that were withdrawn, or that are not wanted."""
    excluded_keys: list[str] = field(default_factory=list)
    """Keys of clips that were withdrawn, or that are not wanted."""
    excluded_keys_file: str | None = None
    """A text file with more of them, one a line; lines that begin with # are remarks."""

    def __post_init__(self) -> None:
        for name in ("allowed_licenses", "allowed_consent", "allowed_generated"):
            if not getattr(self, name):
                raise ValueError(f'data.rights.{name}=[] allows no clip. Type ["*"] to allow all.')
        for word in self.allowed_generated:
            if word not in (*GENERATED, "*"):
                truth = ' In YAML a bare no is a truth value: type ["no"].' if word in ("False", "True") else ""
                raise ValueError(
                    f"data.rights.allowed_generated: {word!r} must be one of {', '.join(GENERATED)}.{truth}"
                )
        for word in self.allowed_consent:
            if near := _slip_of(word, CONSENT):
                raise ValueError(
                    f"data.rights.allowed_consent: {word!r} is no usual word. Did you mean {near}? A word of your own "
                    f"that is so like it is typed with a star, {word}*."
                )

    def policy(self) -> "RightsPolicy":
        """The policy with the file of keys read; ValueError if it cannot be."""
        keys = [*self.excluded_keys, *_lines_of(self.excluded_keys_file)]
        return RightsPolicy(
            tuple(self.allowed_licenses),
            tuple(self.denied_licenses),
            tuple(self.allowed_consent),
            tuple(self.allowed_generated),
            tuple(self.excluded_sources),
            tuple(dict.fromkeys(keys)),
        )


@dataclass(frozen=True)
class RightsPolicy:
    """`data.rights`, resolved: plain words that go into checkpoints, and the questions that they answer.

    Each answer is the reason of a refusal, or None; asked once for each distinct value, they serve any number of clips.
    """

    allowed_licenses: tuple[str, ...] = ("*",)
    denied_licenses: tuple[str, ...] = ()
    allowed_consent: tuple[str, ...] = ("*",)
    allowed_generated: tuple[str, ...] = GENERATED
    excluded_sources: tuple[str, ...] = ()
    excluded_keys: tuple[str, ...] = ()

    def refusal(self, record: ClipRecord) -> str | None:
        """Why this clip may not be used, naming the key of the configuration that says so."""
        return (
            self.refused_license(record.license)
            or self.refused_consent(record.consent)
            or self.refused_generated(record.generated)
            or self.refused_source(record.source)
            or self.refused_key(record.key)
        )

    def refused_license(self, license: str) -> str | None:
        """Of an expression every part must be allowed, and none denied."""
        parts = licenses_named(license)
        if not all(self._allowed_license(part) for part in parts):
            return f"license {license} not in data.rights.allowed_licenses"
        if any(self._denied_license(part) for part in parts):
            return f"license {license} in data.rights.denied_licenses"
        return None

    def refused_consent(self, consent: str) -> str | None:
        """A word of sample.CONSENT, or another."""
        return None if self._consent(consent) else f"consent {consent} not in data.rights.allowed_consent"

    def refused_generated(self, generated: str) -> str | None:
        """A word of sample.GENERATED."""
        return None if self._generated(generated) else f"generated {generated} not in data.rights.allowed_generated"

    def refused_source(self, source: str) -> str | None:
        """By the name that the records state."""
        return f"source {source} in data.rights.excluded_sources" if self._source(source) else None

    def refused_key(self, key: str) -> str | None:
        """By the clip's own key; the reason does not name it, so that reasons can be counted."""
        return "key in data.rights.excluded_keys" if self._key(key) else None

    def to_dict(self) -> dict[str, list[str]]:
        """Plain values, ready for json."""
        return {name: list(words) for name, words in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, list[str]]) -> "RightsPolicy":
        """The policy that gave these values."""
        return cls(**{name: tuple(words) for name, words in values.items()})

    @cached_property
    def _allowed_license(self) -> "_Matcher":
        return _Matcher(self.allowed_licenses, any_case=True)

    @cached_property
    def _denied_license(self) -> "_Matcher":
        return _Matcher(self.denied_licenses, any_case=True)

    @cached_property
    def _consent(self) -> "_Matcher":
        return _Matcher(self.allowed_consent)

    @cached_property
    def _generated(self) -> "_Matcher":
        return _Matcher(self.allowed_generated)

    @cached_property
    def _source(self) -> "_Matcher":
        return _Matcher(self.excluded_sources)

    @cached_property
    def _key(self) -> "_Matcher":
        return _Matcher(self.excluded_keys)


def contradiction(record: ClipRecord, stated: bytes) -> str | None:
    """How the json beside a clip differs from the index's record in what it states of rights; None if it does not.

    Only fields that both have are compared: other programs' shards may state less, or under other names.
    """
    try:
        values: Any = json.loads(stated)
    except ValueError as error:
        return f"the json in the tar is not json ({error})"
    if not isinstance(values, dict):
        return "the json in the tar is no object"
    for name in STATED:
        if name in values and (values[name] or UNSTATED) != (getattr(record, name) or UNSTATED):
            return f"the tar says {name}={values[name]!r}, the index {getattr(record, name)!r}"
    return None


def idle_words(
    policy: RightsPolicy, licenses: Iterable[str], sources: Iterable[str], keys: Iterable[str]
) -> str | None:
    """Words of a policy that fit no clip at all, as a line for people: a slip in a withdrawal would go unseen.

    Given are the distinct licences and sources of all clips, and their keys, which are asked for only if need be.
    """
    parts = [part for license in licenses for part in licenses_named(license)]
    idle = []
    for name, found in (
        ("allowed_licenses", parts),
        ("denied_licenses", parts),
        ("excluded_sources", sources),
        ("excluded_keys", keys),
    ):
        words = [word for word in getattr(policy, name) if word != "*"]
        words = _unfitted(words, found, any_case=found is parts)
        idle += [f"{name} {first_few(words)}"] if words else []
    return f"no clip has what data.rights names: {'; '.join(idle)}. Is it written as in the records?" if idle else None


def _unfitted(words: Sequence[str], names: Iterable[str], *, any_case: bool) -> list[str]:
    """The words that fit none of these names, of which millions may be: each is seen once and not kept."""
    left = {word: _Matcher([word], any_case=any_case) for word in words}
    all_left = _Matcher(left, any_case=any_case)
    for name in names if left else ():
        if all_left(name):
            left = {word: fits for word, fits in left.items() if not fits(name)}
            all_left = _Matcher(left, any_case=any_case)
            if not left:
                break
    return list(left)


def first_few(keys: Sequence[str], few: int = 5) -> str:
    """`a, b, c, ...`"""
    return ", ".join(keys[:few]) + (", ..." if len(keys) > few else "")


class _Matcher:
    """Whether a word is one of a list, in which `*` and `?` stand for any letters."""

    def __init__(self, patterns: Iterable[str], *, any_case: bool = False) -> None:
        self.any_case = any_case
        patterns = [pattern.casefold() if any_case else pattern for pattern in patterns]
        wild = [pattern for pattern in patterns if set("*?") & set(pattern)]
        self.words = frozenset(patterns).difference(wild)
        self.wild = re.compile("|".join(translate(pattern.replace("[", "[[]")) for pattern in wild)) if wild else None

    def __call__(self, word: str) -> bool:
        word = word.casefold() if self.any_case else word
        return word in self.words or bool(self.wild and self.wild.fullmatch(word))


def _slip_of(word: str, usual: Sequence[str]) -> str | None:
    """The usual word that this one is nearly but not quite, if it has no stars."""
    if word in usual or set("*?") & set(word):
        return None
    return next(iter(difflib.get_close_matches(word, usual, n=1)), None)


def _lines_of(file: str | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.rights.excluded_keys_file={file} cannot be read ({error}).") from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]

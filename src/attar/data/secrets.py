"""Secrets and personal data in text: found by declared patterns, replaced by placeholders.

Patterns miss what nobody declared; they are a net, not a proof. Each kind is chosen for few false alarms: a key has its
issuer's prefix and length, a card has an issuer's prefix and a right check digit (ISO/IEC 7812-1, Luhn), a phone number
has a country code or the punctuation of one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

__all__ = ["KINDS", "Found", "find", "redact"]

# A literal that every match holds -> the pattern, so that text without the literal costs one search in C.
_KEYS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (hint, re.compile(pattern))
    for hint, pattern in (
        ("sk-", r"\bsk-(?:ant-|proj-|or-v1-|svcacct-)?[A-Za-z0-9_-]{20,}"),
        ("sk_live_", r"\bsk_live_[A-Za-z0-9]{16,}"),
        ("rk_live_", r"\brk_live_[A-Za-z0-9]{16,}"),
        ("AKIA", r"\bAKIA[0-9A-Z]{16}\b"),
        ("ASIA", r"\bASIA[0-9A-Z]{16}\b"),
        ("AIza", r"\bAIza[0-9A-Za-z_-]{35}\b"),
        ("gh", r"\bgh[pousr]_[A-Za-z0-9]{36,}\b"),
        ("github_pat_", r"\bgithub_pat_[A-Za-z0-9_]{22,}\b"),
        ("glpat-", r"\bglpat-[A-Za-z0-9_-]{20,}"),
        ("xox", r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"),
        ("hf_", r"\bhf_[A-Za-z0-9]{30,}\b"),
        ("npm_", r"\bnpm_[A-Za-z0-9]{36}\b"),
        ("pypi-", r"\bpypi-[A-Za-z0-9_-]{50,}"),
        ("SG.", r"\bSG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"),
        ("eyJ", r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
        ("PRIVATE KEY", r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"),
        ("://", r"(?<=://)[^\s/:@]{1,64}:[^\s/:@]{3,128}(?=@)"),
    )
)
_EMAIL = re.compile(r"\b[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
# 13 to 19 digits, single blanks or hyphens between them, of an issuer: Visa, Mastercard, American Express, Discover.
_CARD = re.compile(r"(?<![\d.,-])(?:4|5[1-5]|2[2-7]|3[47]|6(?:011|5))(?:[ -]?\d){11,18}(?![\d.,]?\d)")
_PHONE = re.compile(
    r"(?<![\w.+])(?:\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,5}|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4})"
    r"(?!\w|[.-]\d)"
)


class Found(NamedTuple):
    """A stretch of a text, and of what kind it is."""

    start: int
    end: int
    kind: str


def _keys(text: str) -> Iterator[Found]:
    for hint, pattern in _KEYS:
        if hint in text:
            for match in pattern.finditer(text):
                yield Found(match.start(), match.end(), "key")


def _luhn(digits: str) -> bool:
    doubled = (sum(divmod(2 * int(d), 10)) for d in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def _cards(text: str) -> Iterator[Found]:
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if 13 <= len(digits) <= 19 and _luhn(digits):
            yield Found(match.start(), match.end(), "card")


def _emails(text: str) -> Iterator[Found]:
    if "@" in text:
        for match in _EMAIL.finditer(text):
            yield Found(match.start(), match.end(), "email")


def _phones(text: str) -> Iterator[Found]:
    for match in _PHONE.finditer(text):
        if 9 <= sum(character.isdigit() for character in match[0]) <= 15:
            yield Found(match.start(), match.end(), "phone")


KINDS = {"key": _keys, "card": _cards, "email": _emails, "phone": _phones}
"""What is known, by kind; where two overlap the first counts."""


def find(text: str, kinds: tuple[str, ...], own: Mapping[str, re.Pattern[str]] | None = None) -> list[Found]:
    """Secrets and personal data in a text, in its order, without overlaps.

    Args:
        text: any text.
        kinds: keys of ``KINDS``.
        own: further patterns, by the kind that they stand for; they give way to ``kinds``.
    """
    found = [hit for kind in kinds for hit in KINDS[kind](text)]
    for kind, pattern in (own or {}).items():
        found += [Found(match.start(), match.end(), kind) for match in pattern.finditer(text) if match[0]]
    if len(found) < 2:
        return found
    order = [*kinds, *(own or {})]
    kept: list[Found] = []
    for hit in sorted(found, key=lambda hit: (order.index(hit.kind), hit.start)):
        if all(hit.end <= other.start or other.end <= hit.start for other in kept):
            kept.append(hit)
    return sorted(kept)


def redact(text: str, found: list[Found]) -> str:
    """The text with each stretch that was found replaced by its kind in brackets, ``[KEY]``."""
    for hit in reversed(found):
        text = f"{text[: hit.start]}[{hit.kind.upper()}]{text[hit.end :]}"
    return text

"""Answers whose text says whether they are right: a pattern, or the right answer itself."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import regex

from attar.collect.verify.verdict import Verdict, Verifier, wanted
from attar.data.types import Conversation
from attar.recipe import verify as recipe

__all__ = ["exact", "pattern"]

# A pattern may take exponential time on a text that nobody foresaw; Python's own `re` cannot be stopped.
_SECONDS = 5.0
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d*)?(?:[eE][-+]?\d{1,4})?")
# More digits are no answer, and cost time.
_DIGITS = 1000


def pattern(part: recipe.Regex) -> Verifier:
    """Whether a pattern stands in the answer's text."""
    compiled = regex.compile(part.pattern)

    def verify(conversation: Conversation, row: Mapping[str, Any]) -> Verdict:
        del row
        try:
            found = compiled.search(conversation.messages[-1].content, timeout=_SECONDS)
        except TimeoutError:
            return Verdict(False, "pattern took too long")
        return Verdict(True) if found else Verdict(False, "no match")

    return verify


def exact(part: recipe.Exact) -> Verifier:
    """Whether the answer, found by a pattern or the whole text, is the one in the prompt's row.

    An answer that names the right one among others is not right: the whole text, or the last match, is compared.
    """
    compiled = None if part.pattern is None else regex.compile(part.pattern)

    def verify(conversation: Conversation, row: Mapping[str, Any]) -> Verdict:
        reference = wanted(row, part.key)
        if reference is None:
            return Verdict(False, f"no {part.key} in the row")
        text = conversation.messages[-1].content
        if compiled is not None:
            try:
                found = compiled.findall(text, timeout=_SECONDS)
            except TimeoutError:
                return Verdict(False, "pattern took too long")
            if not found:
                return Verdict(False, "no answer found")
            text = found[-1] if isinstance(found[-1], str) else found[-1][0]
        references = reference if isinstance(reference, (list, tuple)) else [reference]
        right = any(_normalised(text, part.compare) == _normalised(_written(r), part.compare) for r in references)
        return Verdict(True) if right else Verdict(False, "another answer")

    return verify


def _written(reference: Any) -> str:
    """A reference as an answer would write it."""
    return str(reference).lower() if isinstance(reference, bool) else str(reference)


def _normalised(text: str, compare: str) -> str | Decimal:
    text = text.strip()
    if compare == "verbatim":
        return text
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).casefold().removesuffix(".").strip()
    if compare == "number":
        bare = text.replace("\N{MINUS SIGN}", "-").lstrip("$€£¥ ").rstrip()
        if len(bare) <= _DIGITS and _NUMBER.fullmatch(bare):
            return Decimal(bare.replace(",", ""))
    return text

"""Answers that a student should not learn: cut off, taken back by a filter, rejected, unfinished, refusing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from attar.collect.rows import Row
from attar.data.types import Conversation

__all__ = ["Refusals", "filtered", "rejected", "truncated", "unfinished"]

# What OpenAI's and Anthropic's answers say of a cut at the token limit, and of what their filters took.
_CUT = ("length", "max_tokens")
_FILTERED = ("content_filter", "refusal")
_FENCE = re.compile(r"^\s*(?:```|~~~)", re.MULTILINE)


def _learned(row: Row) -> Iterator[tuple[int, str]]:
    """Position and content of each answer that is learned."""
    if isinstance(row.example, Conversation):
        for i, message in enumerate(row.example.messages):
            if message.role == "assistant" and message.train is not False:
                yield i, message.content


def _ended(row: Row) -> Iterator[tuple[str, Any]]:
    """How answers ended, as the row, its ``meta`` and its messages say, and where each says it."""
    meta = row.raw.get("meta")
    told = [("", row.raw), ("meta.", meta if isinstance(meta, dict) else {})]
    for where, part in (*told, *((f"messages[{i}].", m) for i, m in enumerate(row.raw["messages"]))):
        for key in ("finish_reason", "stop_reason"):
            if (value := part.get(key)) is not None:
                yield f"{where}{key} is {value!r}", value


def truncated(row: Row) -> tuple[str, str] | None:
    """Drop a row with an answer that hit a token limit."""
    return next((("truncated", said) for said, value in _ended(row) if value in _CUT), None)


def filtered(row: Row) -> tuple[str, str] | None:
    """Drop a row with an answer that a provider's filter took, or that its API marks as a refusal."""
    return next((("content filter", said) for said, value in _ended(row) if value in _FILTERED), None)


def rejected(row: Row) -> tuple[str, str] | None:
    """Drop a row that generation rejected: its folder holds those too, with the reason."""
    meta = row.raw.get("meta")
    if isinstance(meta, dict) and "prompt_id" in meta and meta.get("reason") is not None:
        return "rejected", f"meta.reason is {meta['reason']!r}"
    return None


def unfinished(row: Row) -> tuple[str, str] | None:
    """Drop a row with an answer that opens a code fence and does not close it, or begins as JSON and is none."""
    for i, content in _learned(row):
        if len(_FENCE.findall(content)) % 2:
            return "unfinished", f"messages[{i}]: a code fence is open"
        if content.lstrip().startswith(("{", '["', "[{")):
            try:
                json.loads(content)
            except ValueError as error:
                return "unfinished", f"messages[{i}] begins as JSON and is none ({error})"
    return None


class Refusals:
    """Drops a row with an answer that begins as a refusal."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self._patterns = [re.compile(pattern, re.IGNORECASE) for pattern in patterns]

    def __call__(self, row: Row) -> tuple[str, str] | None:
        """Match the beginnings of answers."""
        for i, content in _learned(row):
            beginning = content.lstrip()
            for number, pattern in enumerate(self._patterns):
                if match := pattern.match(beginning):
                    return "refusal", f"messages[{i}] begins {match[0]!r} (curate.refusal_patterns[{number}])"
        return None

"""Answers that a student should not learn: cut off, unfinished, refusing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from attar.collect.rows import Row
from attar.data.types import Conversation

__all__ = ["Refusals", "truncated", "unfinished"]

# What OpenAI's and Anthropic's answers say of a cut at the token limit.
_CUT = ("length", "max_tokens")
_FENCE = re.compile(r"^\s*(?:```|~~~)", re.MULTILINE)


def _learned(row: Row) -> Iterator[tuple[int, str]]:
    """Position and content of each answer that is learned."""
    if isinstance(row.example, Conversation):
        for i, message in enumerate(row.example.messages):
            if message.role == "assistant" and message.train is not False:
                yield i, message.content


def truncated(row: Row) -> tuple[str, str] | None:
    """Drop a row that says of itself, or of one of its messages, that the answer hit a token limit."""
    for where, part in (("", row.raw), *((f"messages[{i}].", m) for i, m in enumerate(row.raw["messages"]))):
        for key in ("finish_reason", "stop_reason"):
            if part.get(key) in _CUT:
                return "truncated", f"{where}{key} is {part[key]!r}"
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

"""The shapes of what is asked: examples and prompts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Example", "Part", "Prompt"]


@dataclass(frozen=True)
class Example:
    """One request to learn from or to be tested on; ``label`` is the gold label, if one is known."""

    text: str
    label: str | None = None

    @property
    def id(self) -> str:
        """Hash of the content, so that the same request is the same example in every run."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


class Part(NamedTuple):
    """A stretch of a prompt. Only a trusted one (from the recipe) may hold control tokens."""

    text: str
    trusted: bool


Prompt = tuple[Part, ...]

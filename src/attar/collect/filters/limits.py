"""Length and language."""

from __future__ import annotations

from typing import Any

from attar.collect.rows import Row, spoken
from attar.errors import RecipeError, require
from attar.recipe.curate import Length as Limits

__all__ = ["Language", "Length"]

# Fewer letters tell no language; such a row stays.
_LETTERS = 20


class Length:
    """Drops what says less or more than the limits, in characters."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def __call__(self, row: Row) -> tuple[str, str] | None:
        """Count the characters of prompts and answers."""
        prompt, answers = spoken(row.example)
        size, limits = len(prompt) + len(answers), self._limits
        if limits.min_characters is not None and size < limits.min_characters:
            return "too short", f"{size} characters, curate.length.min_characters is {limits.min_characters}"
        if limits.max_characters is not None and size > limits.max_characters:
            return "too long", f"{size} characters, curate.length.max_characters is {limits.max_characters}"
        return None


class Language:
    """Drops what is in another language, as `py3langid` tells it (langid.py; Lui and Baldwin, 2012)."""

    def __init__(self, codes: tuple[str, ...]) -> None:
        self._codes = codes
        module: Any = require("py3langid.langid", "language")
        self._identifier = module.LanguageIdentifier.from_model_file(module.MODEL_FILE)
        known = set(self._identifier.labels)
        if unknown := [code for code in codes if code not in known]:
            raise RecipeError(
                f"curate.languages: {', '.join(unknown)}: not told apart; there are {', '.join(sorted(known))}"
            )

    def __call__(self, row: Row) -> tuple[str, str] | None:
        """Tell the language of prompts and answers together."""
        text = "\n".join(spoken(row.example))
        if sum(map(str.isalpha, text[:1000])) < _LETTERS:
            return None
        code, _ = self._identifier.classify(text)
        return None if code in self._codes else ("language", f"told as {code}, kept are {', '.join(self._codes)}")

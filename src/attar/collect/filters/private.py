"""Secrets and personal data: dropped, redacted or kept, by kind."""

from __future__ import annotations

import re
from collections import Counter

from attar.collect.rows import Row, mapped, strings
from attar.data.secrets import KINDS, Found, Rule, find, matches, redact
from attar.recipe.curate import Private as Settings

__all__ = ["Private"]


class Private:
    """Drops a row, or puts placeholders into it, as the recipe says for each kind."""

    def __init__(self, settings: Settings) -> None:
        policies = {
            "key": settings.keys,
            "card": settings.cards,
            "email": settings.emails,
            "phone": settings.phones,
        }
        own = settings.patterns if settings.patterns_policy != "keep" else {}
        self._rules = [Rule(kind, KINDS[kind]) for kind, policy in policies.items() if policy != "keep"]
        self._rules += [Rule(kind, matches(re.compile(pattern))) for kind, pattern in own.items()]
        self._own = bool(own)
        self._dropped = {kind for kind, policy in policies.items() if policy == "drop"}
        if settings.patterns_policy == "drop":
            self._dropped |= set(own)
        self.redacted: Counter[str] = Counter()
        """how many stretches were replaced, by kind; in rows that a later step drops as well"""

    def _find(self, text: str) -> list[Found]:
        return find(text, self._rules)

    def hide(self, text: str) -> str:
        """A text about a row, without what the row must not show."""
        return redact(text, self._find(text))

    def __call__(self, row: Row) -> tuple[str, str] | None:
        """Look at everything that somebody wrote; the detail names kinds, never what was found."""
        if not self._rules:
            return None
        # Most rows hold nothing, and one long text is searched faster than several short ones; the user's patterns may
        # ask where a text begins.
        if not self._own and not self._find("\n".join(strings(row.example))):
            return None
        found = Counter(hit.kind for text in strings(row.example) for hit in self._find(text))
        if not found:
            return None
        if named := sorted(kind for kind in found if kind in self._dropped):
            return "private", ", ".join(f"{found[kind]} {kind}" for kind in named)
        row.example = mapped(row.example, lambda text: redact(text, self._find(text)))
        self.redacted += found
        return None

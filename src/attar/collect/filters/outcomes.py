"""What was said of a row afterwards: an episode that failed, a score that is too low."""

from __future__ import annotations

from typing import Any

from attar.collect.rows import Row, lookup
from attar.data.files import BadRow
from attar.recipe.curate import Outcome

__all__ = ["Outcomes"]

_FAILED = ("error", "fail", "failed", "failure", "incorrect", "unsolved")
# Under these names `false` is a failure; under others, such as `escalated`, it may be none.
_GOOD = ("completed", "correct", "ok", "passed", "resolved", "solved", "success", "successful", "succeeded")
# Under these names an object says in a word how it ended.
_WORDS = ("outcome", "result", "status", "verdict")


class Outcomes:
    """Drops a row whose outcome says that it failed. A row without one stays."""

    def __init__(self, settings: Outcome) -> None:
        self._settings = settings

    def __call__(self, row: Row) -> tuple[str, str] | None:
        """Look at the outcome.

        Raises:
            BadRow: the recipe wants a number of at least so much, and it is none.
        """
        key, least = self._settings.key, self._settings.at_least
        value = lookup(row.raw, key)
        if value is None:
            return None
        if least is not None and not isinstance(value, bool):
            if not isinstance(value, int | float):
                raise BadRow(
                    "no number", f"{key} is {str(value)[:80]}, curate.outcome.at_least wants a number; see .key"
                )
            return ("failed", f"{key} is {value:g}, curate.outcome.at_least is {least:g}") if value < least else None
        return ("failed", f"{key} is {str(value)[:80]}") if _failed(value) else None


def _failed(value: Any) -> bool:
    if isinstance(value, dict):
        if any(value.get(name) is False for name in _GOOD):
            return True
        return any(isinstance(value.get(name), str) and _failed(value[name]) for name in _WORDS)
    return value is False or (isinstance(value, str) and value.strip().casefold() in _FAILED)

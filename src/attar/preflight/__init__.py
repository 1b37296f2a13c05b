"""What can be known before time is spent (`attar check`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from attar.preflight.findings import Finding
from attar.recipe import Recipe

__all__ = ["Finding", "check"]

# task -> the room that checks it
_ROOMS = {"classify": "attar.preflight.classify", "chat": "attar.preflight.chat"}


def check(recipe: Recipe) -> list[Finding]:
    """Look at everything that a job of the recipe's task can be refused for."""
    checks: Callable[[Recipe], list[Finding]] = importlib.import_module(_ROOMS[recipe.task]).check
    return checks(recipe)

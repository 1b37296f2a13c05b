"""Whether an answer is right, where that can be checked."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attar.collect.verify.json_schema import json_schema
from attar.collect.verify.text import exact, pattern
from attar.collect.verify.unit_tests import unit_tests
from attar.collect.verify.verdict import Verdict, Verifier
from attar.data.types import Conversation
from attar.errors import RecipeError, RunError
from attar.recipe import verify as recipe

__all__ = ["VERIFIERS", "Verdict", "Verifier", "load_verifiers"]


def _function(part: recipe.Function) -> Verifier:
    module, _, name = part.name.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"collect.generate.verify: {part.name} is no function that can be imported ({error})"
        ) from error

    def verify(conversation: Conversation, row: Mapping[str, Any]) -> Verdict:
        said = function(conversation, row)
        if isinstance(said, bool):
            return Verdict(said, "" if said else "not right")
        if isinstance(said, tuple) and len(said) == 2 and isinstance(said[0], bool):
            return Verdict(said[0], str(said[1]))
        raise RunError(f"{part.name} returned {said!r}; a Verdict(ok, reason), or True or False, is wanted")

    return verify


VERIFIERS: dict[str, Callable[[Any], Verifier]] = {
    "function": _function,
    "regex": pattern,
    "exact": exact,
    "json_schema": json_schema,
    "unit_tests": unit_tests,
}
"""From a kind in the recipe to a verifier made of its part."""


def load_verifiers(parts: Sequence[recipe.Verifier]) -> list[tuple[str, Verifier]]:
    """Verifiers and their names, in the recipe's order.

    Raises:
        RecipeError: there is no such function, or a schema is none.
    """
    return [(getattr(part, "name", part.kind), VERIFIERS[part.kind](part)) for part in parts]

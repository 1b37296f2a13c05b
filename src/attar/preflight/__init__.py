"""What can be known before time is spent (`attar check`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from attar.preflight.findings import Finding
from attar.recipe import Recipe
from attar.terms import NO_ADVICE, terms_of

__all__ = ["Finding", "check"]

# task -> the room that checks it
_ROOMS = {"classify": "attar.preflight.classify", "chat": "attar.preflight.chat", "agent": "attar.preflight.agent"}


def check(recipe: Recipe) -> list[Finding]:
    """Look at everything that a job of the recipe's task can be refused for."""
    checks: Callable[[Recipe], list[Finding]] = importlib.import_module(_ROOMS[recipe.task]).check
    return [*checks(recipe), terms_gate(recipe)]


def terms_gate(recipe: Recipe) -> Finding:
    """What the teacher's terms say about training on its answers; a refusal where they forbid some of it."""
    teacher = recipe.teacher
    terms = terms_of(teacher.model, teacher.licence, elsewhere=getattr(teacher, "base_url", None) is not None)
    said = f"teacher.model: {teacher.model}: {terms.words}"
    if terms.use == "restricted" and teacher.terms != "acknowledged":
        return Finding(
            "refuse",
            f"{said}. If you may train on its answers all the same, set teacher.terms: acknowledged. {NO_ADVICE}",
        )
    if terms.use == "free":
        return Finding("ok", said)
    state = " (acknowledged)" if teacher.terms == "acknowledged" else ""
    cure = ", and state teacher.licence" if terms.use == "unknown" and teacher.licence is None else ""
    return Finding("warn", f"{said}{state}. Read them{cure}. {NO_ADVICE}")

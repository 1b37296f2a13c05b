"""From the recipe to an environment."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from attar.agents.environments import Environment, Task
from attar.agents.episodes import Limits
from attar.agents.playing import Stage
from attar.errors import DataError, RecipeError
from attar.recipe import AgentRecipe

__all__ = ["ENVIRONMENTS", "load_environment", "stage_of", "tasks_of"]

ENVIRONMENTS = {
    "bfcl": "attar.agents.bfcl:SingleTurn",
    "bfcl-multi-turn": "attar.agents.bfcl:MultiTurn",
    "office": "attar.agents.office:Office",
}
"""short name -> ``module:Class``"""


def load_environment(recipe: AgentRecipe) -> Callable[[], Environment]:
    """What makes the recipe's environment.

    Raises:
        RecipeError: there is no such class, it does not take these options, or it is no environment.
    """
    part = recipe.environment
    if part is None:
        raise RecipeError("environment: required, but not set; it names what the agent acts in")
    name = ENVIRONMENTS.get(part.use, part.use)
    module, _, rest = name.partition(":")
    try:
        made: Any = getattr(importlib.import_module(module), rest)
    except (ImportError, AttributeError, ValueError) as error:
        built_in = ", ".join(sorted(ENVIRONMENTS))
        raise RecipeError(
            f"environment.use: {part.use!r} is neither one of {built_in} nor a class package.module:Class ({error})"
        ) from error
    options = dict(part.options)
    try:
        first = made(**options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"environment.options: {part.use} does not take {options}: {error}") from error
    if not isinstance(first, Environment):
        wanted = ", ".join(sorted(member for member in vars(Environment) if not member.startswith("_")))
        raise RecipeError(f"environment.use: {part.use} is no environment; it needs {wanted}")
    waiting = [first]
    return lambda: waiting.pop() if waiting else made(**options)


def stage_of(recipe: AgentRecipe, make: Callable[[], Environment]) -> Stage:
    """Where the recipe's episodes are played, and within what."""
    part = recipe.environment
    assert part is not None
    limits = Limits(
        steps=part.steps,
        answer_tokens=part.answer_tokens,
        tokens=part.tokens,
        seconds=part.seconds,
        usd=part.usd,
        call_s=part.call_s,
        result_characters=part.result_characters,
    )
    return Stage(make, limits, part.at_once, recipe.run.seed)


def tasks_of(environment: Environment, split: str, most: int | None = None) -> Sequence[Task]:
    """The tasks of a split, the first ones where not all are wanted.

    Raises:
        DataError: two have the same id.
    """
    tasks = list(environment.tasks(split))[:most]
    seen: set[str] = set()
    for task in tasks:
        if task.id in seen:
            raise DataError(f"environment {environment.name}: two tasks of {split} have the id {task.id!r}")
        seen.add(task.id)
    return tasks

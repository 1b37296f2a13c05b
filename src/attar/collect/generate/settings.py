"""What the recipe asks for, and what of it decides whether stored answers are still right."""

from __future__ import annotations

from typing import Any

from attar.collect.generate.tasks import Task
from attar.engines.base import ChatRequest
from attar.errors import RecipeError
from attar.recipe import Recipe
from attar.recipe.generate import Generate

__all__ = ["answering", "fingerprint", "same_model", "seeded", "settings"]

# What may change: more of the same is asked for, or the same from another place.
_FREE = ("file", "path", "on_bad_line", "questions", "grow")


def settings(recipe: Recipe) -> Generate:
    """The recipe's ``collect.generate``.

    Raises:
        RecipeError: it has none.
    """
    if recipe.collect.generate is None:
        raise RecipeError("collect.generate: required, but not set; docs/generate.md shows one")
    return recipe.collect.generate


def fingerprint(recipe: Recipe) -> dict[str, Any]:
    """What decides whether a stored answer is what would be asked for now; prompts have ids of their own."""
    part, teacher = recipe.model_dump(mode="json")["collect"]["generate"], recipe.teacher
    judge = part["judge"]
    return {
        "teacher.model": teacher.model,
        "teacher.max_tokens": teacher.max_tokens,
        "run.seed": recipe.run.seed if seeded(teacher.model) or part["source"]["kind"] == "seeds" else None,
        **{f"collect.generate.{key}": part[key] for key in ("temperature", "top_p", "refusals", "verify")},
        "collect.generate.source": {k: v for k, v in part["source"].items() if k not in _FREE},
        "collect.generate.judge": judge
        and judge | {"engine": {key: judge["engine"][key] for key in ("model", "max_tokens")}},
    }


def seeded(model: str) -> bool:
    """Whether requests carry a seed: not to servers, of which some refuse it, and whose answers the ledger keeps."""
    return model.partition(":")[0] not in ("openai", "anthropic")


def same_model(recipe: Recipe) -> bool:
    """Whether the judge is the teacher itself."""
    judge = settings(recipe).judge
    return judge is not None and (judge.engine.model, judge.engine.base_url) == (
        recipe.teacher.model,
        recipe.teacher.base_url,
    )


def answering(recipe: Recipe, task: Task, sample: int) -> ChatRequest:
    """The request to answer a prompt, without a seed."""
    part = settings(recipe)
    return ChatRequest(
        task.messages,
        max_tokens=recipe.teacher.max_tokens or 0,
        tools=task.tools,
        temperature=part.temperature,
        top_p=part.top_p,
        sample=sample,
    )

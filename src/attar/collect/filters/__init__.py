"""What a row can be dropped for by itself: one room a filter. A filter is a function of a row that may drop it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from attar.collect.filters import answers, episodes, limits, outcomes, private, tools
from attar.collect.rows import Row
from attar.recipe import AgentRecipe, ChatRecipe, ClassifyRecipe

__all__ = ["Drop", "Filter", "row_filters"]


class Drop(NamedTuple):
    """Why a row is dropped: what it is counted under, and what about this row."""

    reason: str
    detail: str


Filter = Callable[[Row], tuple[str, str] | None]
"""Returns a reason and a detail, or None for a row that stays"""


def row_filters(recipe: ChatRecipe | ClassifyRecipe) -> tuple[list[Filter], private.Private]:
    """The filters that the recipe asks for, in order, and the one among them that counts what it redacts."""
    settings = recipe.curate
    chosen: list[Filter] = []
    if isinstance(recipe, AgentRecipe):
        agent = recipe.curate
        if agent.outcomes == "success":
            chosen.append(episodes.Outcomes())
        if agent.max_steps is not None:
            chosen.append(episodes.Length(agent.max_steps))
        if agent.ungrounded == "drop":
            chosen.append(episodes.ungrounded)
    if isinstance(recipe, ChatRecipe):
        chat = recipe.curate
        chosen.append(answers.rejected)
        if chat.tool_calls == "drop":
            chosen.append(tools.Calls())
        if chat.truncated == "drop":
            chosen.append(answers.truncated)
        if chat.filtered == "drop":
            chosen.append(answers.filtered)
        if chat.outcome.failed == "drop":
            chosen.append(outcomes.Outcomes(chat.outcome))
        if chat.unfinished == "drop":
            chosen.append(answers.unfinished)
        if chat.refusals == "drop":
            chosen.append(answers.Refusals(chat.refusal_patterns))
    if isinstance(recipe, AgentRecipe):
        chosen.append(episodes.Policies(recipe))
    if settings.length.min_characters is not None or settings.length.max_characters is not None:
        chosen.append(limits.Length(settings.length))
    if settings.languages:
        chosen.append(limits.Language(settings.languages))
    hidden = private.Private(settings.private)
    return [*chosen, hidden], hidden

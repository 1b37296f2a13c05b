"""Episodes: how long, how well grounded, and how much of the agent's thoughts and failures is learned."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from attar.collect.rows import Row
from attar.data.types import Conversation, Message
from attar.errors import DataError
from attar.recipe import AgentRecipe
from attar.tokens.policies import Reasoning, with_reasoning, without_failures

__all__ = ["Length", "Policies", "ungrounded"]

# A number, or a name in quotes: what an answer cannot know by itself.
_NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,:]\d+)*")
_QUOTED = re.compile(r"[\"“”«]([^\"“”«»]{2,80})[\"“”»]")


class Length:
    """Drops episodes of too many answers."""

    def __init__(self, most: int) -> None:
        self._most = most

    def __call__(self, row: Row) -> tuple[str, str] | None:
        """Count the agent's messages."""
        assert isinstance(row.example, Conversation)
        steps = sum(message.role == "assistant" for message in row.example.messages)
        return ("too many steps", f"{steps}, curate.max_steps is {self._most}") if steps > self._most else None


def ungrounded(row: Row) -> tuple[str, str] | None:
    """Drops episodes whose last answer states a number, or a name in quotes, that neither user nor tool gave."""
    assert isinstance(row.example, Conversation)
    *before, last = row.example.messages
    if last.role != "assistant" or last.tool_calls:
        return None
    given = " ".join(m.content for m in before if m.role != "assistant").casefold()
    numbers = set(_NUMBER.findall(given))
    for number in _NUMBER.findall(last.content):
        if number not in numbers:
            return "ungrounded answer", "it states a number that neither the user nor a tool gave"
    for name in _QUOTED.findall(last.content):
        if name.casefold() not in given:
            return "ungrounded answer", "it quotes what neither the user nor a tool said"
    return None


class Policies:
    """Changes episodes: shortens reasoning, and takes failed calls that were mended out of what is learned."""

    def __init__(self, recipe: AgentRecipe) -> None:
        self._recipe = recipe
        settings = recipe.curate
        self._reasoning = Reasoning(settings.reasoning.policy, settings.reasoning.tokens)
        self._failure = re.compile(settings.failed_result, re.IGNORECASE)

    def __call__(self, row: Row) -> tuple[str, str] | None:
        """Put the changed episode in the row."""
        assert isinstance(row.example, Conversation)
        try:
            kept = without_failures(row.example, self._recipe.curate.failed_calls, self._failed)
        except DataError as error:
            return "stray result", str(error)
        row.example = with_reasoning(kept, self._reasoning, self._tokenizer if self._reasoning.tokens else None)
        return None

    def _failed(self, result: Message) -> bool:
        return self._failure.match(result.content.lstrip()) is not None

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer  # late: heavy, and few need it

        model = self._recipe.student.model or self._recipe.teacher.model
        return AutoTokenizer.from_pretrained(model.removeprefix("hf:"))

"""Why an answer is no example, before anything of the user's looks at it."""

from __future__ import annotations

import re

from attar.collect.generate.tasks import Task
from attar.engines.base import Answer
from attar.engines.calls import CALL
from attar.recipe.curate import REFUSALS

__all__ = ["problem"]

_REFUSALS = [re.compile(pattern, re.IGNORECASE) for pattern in REFUSALS]


def problem(answer: Answer, task: Task, *, refusals: bool) -> tuple[str, str] | None:
    """What is wrong with an answer: the reason that it is counted under, and what about this one.

    Args:
        answer: of the teacher.
        task: what it was asked.
        refusals: whether text that begins as a refusal is wrong.
    """
    message = answer.message
    text = message.content.strip()
    offered = {tool["function"]["name"] for tool in task.tools}
    if answer.finish_reason == "length":
        return "truncated", f"cut after {answer.completion_tokens} tokens (teacher.max_tokens)"
    if answer.finish_reason == "content_filter":
        return "content filter", "the provider or the model refused"
    if unknown := [call.name for call in message.tool_calls if call.name not in offered]:
        return "unknown tool", f"{unknown[0]} is called, on offer are {', '.join(sorted(offered)) or 'none'}"
    if offered and CALL in text:
        return "bad tool call", f"the text holds {CALL}, which the server did not read as a call"
    if not text and not message.tool_calls:
        return "empty", "no text and no call"
    if task.no_answer is not None and task.no_answer.casefold() in text.casefold():
        return "not in the passage", text[:200]
    if refusals and (found := next(filter(None, (pattern.match(text) for pattern in _REFUSALS)), None)):
        return "refusal", f"it begins {found.group()!r}"
    return None

"""Where the student's episodes leave the teacher's: the first step that differs, side by side."""

from __future__ import annotations

from typing import Any

from attar.data.episodes import Episode
from attar.data.tools import CallChecker
from attar.data.types import Message
from attar.grading.steps import grade_step

__all__ = ["first_difference", "where_it_breaks"]

# Tasks that are shown, and the longest text of each message.
_SHOWN = 12
_CHARACTERS = 600


def first_difference(mine: Episode, theirs: Episode) -> tuple[int, Message | None, Message | None] | None:
    """Where an episode first leaves another one of the same task.

    Returns:
        The number of the step, and what each did there (None: nothing, it had ended); None where they never part.
    """
    check = CallChecker()
    for number in range(max(len(mine.steps), len(theirs.steps))):
        pair = [
            episode.messages[episode.steps[number].message] if number < len(episode.steps) else None
            for episode in (mine, theirs)
        ]
        if pair[1] is None or not grade_step(pair[0], pair[1], theirs.tools, check).acceptable:
            return number, pair[0], pair[1]
    return None


def where_it_breaks(arms: dict[str, list[list[Episode]]]) -> list[dict[str, Any]]:
    """Tasks that the teacher did and the first student did not: where they part."""
    if not arms:
        return []
    shown = []
    for mine, theirs in zip(arms["student"][0], arms["teacher"][0], strict=True):
        if not theirs.outcome.success or mine.outcome.success:
            continue
        parted = first_difference(mine, theirs)
        step, ours, wanted = parted if parted is not None else (len(mine.steps), None, None)
        users = [message.content for message in theirs.messages if message.role == "user"]
        shown.append(
            {
                "task": mine.task,
                "family": mine.family,
                "step": step + 1,
                "steps": len(theirs.steps),
                "request": _cut(users[0] if users else ""),
                "before": _before(mine, step),
                "teacher": _said(wanted),
                "student": _said(ours),
                "reason": mine.outcome.reason or mine.stopped,
            }
        )
    return sorted(shown, key=lambda case: (case["step"], case["task"]))[:_SHOWN]


def _before(episode: Episode, step: int) -> str:
    """What the agent had seen last."""
    last = episode.steps[step].message if step < len(episode.steps) else len(episode.messages)
    before = [message for message in episode.messages[:last] if message.role in ("user", "tool")]
    return _cut(f"{before[-1].role}: {before[-1].content}") if before else ""


def _said(message: Message | None) -> str:
    if message is None:
        return ""
    calls = [
        f"{call.name}({', '.join(f'{k}={v!r}' for k, v in call.arguments.items())})" for call in message.tool_calls
    ]
    return _cut("\n".join([*([message.content] if message.content else []), *calls]))


def _cut(text: str) -> str:
    return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + "…"

"""The office as an environment: a task begins, calls are answered, the end is judged."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from attar.agents.environments import Beginning, Task
from attar.agents.office.generate import SPLITS, draw_tasks
from attar.agents.office.pools import DAYS
from attar.agents.office.state import State, plain
from attar.agents.office.tools import TOOLS, Desk
from attar.data.episodes import Outcome
from attar.data.types import Message

__all__ = ["SYSTEM", "Office"]

SYSTEM = (
    "You run an office by tools. It is Monday 8am. Do only what is asked and copy texts exactly. Then answer "
    '"Done." or what was asked. If that is impossible, change nothing and answer "CANNOT: why"; if it is unclear, '
    '"NEED: what".'
)
"""the system prompt of every task; the rule by which answers are judged stands in it"""

_REFUSALS = ("CANNOT", "NEED")
# What questions ask for: an address or an hour.
_FACT = re.compile(rf"[^@\s]+@[^@\s]+\.\w+|(?:{'|'.join(DAYS)}) \d+[ap]m")


class Office:
    """A small office: calendar, mail, contacts and a to-do list in one week, with twelve tools.

    A task succeeds where the office ends as the task wants it and nothing else was touched, and the answer is of the
    right kind: it begins with ``CANNOT:`` or ``NEED:`` where the task is impossible or ambiguous, with neither where it
    is not, and holds what was asked where something was. Ids, case and marks at a text's end do not count.

    Args:
        seed: of all tasks.
        train: number of tasks of the split; so below. A multiple of 18 holds the mix exactly (see ``generate``).
        unseen: number of tasks of families that no other split has.

    Raises:
        ValueError: a number is below 0; by ``tasks``: the pools do not hold so many.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        train: int = 1500,
        val: int = 60,
        calibration: int = 60,
        test: int = 120,
        unseen: int = 60,
    ) -> None:
        self._seed = seed
        self._counts = dict(zip(SPLITS, (train, val, calibration, test, unseen), strict=True))
        for split, count in self._counts.items():
            if count < 0:
                raise ValueError(f"{split} is {count}; wanted a number of tasks, 0 or more")
        self._task: Task | None = None
        self._desk = Desk(State())

    @property
    def name(self) -> str:
        """With the version of its rules and tasks."""
        return "office 1"

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of a split, ``unseen`` among them; none where there is no such split."""
        return draw_tasks(split, self._counts[split], self._seed) if split in self._counts else ()

    def start(self, task: Task) -> Beginning:
        """Begin an episode; all that it needs is in the task's data."""
        self._task = task
        self._desk = Desk(State.read(task.data["start"]), busy=task.data["busy"], dead=task.data["dead"])
        return Beginning((Message("system", SYSTEM), Message("user", task.data["request"])), TOOLS)

    @property
    def state(self) -> State:
        """Of the office now."""
        return self._desk.state

    def call(self, tool: str, arguments: dict[str, Any]) -> str:
        """The result of a call.

        Raises:
            ToolError: see :meth:`attar.agents.office.tools.Desk.call`.
        """
        return self._desk.call(tool, arguments)

    def finish(self, messages: Sequence[Message]) -> Outcome:
        """Judge the episode; its score is 1, or the share made of the wanted changes where nothing else is wrong.

        Raises:
            ValueError: no episode has begun.
        """
        if self._task is None:
            raise ValueError("no episode has begun; call start(task) first")
        data = self._task.data
        start, goal, now = State.read(data["start"]).content, State.read(data["goal"]).content, self.state.content
        new, gone = goal - start, start - goal
        lacks, has = goal - now, now - goal
        missing, other = (lacks & new) + (has & gone), (lacks - new) + (has - gone)
        if other:
            reason = "wrong change" if missing else "touched more"
        elif missing:
            reason = "nothing done" if missing == new + gone else "half done"
        else:
            reason = _answer(messages, data["answer"], data["says"])
        if reason == "half done":
            return Outcome(False, 1 - missing.total() / (new + gone).total(), reason)
        return Outcome(not reason, 0.0 if reason else 1.0, reason)


def _answer(messages: Sequence[Message], refusal: str, fact: str) -> str:
    """What is wrong with the answer.

    Args:
        messages: of the episode.
        refusal: the word that it must begin with, if one.
        fact: what it must say, if anything, and no other of its kind.
    """
    last = messages[-1] if messages else None
    if last is None or last.role != "assistant" or last.tool_calls or not last.content.strip():
        return "no answer"
    said = last.content.strip()
    refused = next((word for word in _REFUSALS if said.startswith(f"{word}:")), "")
    if refused != refusal:
        return "no refusal" if not refused else "wrong refusal" if refusal else "gave up"
    if fact and {plain(found) for found in _FACT.findall(said)} != {plain(fact)}:
        return "wrong answer"
    return ""

"""What an agent acts in. Built-in environments use the same door as a user's own class.

An environment is named in the recipe as ``package.module:Class`` with options, or by the short name of a built-in one.
An instance plays one episode at a time; the runner makes as many as there are episodes at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from attar.data.episodes import Outcome
from attar.data.types import Message

__all__ = ["Beginning", "Bounded", "Changing", "Conversing", "Environment", "Task", "ToolError"]


class ToolError(Exception):
    """A call that failed in a way that the agent is told of: its text becomes the tool's result."""


@dataclass(frozen=True)
class Task:
    """Something to do."""

    id: str
    """unique in its environment, the same in every run; decides on which side of a split it stands"""
    family: str
    """kind of task"""
    data: Any = field(default=None, compare=False)
    """what the environment needs to start it; JSON"""


class Beginning(NamedTuple):
    """How an episode starts."""

    messages: tuple[Message, ...]
    """a system prompt, if there is one, and what the user wants"""
    tools: tuple[dict[str, Any], ...]
    """on offer, as OpenAI schemas"""


@runtime_checkable
class Environment(Protocol):
    """A world with tasks. Deterministic for a task, so that arms can be compared on the same ones."""

    @property
    def name(self) -> str:
        """For reports; with a version where it has one."""

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of ``train``, ``val``, ``calibration`` or ``test``; none where there is no such split."""

    def start(self, task: Task) -> Beginning:
        """Begin an episode, whatever became of the one before."""

    def call(self, tool: str, arguments: dict[str, Any]) -> Any:
        """The result of a call: text, or JSON that is written as text.

        Raises:
            ToolError: the call failed; any other exception becomes a result too, and is counted as the environment's.
        """

    def finish(self, messages: Sequence[Message]) -> Outcome:
        """Judge the episode that ends with these messages."""


@runtime_checkable
class Conversing(Protocol):
    """An environment whose user speaks again."""

    def answer(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """What the user says after the agent's last message, which calls nothing; nothing ends the episode."""


@runtime_checkable
class Changing(Protocol):
    """An environment whose tools change within an episode."""

    tools: tuple[dict[str, Any], ...]
    """on offer now, as OpenAI schemas: what the next prompt has; looked at after ``start`` and after each ``answer``"""


@runtime_checkable
class Bounded(Protocol):
    """An environment that says how many answers an episode of it has at most."""

    steps: int
    """after the last of them the episode ends, its calls not made"""

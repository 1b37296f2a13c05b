"""BFCL's single-turn categories: one request, one answer, judged by the official checker of calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from attar.agents.bfcl.cases import LIVE, PYTHON, Case, tools
from attar.agents.bfcl.references import reference_calls
from attar.agents.bfcl.splits import Drawn, by_function_and_request
from attar.agents.bfcl.wheel import official, version
from attar.agents.environments import Beginning, Task
from attar.data.episodes import Outcome
from attar.data.types import Conversation, Message, ToolCall

__all__ = ["NO_CALL", "SingleTurn", "failure_of_checker", "grade", "outcome"]

NO_CALL = "None of the functions on offer can do this."
"""what a reference answer says where no call is right; BFCL has no text of its own"""


def grade(case: Case, calls: Sequence[ToolCall]) -> Outcome:
    """Judge the calls of one answer by BFCL's rules for models that call tools natively.

    Args:
        case: of a single-turn category.
        calls: all calls of the answer; none where it is prose, or where its calls could not be parsed.

    Returns:
        Success, or the official error type as the reason. ``checker:NAME`` is an answer that the official checker fails
        on with an exception of that name.
    """
    if case.category.endswith("irrelevance"):
        return outcome("irrelevance_error:decoder_success" if calls else "")
    if case.category.endswith("relevance"):
        return outcome("" if calls else "relevance_error:decoder_failed")
    if not calls:
        return outcome("ast_decoder:decoder_failed")
    wheel = official()
    answer = [{call.name: call.arguments} for call in calls]
    truth = list(case.truth or ())
    try:
        result = wheel.ast_checker(case.entry["function"], answer, truth, wheel.python, case.category, wheel.model_name)
    except Exception as error:  # its own type checks do not go deep, so a wrong value can reach code that trusts it
        return failure_of_checker(error)
    return outcome("" if result["valid"] else result["error_type"])


class SingleTurn:
    """BFCL's single-turn Python categories as an environment of one step.

    Calls are not executed: functions are descriptions only. So an episode ends with the first answer, by ``steps``; a
    runner that goes on all the same gets empty results, and the first answer is judged.

    Args:
        categories: some of ``PYTHON`` and ``LIVE``; which ones also decides the split.
        seed: of the split, by function and request.

    Raises:
        ValueError: a category is not known.
        MissingExtra: the wheel is not installed.
    """

    steps = 1
    """the most answers that an episode has"""

    def __init__(self, categories: Iterable[str] = PYTHON, seed: int = 0) -> None:
        self._version = version()
        self._drawn = Drawn(categories, (*PYTHON, *LIVE), by_function_and_request, seed)
        self._case: Case | None = None

    @property
    def name(self) -> str:
        """Name and the wheel's version."""
        return f"bfcl-single-turn {self._version}"

    def tasks(self, split: str) -> tuple[Task, ...]:
        """The tasks of ``train``, ``val`` or ``test``, a category a family."""
        return self._drawn.tasks(split)

    def start(self, task: Task) -> Beginning:
        """The request and the functions on offer.

        Raises:
            ValueError: there is no such task.
        """
        self._case = self._drawn.find(task)
        return _beginning(self._case)

    def call(self, tool: str, arguments: dict[str, Any]) -> str:
        """Nothing; no call is executed."""
        return ""

    def finish(self, messages: Sequence[Message]) -> Outcome:
        """Judge the first answer to the request.

        Raises:
            RuntimeError: no episode was started.
        """
        if self._case is None:
            raise RuntimeError("finish: no episode was started; call start first")
        asked = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
        answer = next((message for message in messages[asked + 1 :] if message.role == "assistant"), None)
        return grade(self._case, answer.tool_calls if answer else ())

    def reference(self, task: Task) -> tuple[Conversation, ...]:
        """The request with the official answer, to train on; none where any call would do (``live_relevance``)."""
        return _reference(self._drawn.find(task), task.id)

    def references(self, split: str) -> tuple[Conversation, ...]:
        """The reference conversations of a split; ``group`` names the cases that share a function or a request."""
        return tuple(c for case, group in self._drawn.grouped(split) for c in _reference(case, group))


def _beginning(case: Case) -> Beginning:
    return Beginning(case.turns[0], tools(case.entry["function"]))


def _reference(case: Case, group: str) -> tuple[Conversation, ...]:
    if case.category == "live_relevance":
        return ()
    calls = () if case.truth is None else reference_calls(case)
    messages, on_offer = _beginning(case)
    return (Conversation((*messages, Message("assistant", "" if calls else NO_CALL, calls)), on_offer, group),)


def outcome(reason: str) -> Outcome:
    """All or nothing: an outcome with a reason is a failure."""
    return Outcome(not reason, float(not reason), reason)


def failure_of_checker(error: Exception) -> Outcome:
    """Of an answer on which the official checker fails."""
    return outcome(f"checker:{type(error).__name__}")

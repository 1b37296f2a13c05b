"""An answer on its way to a file."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from attar.collect.generate.tasks import Task
from attar.data.types import Conversation
from attar.engines.base import Answer, Failure

__all__ = ["Result", "judged", "row_meta", "usage"]


@dataclass
class Result:
    """An answer, and what was found about it."""

    task: Task
    sample: int
    answer: Answer
    example: Conversation
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    judged: dict[str, Any] | None = None
    problem: tuple[str, str] | None = None

    @cached_property
    def id(self) -> str:
        """The example's."""
        return self.example.id

    def row(self, source: str) -> dict[str, Any]:
        """What is stored."""
        meta = row_meta(self.task, self.sample, source, self.answer.model, usage(self.answer))
        meta |= {"finish_reason": self.answer.finish_reason, "verdicts": self.verdicts, "judge": self.judged}
        if self.problem is not None:
            meta |= {"reason": self.problem[0], "detail": self.problem[1]}
        return {"id": self.id} | self.example.wire | {"meta": meta}


def judged(result: Result, outcome: Answer | Failure, score: int | None, keep_from: int) -> None:
    """Add a judge's verdict to an answer, and what follows from it."""
    said = outcome.detail if isinstance(outcome, Failure) else outcome.message.content
    model = None if isinstance(outcome, Failure) else outcome.model
    result.judged = {"score": score, "said": said, "model": model, "usage": usage(outcome)}
    if isinstance(outcome, Failure):
        result.problem = ("judge failed", outcome.reason)
    elif score is None:
        result.problem = ("judge unreadable", "the verdict does not end with one line that is a score")
    elif score < keep_from:
        result.problem = ("judge", f"score {score}, kept from {keep_from}")


def row_meta(task: Task, sample: int, source: str, model: str | None, used: dict[str, Any]) -> dict[str, Any]:
    """Where an answer comes from, and what it cost."""
    return {
        "source": source,
        "prompt_id": task.id,
        "sample": sample,
        **task.meta,
        "model": model,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "usage": used,
    }


def usage(outcome: Answer | Failure) -> dict[str, Any]:
    """What an engine says that an outcome took."""
    if isinstance(outcome, Failure):
        return {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0, "usd": outcome.usd}
    return {key: getattr(outcome, key) for key in ("prompt_tokens", "completion_tokens", "cached_tokens", "usd")}

"""The shape of an agent's work: one task, from the first message to the outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from attar.data.conversations import BadRow, parse_conversation
from attar.data.types import Conversation, Message

__all__ = ["Episode", "Outcome", "Step", "Stopped"]

Stopped = Literal["finished", "steps", "tokens", "time", "money", "bad call", "environment", "engine"]
"""why an episode ended: the agent answered without a call, a limit, a call that cannot be read, or a fault of the
environment or the engine"""


@dataclass(frozen=True)
class Outcome:
    """What an environment says of an episode."""

    success: bool
    score: float = 0.0
    """0 to 1; for tasks that can be done in part"""
    reason: str = ""
    """in a word or two, for counting: what was wrong"""


@dataclass(frozen=True)
class Step:
    """One answer of the agent, as it was asked and measured."""

    message: int
    """its number in ``Episode.messages``"""
    prompt_tokens: int
    completion_tokens: int
    latency_ms: float
    """from the request to the whole answer; in a batch, of the batch"""
    finish_reason: str
    usd: float | None = None
    tool_errors: int = 0
    """of its calls: those whose result says that they failed"""


@dataclass(frozen=True)
class Episode:
    """One task that an agent worked on."""

    environment: str
    """name of it, with a version where it has one"""
    task: str
    """id; what must stay on one side of a split"""
    family: str
    """kind of task, for slices and for families that were never seen"""
    policy: str
    """who acted: an engine's name; ``scripted`` for one that follows a script, which is no teacher"""
    trial: int
    seed: int
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    """as OpenAI schemas"""
    outcome: Outcome
    stopped: Stopped
    steps: tuple[Step, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    """what the environment adds"""

    @property
    def conversation(self) -> Conversation:
        """What a student learns from."""
        return Conversation(self.messages, self.tools, self.task)

    @property
    def wire(self) -> dict[str, Any]:
        """The row of a JSONL file: a conversation's, with ``outcome``, and all else under ``meta.episode``."""
        about = {
            "environment": self.environment,
            "task": self.task,
            "family": self.family,
            "policy": self.policy,
            "trial": self.trial,
            "seed": self.seed,
            "stopped": self.stopped,
            "steps": [vars(step) for step in self.steps],
            "meta": self.meta,
        }
        return self.conversation.wire | {"outcome": vars(self.outcome), "meta": {"episode": about}}

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Episode:
        """The episode of such a row.

        Raises:
            BadRow: it is none; says what is missing.
        """
        conversation = parse_conversation(row, answered=False)
        meta = row.get("meta")
        about = meta.get("episode") if isinstance(meta, dict) else None
        if not isinstance(about, dict):
            raise BadRow("no episode", "the row has no meta.episode; rows of `attar rollout` have it")
        try:
            return cls(
                environment=about["environment"],
                task=about["task"],
                family=about["family"],
                policy=about["policy"],
                trial=about["trial"],
                seed=about["seed"],
                messages=conversation.messages,
                tools=conversation.tools,
                outcome=Outcome(**row["outcome"]),
                stopped=about["stopped"],
                steps=tuple(Step(**step) for step in about["steps"]),
                meta=about.get("meta") or {},
            )
        except (KeyError, TypeError) as error:
            raise BadRow("malformed", f"meta.episode: {error}") from error

"""One prompt to be answered, and a row of the user's that is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from attar.data.conversations import BadRow, parse_conversation
from attar.data.types import Conversation, Message

__all__ = ["Task", "parse_prompt"]


@dataclass(frozen=True)
class Task:
    """A prompt."""

    messages: tuple[Message, ...]
    """what the teacher is asked with"""
    tools: tuple[dict[str, Any], ...] = ()
    group: str | None = None
    """what its examples are split by; None: the prompt itself"""
    row: Mapping[str, Any] = field(default_factory=dict)
    """what it came with, for verifiers"""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """where it comes from, for the examples"""
    taught: tuple[Message, ...] | None = None
    """what stands in the examples instead of ``messages``"""
    no_answer: str | None = None
    """what the teacher was told to write where there is no answer"""

    @cached_property
    def id(self) -> str:
        """Hash of what the teacher is asked with."""
        return Conversation(self.messages, self.tools).id

    def example(self, answer: Message) -> Conversation:
        """What is learned from an answer."""
        messages = self.messages if self.taught is None else self.taught
        return Conversation((*messages, answer), self.tools, self.group or self.id)


def parse_prompt(row: Any, system: str | None) -> Task:
    """A row of a file of prompts.

    Args:
        row: ``prompt`` (a text) or ``messages``; ``system``, ``tools`` and ``group`` where there are any.
        system: put before a prompt that has none of its own.

    Raises:
        BadRow: names the field, the value seen and the value wanted.
    """
    if not isinstance(row, dict):
        raise BadRow("malformed", f"an object with the key 'prompt' or 'messages' is wanted, this is {row!r}")
    prompt, messages = row.get("prompt"), row.get("messages")
    if (prompt is None) == (messages is None):
        which = "both" if prompt is not None else "neither"
        raise BadRow(
            "no messages", f"either 'prompt' or 'messages' is wanted, the row has {which}; keys here: {', '.join(row)}"
        )
    if messages is None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise BadRow("no text", f"prompt is {prompt!r}, a text is wanted")
        messages = [{"role": "user", "content": prompt}]
    own = row.get("system")
    if own is not None and not isinstance(own, str):
        raise BadRow("malformed", f"system is {own!r}, a text is wanted")
    if not isinstance(messages, list) or not messages:
        raise BadRow("no messages", f"messages is {messages!r}, a list of messages is wanted")
    # A whole conversation is what can be read: the answer that is to come stands in its place.
    whole = parse_conversation({**row, "messages": [*messages, {"role": "assistant", "content": ""}]})
    asked = whole.messages[:-1]
    if asked[-1].role == "assistant":
        raise BadRow("already answered", "the last message is an answer; leave it out, so that it can be asked for")
    has_system = asked[0].role in ("system", "developer")
    if own is not None and has_system:
        raise BadRow("malformed", "the row has 'system', and a system message as well; keep one")
    if not has_system:
        asked = (*with_system(system if own is None else own), *asked)
    return Task(asked, whole.tools, whole.group, row)


def with_system(system: str | None) -> tuple[Message, ...]:
    """The system message, where there is one."""
    return () if system is None else (Message("system", system),)

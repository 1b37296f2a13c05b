"""The shapes of what is asked and answered: examples, prompts, conversations."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

__all__ = ["Conversation", "Example", "Message", "Part", "Prompt", "Role", "ToolCall"]

Role = Literal["system", "developer", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Example:
    """One request to learn from or to be tested on; ``label`` is the gold label, if one is known."""

    text: str
    label: str | None = None

    @property
    def id(self) -> str:
        """Hash of the content, so that the same request is the same example in every run."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


class Part(NamedTuple):
    """A stretch of a prompt. Only a trusted one (from the recipe) may hold control tokens."""

    text: str
    trusted: bool


Prompt = tuple[Part, ...]


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool by the assistant; ``arguments`` is the parsed object, its keys in the order written."""

    id: str | None
    name: str
    arguments: dict[str, Any]

    @property
    def wire(self) -> dict[str, Any]:
        """The call in OpenAI's shape, its arguments as a JSON string."""
        function = {"name": self.name, "arguments": json.dumps(self.arguments, ensure_ascii=False)}
        return ({} if self.id is None else {"id": self.id}) | {"type": "function", "function": function}


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    ``reasoning`` is what an assistant thought before it answered, apart from the content. ``train`` is False for an
    assistant's message that a student should read but not learn; None and True are the same. A tool's answer names
    the call that it belongs to in ``tool_call_id``.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    reasoning: str | None = None
    train: bool | None = None

    @property
    def wire(self) -> dict[str, Any]:
        """The message in OpenAI's shape, absent fields left out."""
        optional = {
            "reasoning_content": self.reasoning,
            "tool_calls": [call.wire for call in self.tool_calls] or None,
            "tool_call_id": self.tool_call_id,
            "name": self.name,
            "train": self.train,
        }
        return {"role": self.role, "content": self.content} | {k: v for k, v in optional.items() if v is not None}


@dataclass(frozen=True)
class Conversation:
    """Messages and the tools that were on offer (OpenAI schemas), without a reference answer.

    ``group`` names what must stay on one side of a split: an episode, a user.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    group: str | None = None

    @property
    def id(self) -> str:
        """Hash of messages and tools. The order of keys counts: it shows in the tokens, and signals belong to those."""
        content = json.dumps([self.wire["messages"], self.tools], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def wire(self) -> dict[str, Any]:
        """The row of a JSONL file: ``messages``, and ``tools`` and ``group`` where there are any."""
        row: dict[str, Any] = {"messages": [message.wire for message in self.messages]}
        if self.tools:
            row["tools"] = list(self.tools)
        return row if self.group is None else row | {"group": self.group}

"""Whole conversations: a list of messages in OpenAI's or Anthropic's shape, as fine-tuning files and data sets hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attar.collect.importers.found import Found, each_row, messages_in, shown, system_message, tools_in, wire_messages
from attar.data.conversations import BadRow

__all__ = ["has_anthropic_messages", "has_messages", "read_chat"]

_ANTHROPIC = {"tool_use", "tool_result", "thinking", "redacted_thinking"}
_GROUPS = ("group", "conversation_id", "session_id", "episode")


def has_messages(row: dict[str, Any]) -> bool:
    """Whether a row is a conversation of OpenAI's shape."""
    return _own_messages(row) is not None and not _anthropic(row)


def has_anthropic_messages(row: dict[str, Any]) -> bool:
    """Whether a row is a conversation that only Anthropic's shape can hold: instructions, tools or blocks tell."""
    return _own_messages(row) is not None and _anthropic(row)


def _own_messages(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    # An answer beside the messages makes it a call in a log.
    return None if "response" in row or "call_type" in row else messages_in(row.get("messages"))


def _anthropic(row: dict[str, Any]) -> bool:
    if row.get("system"):
        return True
    blocks = (
        b for m in messages_in(row.get("messages")) or [] if isinstance(m.get("content"), list) for b in m["content"]
    )
    return any(isinstance(block, dict) and block.get("type") in _ANTHROPIC for block in blocks)


@each_row
def read_chat(row: dict[str, Any]) -> Iterator[Found]:
    """A conversation a row: ``messages``, and ``tools``, ``system`` and a group's name where there are any."""
    rows = messages_in(row.get("messages"))
    if rows is None:
        raise BadRow("no messages", f"messages is {shown(row.get('messages'))}; keys here: {', '.join(map(str, row))}")
    messages, left_out = wire_messages(rows)
    group = next((str(row[key]) for key in _GROUPS if row.get(key) not in (None, "")), None)
    known = row.get("meta")
    meta = {"id": row.get("id"), "model": row.get("model")} | (known if isinstance(known, dict) else {})
    tools = tools_in(row.get("tools")) + tools_in(row.get("functions"))
    yield Found(system_message(row.get("system")) + messages, tools, group, meta, left_out=tuple(left_out))

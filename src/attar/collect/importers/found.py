"""What an importer finds, and what importers share: values in strings, times, counts of tokens, tools, messages."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from attar.data.conversations import BadRow
from attar.data.wire import openai_tool, parse_anthropic_message, parse_anthropic_request

__all__ = [
    "Found",
    "Importer",
    "each_row",
    "instant",
    "loaded",
    "messages_in",
    "shown",
    "system_message",
    "tools_in",
    "usage_in",
    "wire_messages",
]

_KEPT = {"role", "content", "tool_calls", "tool_call_id", "name", "train"}
_REASONING = ("reasoning_content", "reasoning", "thinking")
# Blocks that only Anthropic's messages hold.
_BLOCKS = {"tool_use", "tool_result", "thinking", "redacted_thinking"}


@dataclass(frozen=True)
class Found:
    """One conversation as it was found in a file."""

    messages: list[dict[str, Any]]
    """in OpenAI's shape, as :func:`attar.data.conversations.parse_conversation` reads them"""
    tools: list[Any] = field(default_factory=list)
    """OpenAI schemas"""
    group: str | None = None
    """the episode that it belongs to"""
    meta: dict[str, Any] = field(default_factory=dict)
    """what else is known, where it is: ``id``, ``model``, ``timestamp``, ``usage``, ``outcome``, ``finish_reason``,
    ``user``, ``workload``; values that are None are left out"""
    exchange: bool = False
    """the last message is the answer of one call, and those before it are what was sent: a later call may repeat them
    all"""
    left_out: tuple[str, ...] = ()
    """parts of the row that a conversation has no place for, one name each time"""


Importer = Callable[[Iterable[dict[str, Any]]], Iterator[Found | BadRow]]
"""From a file's rows, in order, to what is found in them; a BadRow says why a row, or a part of one, is left out."""


def each_row(read: Callable[[dict[str, Any]], Iterable[Found | BadRow]]) -> Importer:
    """An importer from a function that reads one row at a time, and raises BadRow for one that it cannot use."""

    @functools.wraps(read)
    def importer(rows: Iterable[dict[str, Any]]) -> Iterator[Found | BadRow]:
        for row in rows:
            try:
                yield from read(row)
            except BadRow as bad:
                yield bad
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                yield BadRow(
                    "malformed", f"the row is not of the shape that it seemed ({type(error).__name__}: {error})"
                )

    return importer


def loaded(value: Any) -> Any:
    """The value of a string that holds a JSON object or list, as tables and logs write them; else the value itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def instant(value: Any) -> str | None:
    """A time as ISO 8601 in UTC: seconds, milli-, micro- or nanoseconds since 1970 as a number or its digits; a text
    that is none of these stays as it is.
    """
    if value is None or value == "" or isinstance(value, bool):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        return str(value)
    # 1e11 seconds is the year 5138: a larger number counts in a smaller unit.
    while abs(seconds) > 1e11:
        seconds /= 1000
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def usage_in(value: Any) -> dict[str, int] | None:
    """Token counts under attar's names, from those that APIs and logs use; None where there are none."""
    value = loaded(value)
    if not isinstance(value, dict):
        return None
    names = {
        "prompt_tokens": ("prompt_tokens", "input_tokens", "input", "promptTokens", "total_prompt_tokens"),
        "completion_tokens": (
            "completion_tokens",
            "output_tokens",
            "output",
            "completionTokens",
            "total_completion_tokens",
        ),
        "cached_tokens": ("cached_tokens", "input_cached_tokens", "total_cached_tokens"),
    }
    counts = {}
    for name, others in names.items():
        for other in others:
            count = value.get(other)
            if isinstance(count, (int, float)) and not isinstance(count, bool):
                counts[name] = int(count)
                break
    return counts or None


def messages_in(value: Any) -> list[dict[str, Any]] | None:
    """The value if it is a list of messages, or a JSON string of one; else None."""
    value = loaded(value)
    if isinstance(value, list) and value and all(isinstance(row, dict) and "role" in row for row in value):
        return value
    return None


def tools_in(value: Any) -> list[dict[str, Any]]:
    """Tools as OpenAI schemas, from those of OpenAI (nested or flat) and Anthropic, in a list or its JSON.

    Raises:
        BadRow: one has no name or no schema: the provider ran it itself, and its calls cannot be learned.
    """
    value = loaded(value)
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise BadRow("bad tools", f"tools is {shown(value)}, a list of schemas is wanted")
    tools = []
    for tool in map(loaded, value):
        if isinstance(tool, dict) and isinstance(loaded(tool.get("function")), dict):
            tools.append({"type": "function", "function": loaded(tool["function"])})
        elif isinstance(tool, dict) and isinstance(tool.get("name"), str) and "input_schema" not in tool:
            if tool.get("type") not in (None, "function", "custom"):
                raise BadRow("bad tools", f"{shown(tool)} is a tool of the provider, without a schema")
            kept = {
                key: tool[key] for key in ("name", "description", "parameters", "strict") if tool.get(key) is not None
            }
            tools.append({"type": "function", "function": kept})
        else:
            tools.append(openai_tool(tool))
    return tools


def system_message(value: Any) -> list[dict[str, Any]]:
    """The message that instructions beside the messages make: a text or Anthropic's blocks; none if they are empty."""
    return [message.wire for message in parse_anthropic_request({"system": loaded(value), "messages": []}).messages]


def wire_messages(rows: Iterable[Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages of OpenAI's shape or Anthropic's, old forms included, as OpenAI's today.

    Returns:
        The messages, and names of what was left out of them.

    Raises:
        BadRow: one holds what is no text.
    """
    messages: list[dict[str, Any]] = []
    left_out: list[str] = []
    for number, row in enumerate(rows):
        where = f"messages[{number}]"
        if not isinstance(row, dict):
            raise BadRow("malformed", f"{where} is {shown(row)}, an object with role and content is wanted")
        content = row.get("content")
        if isinstance(content, list) and any(isinstance(b, dict) and b.get("type") in _BLOCKS for b in content):
            messages += [message.wire for message in parse_anthropic_message(row, where)]
            continue
        message, lost = _openai_message(row, where)
        messages.append(message)
        left_out += lost
    return messages, left_out


def _openai_message(row: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    message = {key: row[key] for key in _KEPT if row.get(key) is not None}
    message["role"] = {"function": "tool", "ai": "assistant", "human": "user"}.get(
        str(row.get("role")), row.get("role")
    )
    if row.get("audio") is not None:
        raise BadRow("no text", f"{where}.audio is {shown(row['audio'])}, only text is read")
    for key in _REASONING:
        if row.get(key):
            message[key] = row[key]
    if isinstance(row.get("function_call"), dict):
        message["tool_calls"] = [{"type": "function", "function": row["function_call"]}]
    if message.get("tool_calls") == []:
        del message["tool_calls"]
    if row.get("refusal"):
        message["content"] = row.get("content") or row["refusal"]
    # OpenAI's fine-tuning files mark an answer that is not to be learned with weight 0.
    if row.get("weight") is not None and message["role"] == "assistant":
        message["train"] = bool(row["weight"])
    known = {*_KEPT, *_REASONING, "audio", "function_call", "refusal", "weight"}
    lost = [f"message.{key}" for key, value in row.items() if key not in known and value not in (None, [], {}, "")]
    return message, lost


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = "absent or null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

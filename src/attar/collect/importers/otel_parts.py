"""OTLP's values and the `gen_ai` messages made of parts, as plain objects and messages of OpenAI's shape."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from attar.collect.importers.found import loaded, shown, wire_messages
from attar.data.conversations import BadRow

__all__ = ["any_value", "attributes", "numbered", "part_messages"]


def any_value(value: Any) -> Any:
    """The plain value of an OTLP AnyValue; what is none stays as it is."""
    if not isinstance(value, dict) or len(value) != 1:
        return value
    [(kind, inner)] = value.items()
    if kind in ("stringValue", "boolValue", "doubleValue", "bytesValue"):
        return inner
    if kind == "intValue":
        return int(inner)
    if kind == "arrayValue":
        return [any_value(item) for item in inner.get("values") or ()]
    if kind == "kvlistValue":
        return attributes(inner.get("values"))
    return value


def attributes(value: Any) -> dict[str, Any]:
    """Attributes as an object: OTLP's list of keys and values, or an object already."""
    if isinstance(value, dict):
        return value
    return {
        item["key"]: any_value(item.get("value")) for item in value or () if isinstance(item, dict) and "key" in item
    }


def part_messages(rows: Iterable[dict[str, Any]], between: str = "") -> list[dict[str, Any]]:
    """Messages with ``parts`` in OpenAI's shape; a result of a tool is a message of its own, before the rest.

    Args:
        rows: as ``gen_ai.input.messages`` holds them; one that has ``content`` instead is of OpenAI's shape already.
        between: what stands between the texts of one message.

    Raises:
        BadRow: a part is no text, reasoning, call of a tool or its result.
    """
    messages: list[dict[str, Any]] = []
    for row in rows:
        parts = loaded(row.get("parts"))
        if not isinstance(parts, list):
            messages += wire_messages([row])[0]
            continue
        told, message = _message(row, parts, between)
        messages += told
        if message is not None:
            messages.append(message)
    return messages


def _message(row: dict[str, Any], parts: list[Any], between: str) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    told: list[dict[str, Any]] = []
    texts, thoughts, calls = [], [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(str(part.get("content") or ""))
        elif kind == "reasoning":
            thoughts.append(str(part.get("content") or ""))
        elif kind == "tool_call":
            function = {
                "name": part.get("name"),
                "arguments": {} if part.get("arguments") is None else part["arguments"],
            }
            calls.append({"id": part.get("id"), "type": "function", "function": function})
        elif kind == "tool_call_response":
            result = part["response"] if "response" in part else part.get("result")
            content = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
            told.append({"role": "tool", "tool_call_id": part.get("id"), "content": content})
        else:
            raise BadRow("no text", f"a part is {shown(part)}, wanted text, reasoning, tool_call or tool_call_response")
    if not texts and not thoughts and not calls and (told or not parts) and row.get("role") != "assistant":
        return told, None
    message: dict[str, Any] = {"role": row.get("role"), "content": between.join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return told, message


def numbered(own: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
    """Objects that attributes spell out, ``PREFIX.0.role``, ``PREFIX.0.tool_calls.0.name``, in their order.

    Calls of tools come out in OpenAI's shape.
    """
    found: dict[int, dict[str, Any]] = {}
    calls: dict[tuple[int, int], dict[str, Any]] = {}
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.(?:tool_calls\.(\d+)\.)?(\w+)")
    for key, value in own.items():
        match = pattern.fullmatch(key)
        if match is None:
            continue
        index, call, name = int(match[1]), match[2], match[3]
        row = found.setdefault(index, {})
        if call is not None:
            calls.setdefault((index, int(call)), {})[name] = value
        elif name != "finish_reason":
            row[name] = value
    for index, call_index in sorted(calls):
        made = calls[index, call_index]
        function = {"name": made.get("name"), "arguments": made.get("arguments")}
        row = found[index]
        row.setdefault("content", "")
        row.setdefault("tool_calls", []).append({"id": made.get("id"), "type": "function", "function": function})
    return [found[index] for index in sorted(found)]

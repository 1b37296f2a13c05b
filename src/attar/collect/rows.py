"""A row on its way from the user's file to a split: what filters look at, and what is written."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from attar.data.files import BadRow
from attar.data.types import Conversation, Example, Message, ToolCall

__all__ = ["Row", "Spoken", "asked", "encoded", "lookup", "mapped", "moment", "spoken", "strings", "words"]

_WORD = re.compile(r"\w+")
# json.dumps with an argument makes an encoder at every call.
_json = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(slots=True)
class Row:
    """What stood in the file, and what it says; a filter may put another example in its place."""

    raw: dict[str, Any]
    example: Conversation | Example


class Spoken(NamedTuple):
    """What a row says, apart from what all rows may share: system prompts and tools."""

    prompt: str
    """of users and tools"""
    answers: str
    """of the assistant, its calls with them; empty for a request"""


def spoken(example: Conversation | Example) -> Spoken:
    """What is compared between rows."""
    if isinstance(example, Example):
        return Spoken(example.text, "")
    prompt, answers = [], []
    for message in example.messages:
        if message.role in ("user", "tool"):
            prompt.append(message.content)
        elif message.role == "assistant":
            answers.append(message.content)
            answers += [f"{call.name} {_json(call.arguments)}" for call in message.tool_calls]
    return Spoken("\n".join(prompt), "\n".join(answers))


def words(text: str) -> list[str]:
    """Letters and digits, case apart."""
    return _WORD.findall(text.casefold())


def asked(example: Conversation | Example) -> str:
    """What two spellings of one prompt have in common: its words, those of all messages before the first answer."""
    if isinstance(example, Example):
        # What holds no letter, such as a smiley, is told apart by itself.
        return " ".join(words(example.text)) or example.text
    said = []
    for message in example.messages:
        if message.role == "assistant":
            break
        said.append(message.content)
    return " ".join(words(" ".join(said)))


def strings(example: Conversation | Example) -> Iterator[str]:
    """Every text that somebody wrote, tools on offer apart."""
    if isinstance(example, Example):
        yield example.text
        return
    for message in example.messages:
        yield message.content
        if message.reasoning is not None:
            yield message.reasoning
        for call in message.tool_calls:
            yield from _leaves(call.arguments)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)


def mapped(example: Conversation | Example, change: Callable[[str], str]) -> Conversation | Example:
    """The example with each of its :func:`strings` changed."""
    if isinstance(example, Example):
        return replace(example, text=change(example.text))
    return replace(example, messages=tuple(_message(message, change) for message in example.messages))


def _message(message: Message, change: Callable[[str], str]) -> Message:
    calls = tuple(ToolCall(call.id, call.name, _changed(call.arguments, change)) for call in message.tool_calls)
    reasoning = None if message.reasoning is None else change(message.reasoning)
    return replace(message, content=change(message.content), reasoning=reasoning, tool_calls=calls)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _changed(part, change) for key, part in value.items()}
    return [_changed(part, change) for part in value] if isinstance(value, list) else value


def encoded(example: Conversation | Example) -> tuple[str, bytes]:
    """The example's id, and its line in a split: as ``write_conversations`` and ``write_examples`` have it."""
    if isinstance(example, Example):
        label = {} if example.label is None else {"label": example.label}
        return example.id, (_json({"id": example.id, "text": example.text} | label) + "\n").encode()
    # The texts that make up the id are those of the line, so each is made once.
    messages = _json([message.wire for message in example.messages])
    tools = _json(list(example.tools))
    key = hashlib.sha256(f"[{messages}, {tools}]".encode()).hexdigest()[:16]
    line = f'{{"id": "{key}", "messages": {messages}'
    if example.tools:
        line += f', "tools": {tools}'
    if example.group is not None:
        line += f', "group": {_json(example.group)}'
    return key, (line + "}\n").encode()


def lookup(raw: dict[str, Any], dotted: str) -> Any:
    """What stands at a dotted key, beside the messages or in ``meta``; None where nothing does.

    What attar records, imports and generates keeps in ``meta`` what is known about a row.
    """
    for place in (raw, raw.get("meta")):
        value: Any = place
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def moment(raw: dict[str, Any], key: str) -> float:
    """Seconds since 1970 of a row's time; a time without a zone is UTC.

    Raises:
        BadRow: there is none, or it is no time.
    """
    value = lookup(raw, key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, datetime):
        parsed = value
    else:
        try:
            parsed = datetime.fromisoformat(str(value))
        except ValueError as error:
            shown = "absent" if value is None else repr(value)
            raise BadRow(
                "no time", f"{key} is {shown}, ISO 8601 or seconds since 1970 is wanted; see curate.split.time_key"
            ) from error
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()

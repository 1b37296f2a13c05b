"""Read conversations from rows of OpenAI's shape, ``{"messages": [...], "tools": [...]}``, and write them back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from attar.data.files import BadRow, read_rows
from attar.data.types import Conversation, Message, Role, ToolCall
from attar.errors import DataError
from attar.workspace import write_atomic

__all__ = ["BadCall", "BadRow", "parse_conversation", "read_conversations", "write_conversations"]

_ROLES = get_args(Role)
# Names under which engines and logs carry an assistant's reasoning.
_REASONING = ("reasoning_content", "reasoning", "thinking")


class BadCall(BadRow):
    """A row whose assistant wrote arguments that are no JSON object: the answer is at fault, not the file."""


def read_conversations(
    path: Path, *, key: str, on_bad_line: Literal["stop", "skip"]
) -> tuple[list[Conversation], Counter[str]]:
    """Read conversations from a file.

    Args:
        path: a ``.jsonl`` or ``.parquet`` file.
        key: the recipe's key that named the file, for messages.
        on_bad_line: stop at a row that cannot be used, or skip and count it.

    Returns:
        The conversations in the file's order, and how many rows were skipped, by reason.

    Raises:
        DataError: the file is missing, empty, of another kind or encoding, or a row cannot be used and the policy is
            to stop.
    """
    if not path.is_file():
        raise DataError(f"{key}: {path} is no file")
    if path.suffix.lower() == ".csv":
        raise DataError(f"{key}: {path.name}: a .csv file cannot hold conversations; write .jsonl or .parquet")
    columnar = path.suffix.lower() == ".parquet"
    skipped: Counter[str] = Counter()
    conversations = []
    for number, row in read_rows(path, key):
        try:
            if isinstance(row, DataError):
                raise BadRow("malformed", str(row))
            conversations.append(parse_conversation(row, columnar=columnar))
        except BadRow as bad:
            if on_bad_line == "stop":
                raise DataError(
                    f"{key}: {path.name} line {number}: {bad}; mend it, or set data.on_bad_line: skip ({bad.reason})"
                ) from bad
            skipped[bad.reason] += 1
    if not conversations:
        counted = f" ({dict(skipped)} skipped)" if skipped else ""
        raise DataError(f"{key}: {path} holds no usable row{counted}")
    return conversations, skipped


def write_conversations(path: Path, conversations: Iterable[Conversation]) -> None:
    """Write conversations as JSONL, atomically; ``read_conversations`` gives the same back."""
    rows = ({"id": c.id} | c.wire for c in conversations)
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def parse_conversation(row: Any, *, columnar: bool = False, answered: bool = True) -> Conversation:
    """One row in OpenAI's shape.

    A field that is null is absent. Text in parts is joined. An assistant's content may be null where it calls tools.

    Args:
        row: ``{"messages": [...]}``, with ``tools`` and ``group`` if there are any. A message may have ``train``, and
            its reasoning as ``reasoning_content``, ``reasoning`` or ``thinking``.
        columnar: the row stood in a table, which gives each object the keys of all rows' objects; so arguments and
            tools must be JSON strings there.
        answered: whether an assistant must have spoken, as in what is learned from.

    Raises:
        BadRow: names the field, the value seen and the value wanted.
    """
    if not isinstance(row, dict):
        raise BadRow("malformed", f"an object with the key 'messages' is wanted, this is {type(row).__name__}")
    messages = row.get("messages")
    if not isinstance(messages, list) or (answered and not messages):
        keys = ", ".join(map(str, row))
        raise BadRow("no messages", f"messages is {_shown(messages)}, a list of messages is wanted; keys here: {keys}")
    parsed = tuple(_message(message, f"messages[{i}]", columnar) for i, message in enumerate(messages))
    if answered and not any(message.role == "assistant" for message in parsed):
        raise BadRow("no assistant", "no message has the role 'assistant', so there is nothing to learn from")
    tools = _tools(row.get("tools"), columnar)
    conversation = Conversation(parsed, tools, _optional_string(row, "group", "group"))
    try:
        _encode(conversation)
    except UnicodeEncodeError as error:
        raise BadRow("malformed", f"the text holds half a surrogate pair ({error.object[error.start]!r})") from error
    return conversation


def _encode(conversation: Conversation) -> None:
    """Raise where a text cannot be written; only what is deep is walked by a JSON encoder."""
    for message in conversation.messages:
        for text in (message.content, message.reasoning, message.name, message.tool_call_id, conversation.group):
            if text is not None:
                text.encode()
        if message.tool_calls:
            json.dumps(message.wire, ensure_ascii=False).encode()
    if conversation.tools:
        json.dumps(conversation.tools, ensure_ascii=False).encode()


def _message(row: Any, where: str, columnar: bool) -> Message:
    if not isinstance(row, dict):
        raise BadRow("malformed", f"{where} is {_shown(row)}, an object with role and content is wanted")
    role: Any = row.get("role")
    if role not in _ROLES:
        cure = "; call it 'tool'" if role == "function" else ""
        raise BadRow("unknown role", f"{where}.role is {_shown(role)}, wanted one of {', '.join(_ROLES)}{cure}")
    if row.get("function_call") is not None:
        raise BadRow("bad tool call", f"{where}.function_call is the retired form; write it as tool_calls")
    calls = _tool_calls(row.get("tool_calls"), f"{where}.tool_calls", columnar)
    if calls and role != "assistant":
        raise BadRow("bad tool call", f"{where}.tool_calls stands in a message of role {role!r}, wanted 'assistant'")
    reasoning = {name: row[name] for name in _REASONING if row.get(name) is not None}
    if len({repr(text) for text in reasoning.values()}) > 1:
        raise BadRow("malformed", f"{where} has different texts under {' and '.join(reasoning)}; keep one")
    if reasoning and role != "assistant":
        raise BadRow("malformed", f"{where}.{next(iter(reasoning))} stands in a message of role {role!r}; leave it out")
    train = row.get("train")
    if train is not None and (not isinstance(train, bool) or (train and role != "assistant")):
        wanted = "true or false" if role == "assistant" else f"false or absent where the role is {role!r}"
        raise BadRow("malformed", f"{where}.train is {_shown(train)}, wanted {wanted}")
    return Message(
        role=role,
        content=_content(row.get("content"), f"{where}.content", empty=bool(calls)),
        tool_calls=calls,
        tool_call_id=_optional_string(row, "tool_call_id", f"{where}.tool_call_id"),
        name=_optional_string(row, "name", f"{where}.name"),
        reasoning=_optional_string(reasoning, next(iter(reasoning)), f"{where}.reasoning") if reasoning else None,
        train=train,
    )


def _content(value: Any, where: str, empty: bool) -> str:
    if isinstance(value, str):
        return value
    if value is None and empty:
        return ""
    if isinstance(value, list):
        for i, part in enumerate(value):
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise BadRow(
                    "no text", f'{where}[{i}] is {_shown(part)}, only text is read: {{"type": "text", "text": "..."}}'
                )
        return "".join(part["text"] for part in value)
    wanted = "a string or a list of text parts is wanted (null only beside tool_calls)"
    raise BadRow("no text", f"{where} is {_shown(value)}, {wanted}")


def _tool_calls(value: Any, where: str, columnar: bool) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise BadRow("bad tool call", f"{where} is {_shown(value)}, a list is wanted")
    calls = []
    for i, call in enumerate(value):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(
                "bad tool call",
                f'{where}[{i}] is {_shown(call)}, wanted {{"function": {{"name": "...", "arguments": ...}}}}',
            )
        arguments = _parsed(function.get("arguments"), f"{where}[{i}].function.arguments", "bad tool call", columnar)
        if not isinstance(arguments, dict):
            # Where the model wrote the string, the model is at fault.
            raise (BadCall if isinstance(function.get("arguments"), str) else BadRow)(
                "bad tool call",
                f"{where}[{i}].function.arguments is {_shown(arguments)}, an object or its JSON is wanted",
            )
        calls.append(ToolCall(_optional_string(call, "id", f"{where}[{i}].id"), function["name"], arguments))
    return tuple(calls)


def _tools(value: Any, columnar: bool) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    tools = _parsed(value, "tools", "bad tools", columnar and value != [])
    if not isinstance(tools, list):
        raise BadRow("bad tools", f"tools is {_shown(tools)}, a list of schemas is wanted")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(
                "bad tools", f'tools[{i}] is {_shown(tool)}, wanted {{"type": "function", "function": {{"name": ..}}}}'
            )
    return tuple(tools)


def _parsed(value: Any, where: str, reason: str, columnar: bool) -> Any:
    """A JSON value that may be written as a string."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError as error:
            bad = BadCall if reason == "bad tool call" else BadRow
            raise bad(reason, f"{where} is {_shown(value)}, which is no JSON ({error})") from error
    if columnar and value is not None:
        raise BadRow(
            reason,
            f"{where} is {_shown(value)}; in Parquet an object gets the keys of all rows, so write it as a JSON string",
        )
    return value


def _optional_string(row: dict[str, Any], name: str, where: str) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise BadRow("malformed", f"{where} is {_shown(value)}, a string is wanted")
    return value


def _shown(value: Any) -> str:
    text = "absent or null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

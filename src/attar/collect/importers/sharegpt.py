"""ShareGPT: ``{"conversations": [{"from": "human", "value": "..."}, ...]}``, with the roles that data sets use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attar.collect.importers.found import Found, each_row, loaded, shown, tools_in
from attar.data.conversations import BadRow

__all__ = ["has_conversations", "read_sharegpt"]

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model", "claude"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
    "function_call": "function_call",
}


def has_conversations(row: dict[str, Any]) -> bool:
    """Whether a row is of ShareGPT's shape."""
    turns = loaded(row.get("conversations"))
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]


@each_row
def read_sharegpt(row: dict[str, Any]) -> Iterator[Found]:
    """A conversation a row. A call is a turn ``function_call``, its result an ``observation``; neither has an id."""
    turns = loaded(row.get("conversations"))
    if not isinstance(turns, list):
        raise BadRow("no messages", f"conversations is {shown(turns)}, wanted a list of turns")
    messages: list[dict[str, Any]] = []
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    left_out: list[str] = []
    for number, turn in enumerate(turns):
        messages.append(_message(turn, f"conversations[{number}]"))
        left_out += [f"turn.{key}" for key in turn if key not in ("from", "value", "weight", "loss") and turn[key]]
    yield Found(
        messages,
        tools_in(row.get("tools")),
        meta={"id": row.get("id"), "model": row.get("model")},
        left_out=tuple(left_out),
    )


def _message(turn: Any, where: str) -> dict[str, Any]:
    speaker = turn.get("from") if isinstance(turn, dict) else None
    role = _ROLES.get(str(speaker))
    if role is None:
        raise BadRow("unknown role", f"{where}.from is {shown(speaker)}, known are {', '.join(_ROLES)}")
    message: dict[str, Any] = {"role": role, "content": turn.get("value")}
    if role == "function_call":
        made = loaded(turn.get("value"))
        calls = made if isinstance(made, list) else [made]
        if not all(isinstance(call, dict) and "name" in call for call in calls):
            raise BadRow(
                "bad tool call", f'{where}.value is {shown(made)}, wanted {{"name": "...", "arguments": {{}}}}'
            )
        wire = [{"function": {"name": c["name"], "arguments": c.get("arguments", {})}} for c in calls]
        message = {"role": "assistant", "content": "", "tool_calls": wire}
    learned = turn.get("weight", turn.get("loss"))
    if learned is not None and message["role"] == "assistant":
        message["train"] = bool(learned)
    return message

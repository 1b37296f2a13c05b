"""Data sets of TRL's types: prompt and completion, and preference pairs, of which only what was preferred is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attar.collect.importers.found import Found, each_row, messages_in, shown, tools_in, wire_messages
from attar.data.conversations import BadRow

__all__ = ["has_prompt_or_pair", "read_trl"]


def has_prompt_or_pair(row: dict[str, Any]) -> bool:
    """Whether a row has the columns of one of the types."""
    if "messages" in row or "response" in row:
        return False
    return (
        {"prompt", "completion"} <= set(row)
        or {"chosen", "rejected"} <= set(row)
        or {"preferred_output", "non_preferred_output"} <= set(row)
    )


@each_row
def read_trl(row: dict[str, Any]) -> Iterator[Found]:
    """A conversation a row, plain or conversational; OpenAI's own preference files as well."""
    if row.get("completions") is not None:
        raise BadRow("stepwise", "a list of rated steps is no answer that was preferred")
    if row.get("label") in (False, "False", "false", 0, "0") and "completion" in row:
        raise BadRow("undesired", "the row's label says that its completion is not wanted")
    pair = "chosen" in row or "preferred_output" in row
    asked, tools = row.get("prompt"), row.get("tools")
    if "preferred_output" in row:
        given = row.get("input")
        asked = given.get("messages") if isinstance(given, dict) else given
        tools = given.get("tools") if isinstance(given, dict) else tools
    answered = (
        row["preferred_output"] if "preferred_output" in row else row["chosen"] if pair else row.get("completion")
    )
    before, lost = _turns(asked, "prompt", "user") if asked not in (None, "") else ([], [])
    after, more = _turns(answered, "chosen" if pair else "completion", "assistant")
    # Messages of the prompt are read, not learned; without a prompt of its own a pair holds whole conversations.
    for message in before:
        if message.get("role") == "assistant":
            message["train"] = False
    given_up = ["rejected answer"] if pair else []
    yield Found(before + after, tools_in(tools), meta={"id": row.get("id")}, left_out=(*lost, *more, *given_up))


def _turns(value: Any, key: str, role: str) -> tuple[list[dict[str, Any]], list[str]]:
    rows = messages_in(value)
    if rows is not None:
        return wire_messages(rows)
    if not isinstance(value, str) or not value:
        raise BadRow("no messages", f"{key} is {shown(value)}, wanted a text or a list of messages")
    return [{"role": role, "content": value}], []

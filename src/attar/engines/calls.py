"""What a local model wrote, as a message: its reasoning, its text and its calls of tools, each apart."""

from __future__ import annotations

import json
import re

from attar.data.conversations import BadRow, parse_conversation
from attar.data.types import Message

__all__ = ["CALL", "read_message"]

CALL = "<tool_call>"
"""what opens a call in the form that is read here, of Hermes and Qwen"""
_CALLS = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_THINK, _THOUGHT = "<think>", "</think>"


def read_message(text: str, *, tools: bool, thinking: bool) -> Message:
    """The message that a model's text is.

    Reasoning stands between ``<think>`` and ``</think>`` at the beginning; calls, where tools are on offer, are JSON
    between ``<tool_call>`` and ``</tool_call>``.

    Args:
        text: what the model wrote.
        tools: whether tools were on offer.
        thinking: whether the prompt has opened the reasoning.

    Raises:
        BadRow: ``bad tool call``: one is not closed, or is no JSON object with a name and arguments.
    """
    reasoning = None
    if thinking or text.lstrip().startswith(_THINK):
        before, _, text = text.partition(_THOUGHT)
        reasoning = before.lstrip().removeprefix(_THINK).strip() or None
        text = text.lstrip("\n")
    calls = []
    if tools:
        for written in _CALLS.findall(text):
            try:
                calls.append({"function": json.loads(written)})
            except ValueError as error:
                raise BadRow("bad tool call", f"{written.strip()!r} is no JSON ({error})") from error
        text = _CALLS.sub("", text).strip() if calls else text
        if CALL in text:
            raise BadRow("bad tool call", f"{text[text.index(CALL) :]!r} is not closed")
    row = {"role": "assistant", "content": text, "tool_calls": calls or None, "reasoning": reasoning}
    [message] = parse_conversation({"messages": [row]}).messages
    return message

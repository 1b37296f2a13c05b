"""OpenAI and Anthropic JSON <-> messages, tools and replies.

What a message cannot hold is an error, except for what changes no word of it: cache marks, citations, an error flag on
a tool's result. Reasoning of earlier turns is read but not sent: OpenAI refuses the field, and Anthropic wants its own
signature on it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from attar.data.conversations import BadRow, parse_conversation
from attar.data.types import Conversation, Message, ToolCall

__all__ = [
    "FinishReason",
    "Reply",
    "Usage",
    "anthropic_body",
    "anthropic_tool",
    "openai_body",
    "openai_tool",
    "parse_anthropic_message",
    "parse_anthropic_reply",
    "parse_anthropic_request",
    "parse_openai_reply",
]

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
_FINISHED: dict[str, FinishReason] = {
    **{reason: reason for reason in get_args(FinishReason)},
    "eos": "stop",
    "model_length": "length",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


@dataclass(frozen=True)
class Usage:
    """What a server says that it billed, in tokens."""

    prompt_tokens: int
    """cached ones included"""
    completion_tokens: int
    """reasoning included"""
    cached_tokens: int = 0
    """of the prompt, read from a cache"""
    cache_written_tokens: int = 0
    """of the prompt, written to a cache, which Anthropic bills at more"""


@dataclass(frozen=True)
class Reply:
    """A response in either shape, read."""

    message: Message
    finish_reason: FinishReason
    usage: Usage | None
    """None where the server does not say"""
    model: str
    """as the server names it"""
    logprobs: tuple[dict[str, Any], ...] | None = None
    """OpenAI's records, one a token of the text: ``token``, ``logprob``, ``top_logprobs``"""


def openai_body(
    model: str,
    messages: Sequence[Message],
    *,
    max_tokens: int,
    limit: Literal["max_completion_tokens", "max_tokens"] = "max_tokens",
    tools: Sequence[dict[str, Any]] = (),
    tool_choice: str | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    stop: Sequence[str] = (),
    seed: int | None = None,
    schema: dict[str, Any] | None = None,
    top_logprobs: int | None = None,
) -> dict[str, Any]:
    """The body of a request to ``/v1/chat/completions``; what is None or empty is left out.

    Args:
        model: its name at the server.
        messages: without their reasoning and marks for training. A tool call without an id gets one.
        max_tokens: of the answer.
        limit: what the server calls that; OpenAI itself wants the first, most others know only the second.
        tools: OpenAI schemas.
        tool_choice: ``auto``, ``none``, ``required``, or the name of a tool.
        temperature: of sampling.
        top_p: of sampling.
        stop: texts that end the answer.
        seed: of sampling.
        schema: JSON schema of the answer's text.
        top_logprobs: likeliest tokens wanted at each position.
    """
    sent = [replace(message, reasoning=None, train=None).wire for message in _with_ids(messages)]
    body: dict[str, Any] = {"model": model, "messages": sent, limit: max_tokens}
    named = tool_choice not in (None, "auto", "none", "required")
    optional = {
        "tools": list(tools) or None,
        "tool_choice": {"type": "function", "function": {"name": tool_choice}} if named else tool_choice,
        "temperature": temperature,
        "top_p": top_p,
        "stop": list(stop) or None,
        "seed": seed,
        "response_format": schema
        and {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
        "logprobs": None if top_logprobs is None else True,
        "top_logprobs": top_logprobs,
    }
    return body | {key: value for key, value in optional.items() if value is not None}


def anthropic_body(
    model: str,
    messages: Sequence[Message],
    *,
    max_tokens: int,
    tools: Sequence[dict[str, Any]] = (),
    tool_choice: str | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    stop: Sequence[str] = (),
    schema: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The body of a request to ``/v1/messages``; see :func:`openai_body`.

    System messages at the head stand in ``system``; answers of tools stand together in a user's message.
    """
    rest = deque(_with_ids(messages))
    system = []
    while rest and rest[0].role in ("system", "developer"):
        system.append(rest.popleft().content)
    choices = {"auto": {"type": "auto"}, "none": {"type": "none"}, "required": {"type": "any"}}
    body: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "messages": _anthropic_turns(rest)}
    optional = {
        "system": "\n\n".join(system) or None,
        "tools": [anthropic_tool(tool) for tool in tools] or None,
        "tool_choice": choices.get(tool_choice, {"type": "tool", "name": tool_choice}) if tool_choice else None,
        "temperature": temperature,
        "top_p": top_p,
        "stop_sequences": list(stop) or None,
        "output_config": schema and {"format": {"type": "json_schema", "schema": schema}},
    }
    return body | {key: value for key, value in optional.items() if value is not None}


def anthropic_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """An OpenAI schema of a tool in Anthropic's shape."""
    function = tool["function"]
    kept = {key: function[key] for key in ("name", "description", "strict") if function.get(key) is not None}
    return kept | {"input_schema": function.get("parameters") or {"type": "object", "properties": {}}}


def openai_tool(tool: Any) -> dict[str, Any]:
    """A tool in Anthropic's shape as an OpenAI schema.

    Raises:
        BadRow: it is one that Anthropic's servers run themselves.
    """
    if not isinstance(tool, dict) or not isinstance(tool.get("name"), str) or "input_schema" not in tool:
        raise BadRow("bad tools", f'{_shown(tool)} is no tool with a schema: {{"name": "...", "input_schema": {{}}}}')
    kept = {key: tool[key] for key in ("name", "description") if tool.get(key) is not None}
    strict = {} if tool.get("strict") is None else {"strict": tool["strict"]}
    return {"type": "function", "function": kept | {"parameters": tool["input_schema"]} | strict}


def parse_openai_reply(body: Any) -> Reply:
    """Read a response of ``/v1/chat/completions`` with one choice.

    Raises:
        BadRow: it is none, or its message cannot be read (``bad tool call``: arguments that are no JSON).
    """
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadRow("malformed", f"a response with one choice is wanted, this is {_shown(body)}")
    [choice] = choices
    row = choice.get("message")
    if not isinstance(row, dict):
        raise BadRow("malformed", f"choices[0].message is {_shown(row)}, an object is wanted")
    refusal = row.get("refusal")
    # A reply without text is whole: cut while it was thinking, or refused.
    row = {"role": "assistant"} | row | {"content": row.get("content") or refusal or ""}
    [message] = parse_conversation({"messages": [row]}).messages
    reason = "content_filter" if refusal else _finished(choice.get("finish_reason"), "choices[0].finish_reason")
    # A named tool choice ends with "stop" at some servers.
    reason = "tool_calls" if message.tool_calls and reason == "stop" else reason
    logprobs = (choice.get("logprobs") or {}).get("content")
    return Reply(
        message,
        reason,
        _openai_usage(body.get("usage")),
        str(body.get("model") or ""),
        None if logprobs is None else tuple(logprobs),
    )


def parse_anthropic_reply(body: Any) -> Reply:
    """Read a response of ``/v1/messages``.

    Raises:
        BadRow: it is none, or holds a block that is no text, thinking or tool call.
    """
    if not isinstance(body, dict) or not isinstance(body.get("content"), list):
        raise BadRow("malformed", f"a message with a list of blocks is wanted, this is {_shown(body)}")
    message = _assistant(body["content"], "content")
    reason = _finished(body.get("stop_reason"), "stop_reason")
    usage = body.get("usage")
    counted = None
    if isinstance(usage, dict):
        written, read = _count(usage, "cache_creation_input_tokens"), _count(usage, "cache_read_input_tokens")
        prompt = _count(usage, "input_tokens") + written + read
        counted = Usage(prompt, _count(usage, "output_tokens"), read, written)
    return Reply(message, reason, counted, str(body.get("model") or ""))


def parse_anthropic_request(body: Any) -> Conversation:
    """The messages and tools of a request to ``/v1/messages``: it may lack an assistant's message.

    Raises:
        BadRow: names the field, the value seen and the value wanted.
    """
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise BadRow("no messages", f"an object with a list of messages is wanted, this is {_shown(body)}")
    system = body.get("system")
    messages = [] if system in (None, [], "") else [Message("system", _text(system, "system", "\n\n"))]
    for number, row in enumerate(body["messages"]):
        messages += parse_anthropic_message(row, f"messages[{number}]")
    return Conversation(tuple(messages), tuple(openai_tool(tool) for tool in body.get("tools") or ()))


def parse_anthropic_message(row: Any, where: str = "message") -> list[Message]:
    """One message in Anthropic's shape: the results of tools that it holds, then what is left of it.

    Raises:
        BadRow: names the field, the value seen and the value wanted.
    """
    role = row.get("role") if isinstance(row, dict) else None
    if role not in ("user", "assistant", "system"):
        raise BadRow("unknown role", f"{where}.role is {_shown(role)}, wanted user, assistant or system")
    content = row.get("content")
    if role == "assistant":
        return [Message(role, content) if isinstance(content, str) else _assistant(content, f"{where}.content")]
    if not isinstance(content, list):
        return [Message(role, _text(content, f"{where}.content"))]
    results, rest = [], []
    for number, block in enumerate(content):
        if isinstance(block, dict) and block.get("type") == "tool_result":
            told = block.get("content")
            text = "" if told is None else _text(told, f"{where}.content[{number}].content")
            results.append(Message("tool", text, tool_call_id=block.get("tool_use_id")))
        else:
            rest.append(block)
    return [*results, *([Message(role, _text(rest, f"{where}.content"))] if rest else [])]


def _with_ids(messages: Iterable[Message]) -> list[Message]:
    """The messages, each tool call with an id and each tool's answer with that of its call; both APIs want them."""
    identified = []
    waiting: deque[str] = deque()
    for number, message in enumerate(messages):
        if message.tool_calls:
            calls = tuple(
                call if call.id is not None else replace(call, id=f"call_{number}_{i}")
                for i, call in enumerate(message.tool_calls)
            )
            waiting = deque(call.id for call in calls if call.id is not None)
            message = replace(message, tool_calls=calls)
        elif message.role == "tool" and message.tool_call_id is None and waiting:
            message = replace(message, tool_call_id=waiting.popleft())
        elif message.role == "tool" and message.tool_call_id in waiting:
            waiting.remove(str(message.tool_call_id))
        identified.append(message)
    return identified


def _anthropic_turns(messages: Iterable[Message]) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for message in messages:
        if message.role == "tool":
            if not results:
                turns.append({"role": "user", "content": results})
            results.append({"type": "tool_result", "tool_use_id": message.tool_call_id, "content": message.content})
            continue
        results = []
        if message.role == "assistant" and message.tool_calls:
            text = [{"type": "text", "text": message.content}] if message.content else []
            calls = [
                {"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments}
                for call in message.tool_calls
            ]
            turns.append({"role": "assistant", "content": [*text, *calls]})
        else:
            role = "system" if message.role == "developer" else message.role
            turns.append({"role": role, "content": message.content})
    return turns


def _assistant(blocks: Any, where: str) -> Message:
    if not isinstance(blocks, list):
        raise BadRow("malformed", f"{where} is {_shown(blocks)}, a text or a list of blocks is wanted")
    text, thoughts, calls = [], [], []
    for number, block in enumerate(blocks):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            text.append(_text([block], where))
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        elif kind == "tool_use":
            if not isinstance(block.get("name"), str) or not isinstance(block.get("input"), dict):
                raise BadRow("bad tool call", f"{where}[{number}] is {_shown(block)}, a name and an input are wanted")
            calls.append(ToolCall(block.get("id"), block["name"], block["input"]))
        elif kind != "redacted_thinking":
            raise BadRow("no text", f"{where}[{number}] is {_shown(block)}, wanted text, thinking or tool_use")
    return Message("assistant", "".join(text), tuple(calls), reasoning="\n".join(thoughts) or None)


def _text(value: Any, where: str, between: str = "") -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadRow("no text", f"{where} is {_shown(value)}, a text or a list of blocks is wanted")
    for number, block in enumerate(value):
        if not (isinstance(block, dict) and block.get("type") == "text" and isinstance(block.get("text"), str)):
            raise BadRow("no text", f"{where}[{number}] is {_shown(block)}, only blocks of text are read")
    return between.join(block["text"] for block in value)


def _finished(value: Any, where: str) -> FinishReason:
    if value not in _FINISHED:
        raise BadRow("unknown finish reason", f"{where} is {_shown(value)}, known are {', '.join(_FINISHED)}")
    return _FINISHED[value]


def _openai_usage(usage: Any) -> Usage | None:
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details")
    cached = _count(details, "cached_tokens") if isinstance(details, dict) else 0
    return Usage(_count(usage, "prompt_tokens"), _count(usage, "completion_tokens"), cached)


def _count(row: dict[str, Any], key: str) -> int:
    value = row.get(key)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadRow("malformed", f"usage.{key} is {_shown(value)}, a number of tokens is wanted")
    return value


def _shown(value: Any) -> str:
    if value is None:
        return "absent or null"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    return repr(text) if len(text) <= 80 else repr(text[:77] + "...")

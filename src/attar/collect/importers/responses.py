"""A call of OpenAI's Responses API: a list of items in, a list of items out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attar.collect.importers.found import Found, loaded, shown, system_message, tools_in, usage_in
from attar.data.conversations import BadRow

__all__ = ["responses_call"]


def responses_call(request: dict[str, Any], response: Any) -> Found:
    """The conversation of a call to ``/v1/responses``; group and origin are not set.

    Raises:
        BadRow: an item is no text, call or result of a function, or the call goes on from one that the server keeps.
    """
    if not isinstance(response, dict) or not isinstance(response.get("output"), list):
        raise BadRow("unknown answer", f"the response is {shown(response)}, wanted one with a list 'output'")
    if request.get("previous_response_id") or request.get("conversation"):
        raise BadRow("kept by the server", "the earlier turns stand at the provider, not in the log")
    if response.get("status") not in (None, "completed", "incomplete"):
        raise BadRow("failed call", f"the response's status is {shown(response.get('status'))}")
    sent = loaded(request["input"])
    items = [{"role": "user", "content": sent}] if isinstance(sent, str) else sent
    if not isinstance(items, list):
        raise BadRow("no messages", f"request.input is {shown(sent)}, wanted a text or a list of items")
    context = system_message(request.get("instructions")) + _messages(items)
    answer = _messages(response["output"])
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        raise BadRow("unknown answer", f"the output makes {len(answer)} messages, wanted one of the assistant")
    usage = usage_in(response.get("usage"))
    cut = response.get("status") == "incomplete"
    reason = (response.get("incomplete_details") or {}).get("reason")
    meta = {
        "id": response.get("id"),
        "model": response.get("model"),
        "timestamp": response.get("created_at"),
        "usage": usage,
        "finish_reason": ("content_filter" if reason == "content_filter" else "length")
        if cut
        else ("tool_calls" if "tool_calls" in answer[0] else "stop"),
    }
    tools = tools_in(request.get("tools"))
    return Found([*context, *answer], tools, meta=meta, exchange=True)


def _messages(items: Iterable[Any]) -> list[dict[str, Any]]:
    """Items as messages: reasoning, text and calls that follow one another are one message of the assistant."""
    messages: list[dict[str, Any]] = []
    open_answer: dict[str, Any] | None = None
    for item in items:
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "function_call_output":
            open_answer = None
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": _text(item.get("output"))})
        elif kind == "message" and item.get("role") != "assistant":
            open_answer = None
            messages.append({"role": item.get("role"), "content": _text(item.get("content"))})
        elif kind in ("message", "function_call", "reasoning"):
            if open_answer is None:
                open_answer = {"role": "assistant", "content": ""}
                messages.append(open_answer)
            _add(open_answer, kind, item)
        else:
            raise BadRow(
                "no text", f"an item is {shown(item)}, wanted a message, reasoning, or a function's call or output"
            )
    return messages


def _add(answer: dict[str, Any], kind: str, item: dict[str, Any]) -> None:
    if kind == "message":
        answer["content"] += _text(item.get("content"))
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        answer.setdefault("tool_calls", []).append(
            {"id": item.get("call_id"), "type": "function", "function": function}
        )
    else:
        parts = item.get("content") or item.get("summary") or []
        thought = "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
        if thought:
            earlier = answer.get("reasoning_content")
            answer["reasoning_content"] = thought if earlier is None else earlier + "\n" + thought


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text", "refusal"):
            raise BadRow("no text", f"a part is {shown(part)}, only text is read")
        texts.append(str(part.get("refusal" if kind == "refusal" else "text") or ""))
    return "".join(texts)

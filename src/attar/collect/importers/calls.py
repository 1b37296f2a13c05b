"""One call of a model, as logs hold it: what was sent and what came back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from attar.collect.importers.found import Found, loaded, messages_in, shown, system_message, tools_in, wire_messages
from attar.collect.importers.responses import responses_call
from attar.data.conversations import BadRow
from attar.data.wire import Reply, parse_anthropic_reply, parse_openai_reply

__all__ = ["read_call"]


def read_call(request: Any, response: Any, tools: Any = None) -> Iterator[Found]:
    """The conversations of a call, one for each of the choices that came back; group and origin are not set.

    Args:
        request: the body that was sent (OpenAI's chat or Responses API, Anthropic's messages), its messages alone, or
            a text; as an object or as JSON.
        response: the body that came back, a message, or a text.
        tools: those on offer, where they stand apart from the request.

    Raises:
        BadRow: names what cannot be read.
    """
    request, response = loaded(request), loaded(response)
    if isinstance(response, dict) and response.get("error"):
        raise BadRow("failed call", f"the response is an error: {shown(response['error'])}")
    if response in (None, "", {}, []):
        raise BadRow(
            "no answer", f"the response is {shown(response)}; where the log leaves contents out, switch them on"
        )
    if isinstance(request, dict) and "input" in request and "messages" not in request:
        yield responses_call(request, response)
        return
    sent, left_out = _sent(request)
    offered = tools_in(tools) or (tools_in(request.get("tools")) if isinstance(request, dict) else [])
    if isinstance(request, dict) and request.get("functions"):
        offered += tools_in(request["functions"])
    for answer, meta, lost in _answers(response):
        yield Found([*sent, answer], offered, meta=meta, exchange=True, left_out=(*left_out, *lost))


def _sent(request: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """The messages of a request in OpenAI's shape, and names of what was left out."""
    if isinstance(request, str) and request:
        return [{"role": "user", "content": request}], []
    rows = messages_in(request)
    system: list[dict[str, Any]] = []
    if rows is None and isinstance(request, dict):
        rows = messages_in(request.get("messages"))
        system = system_message(request.get("system"))
    if rows is None:
        keys = f"; keys here: {', '.join(map(str, request))}" if isinstance(request, dict) else ""
        raise BadRow("no messages", f"the request is {shown(request)}, wanted its messages{keys}")
    messages, left_out = wire_messages(rows)
    return system + messages, left_out


def _answers(response: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any], list[str]]]:
    """Each answer as a message, what is known about it, and names of what was left out of it."""
    if isinstance(response, str):
        yield {"role": "assistant", "content": response}, {}, []
    elif isinstance(response, dict) and isinstance(response.get("choices"), list) and response["choices"]:
        for choice in response["choices"]:
            yield _choice(response, choice)
    elif isinstance(response, dict) and response.get("type") == "message":
        yield _replied(parse_anthropic_reply(response), response, [])
    else:
        row = response[0] if isinstance(response, list) and len(response) == 1 else response
        if not isinstance(row, dict) or not ({"content", "tool_calls", "function_call"} & set(row)):
            raise BadRow("unknown answer", f"the response is {shown(response)}, wanted a body, a message or a text")
        [message], lost = wire_messages([{"role": "assistant"} | row])
        yield {"content": ""} | message, {}, lost


def _choice(response: dict[str, Any], choice: Any) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
        raise BadRow("unknown answer", f"a choice is {shown(choice)}, wanted one with a message")
    [message], lost = wire_messages([{"role": "assistant"} | choice["message"]])
    if choice["message"].get("refusal"):
        message["refusal"] = choice["message"]["refusal"]
    if choice.get("logprobs"):
        lost.append("logprobs")
    finish = choice.get("finish_reason")
    single = choice | {"message": message, "finish_reason": "tool_calls" if finish == "function_call" else finish}
    return _replied(parse_openai_reply(response | {"choices": [single]}), response, lost)


def _replied(
    reply: Reply, response: dict[str, Any], lost: list[str]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    usage = None if reply.usage is None else {key: count for key, count in asdict(reply.usage).items() if count}
    meta = {
        "id": response.get("id"),
        "model": reply.model or None,
        "usage": usage,
        "finish_reason": reply.finish_reason,
    }
    return reply.message.wire, meta, lost

"""OpenTelemetry `gen_ai` spans and events as OTLP JSON, in the forms that instrumentations have written so far.

Today's convention puts ``gen_ai.input.messages``, ``gen_ai.output.messages``, ``gen_ai.system_instructions`` and
``gen_ai.tool.definitions`` on the span, or on one event of it. Before, each message was an event
(``gen_ai.user.message`` .. ``gen_ai.choice``), of a span or as a log record; OpenLLMetry counted attributes
(``gen_ai.prompt.0.role``). https://github.com/open-telemetry/semantic-conventions-genai
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from attar.collect.importers.found import Found, instant, loaded, messages_in, shown, tools_in, usage_in, wire_messages
from attar.collect.importers.otel_parts import any_value, attributes, numbered, part_messages
from attar.data.conversations import BadRow

__all__ = ["has_spans", "read_otel"]

_EVENTS = {f"gen_ai.{role}.message": role for role in ("system", "user", "assistant", "tool")} | {
    "gen_ai.choice": "choice"
}
_FINISHED = {"tool_call": "tool_calls", "tool_use": "tool_calls", "max_tokens": "length", "end_turn": "stop"}
_CALLS = ("chat", "generate_content", "text_completion", "completion")
# Spans whose log records wait for their answer; a log that never answers must not fill the memory.
_WAITING = 10_000


def has_spans(row: dict[str, Any]) -> bool:
    """Whether a row is an OTLP export of spans or logs, or one span as SDKs print it."""
    return "resourceSpans" in row or "resourceLogs" in row or _printed(row)


def _printed(row: dict[str, Any]) -> bool:
    return isinstance(row.get("context"), dict) and "trace_id" in row["context"] and "attributes" in row


def read_otel(rows: Iterable[dict[str, Any]]) -> Iterator[Found | BadRow]:
    """The calls of models among the spans and log records of a file.

    Log records of one span may stand in different rows: they wait until its choice has come.
    """
    waiting: OrderedDict[tuple[str, str], _Records] = OrderedDict()
    for row in rows:
        answered: dict[tuple[str, str], None] = {}
        for span in _spans(row):
            try:
                yield from _span(span)
            except BadRow as bad:
                yield bad
        for record in _logs(row):
            try:
                yield from _record(record, waiting, answered)
            except BadRow as bad:
                yield bad
        # Further choices of a call come with the first.
        for key in answered:
            yield from _answered(waiting.pop(key))
        while len(waiting) > _WAITING:
            waiting.popitem(last=False)
            yield BadRow("no answer", f"{_WAITING} later calls began before this one's choice came")
    for _ in waiting:
        yield BadRow("no answer", "log records of a span without its gen_ai.choice")


def _answered(records: _Records) -> Iterator[Found | BadRow]:
    try:
        yield from records.found()
    except BadRow as bad:
        yield bad


def _spans(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Spans with attributes as plain objects; those of the resource are not looked at."""
    if _printed(row):
        trace = {"traceId": row["context"]["trace_id"], "startTimeUnixNano": row.get("start_time")}
        failed = (row.get("status") or {}).get("status_code") == "ERROR"
        yield row | trace | {"attributes": attributes(row["attributes"]), "failed": failed}
    for resource in row.get("resourceSpans") or ():
        for scope in resource.get("scopeSpans") or ():
            for span in scope.get("spans") or ():
                failed = (span.get("status") or {}).get("code") in (2, "STATUS_CODE_ERROR")
                yield span | {"attributes": attributes(span.get("attributes")), "failed": failed}


def _logs(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for resource in row.get("resourceLogs") or ():
        for scope in resource.get("scopeLogs") or ():
            for record in scope.get("logRecords") or ():
                yield record | {"attributes": attributes(record.get("attributes"))}


def _span(span: dict[str, Any]) -> Iterator[Found]:
    own = span["attributes"]
    operation = own.get("gen_ai.operation.name")
    if operation is not None and operation not in _CALLS:
        raise BadRow("no model call", f"gen_ai.operation.name is {operation!r}")
    if operation is None and not any(key.startswith("gen_ai.") for key in own):
        raise BadRow("no model call", f"the span {span.get('name')!r} has no gen_ai attributes")
    if span["failed"] or own.get("error.type"):
        raise BadRow("failed call", f"the span ended in an error: {own.get('error.type')}")
    events = [(event.get("name"), attributes(event.get("attributes"))) for event in span.get("events") or ()]
    for name, of_event in events:
        if name == "gen_ai.client.inference.operation.details":
            own = own | of_event
    meta = _meta(own, span.get("startTimeUnixNano"))
    group = _group(own, span.get("traceId"))
    if "gen_ai.output.messages" in own:
        yield from _described(own, meta, group)
        return
    messages = [_event_message(_EVENTS[name], of_event) for name, of_event in events if name in _EVENTS]
    if messages:
        yield from _from_events(messages, own, meta, group)
        return
    sent, answer = numbered(own, "gen_ai.prompt"), numbered(own, "gen_ai.completion")
    if not sent or not answer:
        raise BadRow("no contents", "the span holds no messages; switch the capture of message content on")
    tools = numbered(own, "llm.request.functions")
    rows, left_out = wire_messages([*sent, {"role": "assistant"} | answer[0]])
    for tool in tools:
        tool["parameters"] = loaded(tool.get("parameters"))
    yield Found(rows, tools_in(tools), group, meta, exchange=True, left_out=tuple(left_out))


def _record(
    record: dict[str, Any],
    waiting: OrderedDict[tuple[str, str], _Records],
    answered: dict[tuple[str, str], None],
) -> Iterator[Found]:
    own = record["attributes"]
    name = record.get("eventName") or own.get("event.name")
    body = any_value(record.get("body"))
    if name == "gen_ai.client.inference.operation.details":
        own = own | (body if isinstance(body, dict) else {})
        meta = _meta(own, record.get("timeUnixNano") or record.get("observedTimeUnixNano"))
        yield from _described(own, meta, _group(own, record.get("traceId")))
        return
    if name not in _EVENTS:
        raise BadRow("no model call", f"the log record {name!r} is no gen_ai event")
    key = (str(record.get("traceId")), str(record.get("spanId")))
    records = waiting.setdefault(key, _Records(_group(own, record.get("traceId"))))
    records.add(_EVENTS[name], body if isinstance(body, dict) else {}, own, record.get("timeUnixNano"))
    if _EVENTS[name] == "choice":
        answered[key] = None


class _Records:
    """The log records of one span."""

    def __init__(self, group: str | None) -> None:
        self._messages: list[tuple[str, dict[str, Any]]] = []
        self._meta: dict[str, Any] = {}
        self._group = group

    def add(self, kind: str, body: dict[str, Any], own: dict[str, Any], time: Any) -> None:
        self._messages.append(_event_message(kind, own | body))
        self._meta = _meta(own, time) | {key: value for key, value in self._meta.items() if value is not None}

    def found(self) -> Iterator[Found]:
        yield from _from_events(self._messages, {}, self._meta, self._group)


def _event_message(kind: str, own: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A message event's kind and its message; older ones hold all of it as JSON in one attribute."""
    whole = loaded(own.get("gen_ai.event.content"))
    own = own | whole if isinstance(whole, dict) else own
    if kind == "choice":
        message = loaded(own.get("message"))
        message = message if isinstance(message, dict) else {"content": message}
        message = {"role": "assistant", "tool_calls": loaded(own.get("tool_calls")), **message}
        return kind, message | {"finish_reason": own.get("finish_reason")}
    kept = {key: own.get(key) for key in ("role", "content", "tool_calls", "name")}
    message = {"role": kind} | {key: loaded(value) for key, value in kept.items() if value is not None}
    if isinstance(message.get("content"), (dict, list)) and isinstance(kept["content"], str):
        # A text that happens to be JSON stays a text, unless its parts say what they are.
        parts = message["content"]
        if isinstance(parts, list) and any(
            isinstance(p, dict) and ({"text", "toolUse", "toolResult"} & set(p)) for p in parts
        ):
            raise BadRow("no text", f"content is {shown(kept['content'])}, blocks of Bedrock are not read")
        message["content"] = kept["content"]
    if kind == "tool" or own.get("id") is not None:
        message["tool_call_id"] = own.get("id")
    return kind, message


def _from_events(
    messages: list[tuple[str, dict[str, Any]]], own: dict[str, Any], meta: dict[str, Any], group: str | None
) -> Iterator[Found]:
    sent = [message for kind, message in messages if kind != "choice"]
    choices = [message for kind, message in messages if kind == "choice"]
    if not choices:
        raise BadRow("no answer", "the events hold no gen_ai.choice")
    if not sent:
        raise BadRow("no contents", "the events hold no message that was sent")
    for choice in choices:
        finish = choice.pop("finish_reason", None)
        rows, left_out = wire_messages([*sent, {"content": ""} | {k: v for k, v in choice.items() if v is not None}])
        known = meta | {"finish_reason": _FINISHED.get(str(finish), finish) or meta.get("finish_reason")}
        tools = tools_in(own.get("gen_ai.tool.definitions"))
        yield Found(rows, tools, group, known, exchange=True, left_out=tuple(left_out))


def _described(own: dict[str, Any], meta: dict[str, Any], group: str | None) -> Iterator[Found]:
    """Calls whose messages stand in attributes; each message of the output is a choice."""
    system = part_messages([{"role": "system", "parts": loaded(own.get("gen_ai.system_instructions")) or []}], "\n\n")
    sent = part_messages(messages_in(own.get("gen_ai.input.messages")) or [])
    if not sent:
        raise BadRow("no contents", f"gen_ai.input.messages is {shown(own.get('gen_ai.input.messages'))}")
    outputs = messages_in(own.get("gen_ai.output.messages"))
    if outputs is None:
        raise BadRow("no answer", f"gen_ai.output.messages is {shown(own.get('gen_ai.output.messages'))}")
    tools = tools_in(own.get("gen_ai.tool.definitions"))
    for output in outputs:
        answer = part_messages([output])
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise BadRow("unknown answer", f"an output message is {shown(output)}, wanted one of the assistant")
        finish = output.get("finish_reason")
        known = meta | {"finish_reason": _FINISHED.get(str(finish), finish) or meta.get("finish_reason")}
        yield Found([*system, *sent, *answer], tools, group, known, exchange=True)


def _group(own: dict[str, Any], trace: Any) -> str | None:
    group = own.get("gen_ai.conversation.id") or own.get("session.id") or trace
    return None if group is None else str(group)


def _meta(own: dict[str, Any], time: Any) -> dict[str, Any]:
    counts = {
        "input_tokens": own.get("gen_ai.usage.input_tokens", own.get("gen_ai.usage.prompt_tokens")),
        "output_tokens": own.get("gen_ai.usage.output_tokens", own.get("gen_ai.usage.completion_tokens")),
        "cached_tokens": own.get("gen_ai.usage.cache_read.input_tokens"),
    }
    reasons = loaded(own.get("gen_ai.response.finish_reasons"))
    reason = reasons[0] if isinstance(reasons, list) and reasons else None
    return {
        "id": own.get("gen_ai.response.id"),
        "model": own.get("gen_ai.response.model") or own.get("gen_ai.request.model"),
        "timestamp": instant(time),
        "usage": usage_in(counts),
        "finish_reason": _FINISHED.get(str(reason), reason),
        "workload": own.get("gen_ai.agent.name"),
    }

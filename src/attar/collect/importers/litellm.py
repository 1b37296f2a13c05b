"""LiteLLM: rows of its spend logs, and the payloads that its logging callbacks write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from attar.collect.importers.calls import read_call
from attar.collect.importers.found import Found, each_row, instant, loaded, usage_in
from attar.data.conversations import BadRow

__all__ = ["has_call_type", "read_litellm"]

_CHATS = ("completion", "acompletion", "anthropic_messages", "responses", "aresponses")


def has_call_type(row: dict[str, Any]) -> bool:
    """Whether a row is a spend log or a standard logging payload."""
    return "call_type" in row and ("request_id" in row or "trace_id" in row or "model_group" in row)


@each_row
def read_litellm(row: dict[str, Any]) -> Iterator[Found]:
    """The call that a row holds. Contents stand in it only where `store_prompts_in_spend_logs` was on."""
    kind = row.get("call_type")
    # Pass-through routes write their path here.
    if kind not in _CHATS and not str(kind).endswith(("/chat/completions", "/v1/messages", "/responses")):
        raise BadRow("no model call", f"call_type is {kind!r}, wanted one of {', '.join(_CHATS)}")
    if row.get("status") == "failure":
        raise BadRow("failed call", f"status is failure: {str(row.get('error_str') or '')[:80]}")
    request = loaded(row.get("messages"))
    body = loaded(row.get("proxy_server_request"))
    body = loaded(body.get("body", body)) if isinstance(body, dict) else None
    parameters = loaded(row.get("model_parameters"))
    sent = body if isinstance(body, dict) and ("messages" in body or "input" in body) else None
    if sent is not None:
        request = sent
    if not request:
        raise BadRow("no contents", "the log holds no messages; set general_settings.store_prompts_in_spend_logs: true")
    tools = parameters.get("tools") if isinstance(parameters, dict) and sent is None else None
    group = row.get("session_id") or row.get("trace_id")
    meta = {
        "id": row.get("request_id") or row.get("id"),
        "model": row.get("model") or None,
        "timestamp": instant(row.get("startTime")),
        "user": row.get("end_user") or None,
        "workload": row.get("model_group") or None,
    }
    for found in read_call(request, row.get("response"), tools):
        known = found.meta | {key: value for key, value in meta.items() if value is not None}
        known["usage"] = found.meta.get("usage") or usage_in(row)
        yield replace(found, group=str(group) if group else None, meta=known)

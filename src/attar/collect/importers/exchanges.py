"""Logs of requests and responses, and what `attar record` writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from attar.collect.importers.calls import read_call
from attar.collect.importers.found import Found, each_row, instant, loaded
from attar.data.conversations import BadRow

__all__ = ["has_exchange", "read_exchanges"]


def has_exchange(row: dict[str, Any]) -> bool:
    """Whether a row holds a request and a response, each as a body."""
    return isinstance(loaded(row.get("request")), dict) and "response" in row and "call_type" not in row


@each_row
def read_exchanges(row: dict[str, Any]) -> Iterator[Found]:
    """The call that a row holds: ``request``, ``response``, and what is known about them."""
    status = row.get("status")
    if isinstance(status, int) and status >= 400:
        raise BadRow("failed call", f"status is {status}")
    if row.get("error"):
        raise BadRow("failed call", f"error is {str(row['error'])[:80]}")
    if row.get("complete") is False:
        raise BadRow("cut answer", f"the answer did not come whole: {str(row.get('problems'))[:80]}")
    request = loaded(row.get("request"))
    group = row.get("episode") or row.get("session_id") or row.get("conversation_id")
    meta = {
        "workload": row.get("workload") or row.get("workload_id"),
        "user": row.get("user") or row.get("client_id"),
        "timestamp": instant(row.get("timestamp")),
        "outcome": _outcome(row),
    }
    for found in read_call(request, row.get("response")):
        model = found.meta.get("model") or (request.get("model") if isinstance(request, dict) else None)
        known = found.meta | {key: value for key, value in meta.items() if value is not None} | {"model": model}
        yield replace(found, group=None if group is None else str(group), meta=known)


def _outcome(row: dict[str, Any]) -> Any:
    """What was said of the call: the recorder keeps a list, the last one holds."""
    told = row.get("outcomes")
    if isinstance(told, list) and told:
        return told[-1].get("outcome") if isinstance(told[-1], dict) else told[-1]
    return row.get("outcome")

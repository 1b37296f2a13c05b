"""Langfuse: observations and traces, as its pages export them (JSON, CSV), its API answers, and blob storage holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from attar.collect.importers.calls import read_call
from attar.collect.importers.found import Found, each_row, instant, loaded, usage_in
from attar.data.conversations import BadRow

__all__ = ["has_observation", "read_langfuse"]

_OTHERS = ("SPAN", "EVENT", "AGENT", "TOOL", "CHAIN", "RETRIEVER", "EVALUATOR", "EMBEDDING", "GUARDRAIL")


def has_observation(row: dict[str, Any]) -> bool:
    """Whether a row is an observation, a trace with its observations, or a page of either."""
    page = row.get("data")
    if isinstance(page, list) and "meta" in row:
        return bool(page) and isinstance(page[0], dict) and has_observation(page[0])
    if row.get("type") in ("GENERATION", *_OTHERS) and _either(row, "traceId", "trace_id"):
        return True
    return isinstance(loaded(row.get("observations")), list) and "input" in row and "output" in row


@each_row
def read_langfuse(row: dict[str, Any]) -> Iterator[Found | BadRow]:
    """The calls of models that a row holds; spans, tools and other observations are none."""
    page = row.get("data")
    if isinstance(page, list) and "meta" in row:
        for inner in page:
            yield from _row(inner)
        return
    yield from _row(row)


def _row(row: dict[str, Any]) -> Iterator[Found | BadRow]:
    observations = loaded(row.get("observations"))
    try:
        if not isinstance(observations, list):
            yield from _generation(row, {})
        elif any(not isinstance(item, dict) for item in observations):
            raise BadRow("no contents", "the trace lists its observations by id; export the observations")
    except BadRow as bad:
        yield bad
    for item in observations if isinstance(observations, list) else ():
        if isinstance(item, dict):
            try:
                yield from _generation(item, row)
            except BadRow as bad:
                yield bad


def _generation(row: dict[str, Any], trace: dict[str, Any]) -> Iterator[Found]:
    """The call of one observation; ``trace`` is the row that it stands in, if it stands in one."""
    if row.get("type") != "GENERATION":
        raise BadRow("no model call", f"the observation {row.get('name')!r} is of type {row.get('type')}")
    if row.get("level") == "ERROR":
        raise BadRow("failed call", f"level is ERROR: {_either(row, 'statusMessage', 'status_message')}")
    group = (
        _either(row, "sessionId", "session_id")
        or _either(trace, "sessionId", "session_id")
        or _either(row, "traceId", "trace_id")
        or trace.get("id")
    )
    usage = usage_in(_either(row, "usageDetails", "usage_details") or row.get("usage"))
    meta = {
        "id": row.get("id"),
        "model": _either(row, "providedModelName", "provided_model_name") or row.get("model") or None,
        "timestamp": instant(_either(row, "startTime", "start_time")),
        "usage": usage,
        "outcome": _scores(loaded(row.get("scores")) or loaded(trace.get("scores"))),
        "user": _either(row, "userId", "user_id") or _either(trace, "userId", "user_id"),
        "workload": row.get("name"),
    }
    for found in read_call(row.get("input"), row.get("output")):
        known = found.meta | {key: value for key, value in meta.items() if value is not None}
        yield replace(found, group=None if group is None else str(group), meta=known)


def _scores(scores: Any) -> dict[str, Any] | None:
    """Scores by their names: a list of objects from the API, or an object of lists from the pages."""
    if isinstance(scores, dict):
        return scores or None
    if not isinstance(scores, list):
        return None
    named = {
        str(score["name"]): score.get("stringValue") if score.get("value") is None else score["value"]
        for score in scores
        if isinstance(score, dict) and "name" in score
    }
    return named or None


def _either(row: dict[str, Any], *keys: str) -> Any:
    return next((row[key] for key in keys if row.get(key) not in (None, "")), None)

"""ATIF, the Agent Trajectory Interchange Format of Harbor, versions 1.0 to 1.8: one episode an object.

https://harborframework.com/docs/trajectory-format
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attar.collect.importers.found import Found, each_row, instant, shown, tools_in, usage_in
from attar.data.conversations import BadRow

__all__ = ["has_steps", "read_atif"]

_ROLES = {"system": "system", "user": "user", "agent": "assistant"}
_OUTCOMES = ("reward", "rewards", "score", "outcome", "status")


def has_steps(row: dict[str, Any]) -> bool:
    """Whether a row is a trajectory."""
    return str(row.get("schema_version", "")).startswith("ATIF-") and isinstance(row.get("steps"), list)


@each_row
def read_atif(row: dict[str, Any]) -> Iterator[Found | BadRow]:
    """The episode that a row holds, and those of agents that it called where they stand in it."""
    if not isinstance(row.get("steps"), list):
        raise BadRow("no messages", f"steps is {shown(row.get('steps'))}, wanted a list")
    yield from _trajectory(row, None)


def _trajectory(row: dict[str, Any], outer: str | None) -> Iterator[Found | BadRow]:
    """``outer`` is the group of the episode that this one was called in: they stay together."""
    name = outer or row.get("session_id") or row.get("trajectory_id")
    group = None if name is None else str(name)
    try:
        yield _episode(row, group)
    except BadRow as bad:
        yield bad
    for inner in row.get("subagent_trajectories") or ():
        if isinstance(inner, dict) and isinstance(inner.get("steps"), list):
            yield from _trajectory(inner, group)
        else:
            yield BadRow("no messages", f"subagent_trajectories holds {shown(inner)}")


def _episode(row: dict[str, Any], group: str | None) -> Found:
    agent = row["agent"] if isinstance(row.get("agent"), dict) else {}
    steps = row["steps"]
    messages: list[dict[str, Any]] = []
    left_out: list[str] = ["continued_trajectory_ref"] if row.get("continued_trajectory_ref") else []
    for number, step in enumerate(steps):
        if not isinstance(step, dict) or step.get("source") not in _ROLES:
            source = step.get("source") if isinstance(step, dict) else step
            raise BadRow("unknown role", f"steps[{number}].source is {shown(source)}, wanted {', '.join(_ROLES)}")
        messages.append(_message(step, f"steps[{number}]"))
        told, lost = _observed(step, f"steps[{number}].observation")
        messages += told
        left_out += lost
        metrics = step.get("metrics") or {}
        left_out += [
            f"metrics.{key}" for key in ("logprobs", "completion_token_ids", "prompt_token_ids") if metrics.get(key)
        ]
    final = row.get("final_metrics") or {}
    notes = {**(row.get("extra") or {}), **(final.get("extra") or {})}
    models = [step["model_name"] for step in steps if step.get("model_name")]
    meta = {
        "id": row.get("trajectory_id") or row.get("session_id"),
        "model": agent.get("model_name") or (models[0] if models else None),
        "timestamp": next((instant(step.get("timestamp")) for step in steps if step.get("timestamp")), None),
        "usage": usage_in(final),
        "outcome": {key: notes[key] for key in _OUTCOMES if notes.get(key) is not None} or None,
        "workload": agent.get("name"),
    }
    return Found(messages, tools_in(agent.get("tool_definitions")), group, meta, left_out=tuple(left_out))


def _message(step: dict[str, Any], where: str) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": _ROLES[step["source"]],
        "content": _content(step.get("message"), f"{where}.message"),
    }
    if step["source"] != "agent":
        return message
    if step.get("reasoning_content"):
        message["reasoning_content"] = step["reasoning_content"]
    calls = [
        {
            "id": call.get("tool_call_id"),
            "function": {"name": call.get("function_name"), "arguments": call.get("arguments")},
        }
        for call in step.get("tool_calls") or ()
        if isinstance(call, dict)
    ]
    if calls:
        message["tool_calls"] = calls
    # Copied steps were trained on where they stand first (v1.5); a step without a call of a model has no author (v1.7).
    if step.get("is_copied_context") or step.get("llm_call_count") == 0:
        message["train"] = False
    return message


def _observed(step: dict[str, Any], where: str) -> tuple[list[dict[str, Any]], list[str]]:
    """What the environment told: each call's result by its id; what belongs to no call is said by the user."""
    observation = step.get("observation")
    results = observation.get("results") if isinstance(observation, dict) else None
    messages: list[dict[str, Any]] = []
    left_out: list[str] = []
    for number, result in enumerate(results or ()):
        content = _content(result.get("content"), f"{where}.results[{number}].content")
        call = result.get("source_call_id")
        if call is not None:
            messages.append({"role": "tool", "tool_call_id": call, "content": content})
        else:
            messages.append({"role": "user" if step["source"] == "agent" else "system", "content": content})
        if result.get("subagent_trajectory_ref"):
            left_out.append("subagent_trajectory_ref")
    return messages, left_out


def _content(value: Any, where: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        return "".join(str(part.get("text") or "") for part in value)
    raise BadRow("no text", f"{where} is {shown(value)}, only text is read")

"""BFCL's entries as cases: the turns of the user, OpenAI schemas of the functions, the official answers."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from attar.agents.bfcl.wheel import official
from attar.data.types import Message

__all__ = ["CALLS", "LIVE", "MULTI_TURN", "PYTHON", "UNANSWERABLE", "Case", "cases", "tools"]

CALLS = ("simple_python", "multiple", "parallel", "parallel_multiple")
"""single-turn categories of the first release in which one or several calls are right"""
PYTHON = (*CALLS, "irrelevance")
"""all single-turn Python categories of the first release; in the last, no call is right"""
LIVE = (
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
    "live_irrelevance",
    "live_relevance",
)
"""single-turn categories written by users"""
MULTI_TURN = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
"""categories whose calls are executed"""

_TICKET = "wants a ticket by a string, where the function takes an integer"
UNANSWERABLE = {
    "live_simple_106-63-0": "required arguments have no allowed value",
    "live_simple_112-68-0": "required arguments have no allowed value",
    "live_multiple_862-181-3": "wants journey_start_time, which the function does not have",
    "live_multiple_964-207-0": "wants question, which the function does not have",
    "multi_turn_base_173": _TICKET,
    "multi_turn_miss_func_173": _TICKET,
    "multi_turn_miss_param_173": _TICKET,
    "multi_turn_long_context_173": _TICKET,
    "multi_turn_miss_func_49": "wants tail in a turn before it is on offer",
}
"""entries whose official answer nobody can give, each with what is wrong in it; environments leave them out"""

# Keywords of a JSON schema. Others (an "optional" of BFCL's own) say nothing to a validator and are left out.
_KEYWORDS = (
    "type", "description", "enum", "default", "properties", "required", "items", "format", "maximum", "minItems",
    "maxItems", "additionalProperties",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One entry."""

    id: str
    category: str
    turns: tuple[tuple[Message, ...], ...]
    """what the user says, turn by turn; empty in a turn that brings tools instead"""
    entry: dict[str, Any] = field(compare=False)
    """as the wheel's loader gives it; the checkers read it"""
    truth: tuple[Any, ...] | None = field(compare=False)
    """``possible_answer``: of a single turn the calls, each with its allowed values; of several, calls by turn; None
    where the category has none"""

    @property
    def requests(self) -> tuple[str, ...]:
        """The user's words, a message each."""
        return tuple(message.content for turn in self.turns for message in turn if message.role == "user")

    @property
    def functions(self) -> list[dict[str, Any]]:
        """The official descriptions of all functions on offer, those of later turns included."""
        return [*self.entry["function"], *(f for added in self.added.values() for f in added)]

    @property
    def added(self) -> dict[int, list[dict[str, Any]]]:
        """Descriptions of functions that come with a later turn, by its number."""
        return {int(turn): functions for turn, functions in self.entry.get("missed_function", {}).items()}


@functools.cache
def cases(category: str) -> tuple[Case, ...]:
    """The cases of a category, in the wheel's order.

    Raises:
        MissingExtra: the wheel is not installed.
    """
    wheel = official()
    entries = wheel.load_dataset_entry(category)
    truths: dict[str, Any] = {}
    if not category.endswith("relevance"):
        truths = {row["id"]: tuple(row["ground_truth"]) for row in wheel.load_ground_truth_entry(category)}
    return tuple(
        Case(
            entry["id"],
            category,
            tuple(tuple(Message(m["role"], m["content"]) for m in turn) for turn in entry["question"]),
            entry,
            truths[entry["id"]] if truths else None,
        )
        for entry in entries
    )


def tools(functions: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Official descriptions as OpenAI schemas, by the wheel's own converter.

    Types become JSON's ("dict" an object, "tuple" an array, "any" a string, as the official handlers have it), dots in
    names underscores, and what a function returns a part of its description. The converter leaves types that stand
    deeper than two levels, keywords of no schema, and enumerations that nothing can be a member of (texts where a
    number is wanted); all are mended here. Each function is converted once: the schemas are shared, not to be changed.
    """
    return tuple(_tool(json.dumps(function)) for function in functions)


@functools.cache
def _tool(function: str) -> dict[str, Any]:
    wheel = official()
    [tool] = wheel.convert_to_tool([json.loads(function)], wheel.types, wheel.style)
    parameters = _schema(tool["function"]["parameters"], wheel.types)
    return {"type": "function", "function": tool["function"] | {"parameters": parameters}}


def _schema(described: dict[str, Any], types: dict[str, str]) -> dict[str, Any]:
    schema = {name: described[name] for name in _KEYWORDS if name in described}
    if "type" in schema:
        schema["type"] = types[schema["type"]]
    if "properties" in schema:
        schema["properties"] = {name: _schema(inner, types) for name, inner in schema["properties"].items()}
    if "items" in schema:
        schema["items"] = _schema(schema["items"], types)
    if "enum" in schema and schema.get("type", "string") != "string":
        members = schema.pop("enum")
        # Of a list, it is what the items may be; of a number or a truth value, its members are often written as text.
        holder = schema.get("items", {}) if schema["type"] == "array" else schema
        readable = [_READ[holder["type"]](member) for member in members] if holder.get("type") in _READ else []
        if fitting := [member for member in readable if member is not None]:
            holder["enum"] = fitting
    return schema


def _number(member: Any) -> float | None:
    with contextlib.suppress(ValueError):
        number = float(member)
        return int(number) if number.is_integer() else number
    return None


_READ: dict[str, Callable[[Any], Any]] = {
    "string": lambda member: member if isinstance(member, str) else None,
    "integer": _number,
    "number": _number,
    "boolean": lambda member: {"true": True, "false": False}.get(str(member).lower()),
}

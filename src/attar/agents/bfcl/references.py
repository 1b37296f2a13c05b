"""The official answers as calls: what a student is trained on, and what the checkers must accept."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from attar.agents.bfcl.cases import UNANSWERABLE, Case
from attar.data.types import ToolCall

__all__ = ["executed_call", "reference_calls"]


def reference_calls(case: Case) -> tuple[ToolCall, ...]:
    """The calls of a single-turn case's official answer: of each argument the first value that is allowed.

    An argument whose first value is ``""``, BFCL's sign for one that may be missing, is left out where it may be. Names
    are those of the case's ``tools``.

    Raises:
        ValueError: the category has no official answer, or the case is one of ``UNANSWERABLE``.
    """
    if case.truth is None:
        raise ValueError(f"{case.id}: {case.category} has no official calls")
    if case.id in UNANSWERABLE:
        raise ValueError(f"{case.id}: nobody can give its official answer: {UNANSWERABLE[case.id]}")
    descriptions = {function["name"]: function["parameters"] for function in case.functions}
    calls = []
    for number, answer in enumerate(case.truth):
        [(name, allowed)] = answer.items()
        calls.append(ToolCall(f"call_{number}", name.replace(".", "_"), _arguments(allowed, descriptions[name])))
    return tuple(calls)


def _arguments(allowed: Mapping[str, list[Any]], described: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {}
    for name, values in allowed.items():
        # Two answers name an argument that the function does not have; it may be missing.
        parameter = described["properties"].get(name)
        if parameter is None:
            continue
        if name in described["required"] and parameter["type"] != "string":
            values = [value for value in values if value != ""]
        elif values[0] == "" and name not in described["required"]:
            continue
        chosen[name] = _value(values[0], parameter)
    return chosen


def _value(value: Any, parameter: Mapping[str, Any]) -> Any:
    """An allowed value without its alternatives: objects, and objects in a list, state those for each of their keys."""
    if isinstance(value, dict):
        return {key: values[0] for key, values in value.items() if values[0] != ""}
    if isinstance(value, list) and parameter.get("items", {}).get("type") == "dict":
        return [_value(item, {}) for item in value]
    return value


def executed_call(text: str, classes: Sequence[type[Any]]) -> ToolCall:
    """A call as multi-turn answers write it, ``mv('a', destination='b')``, its arguments by name.

    It is parsed, not evaluated.

    Args:
        text: the call.
        classes: whose methods may be called; positional arguments get their names from the signature.

    Raises:
        ValueError: it is no call of one of their methods with literal arguments.
    """
    tree = ast.parse(text.strip(), mode="eval").body
    name = tree.func.id if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) else ""
    method = next((getattr(kind, name) for kind in reversed(classes) if hasattr(kind, name)), None)
    if method is None or not isinstance(tree, ast.Call):
        raise ValueError(f"{text!r}, wanted a call of a method of {', '.join(kind.__name__ for kind in classes)}")
    positional = [ast.literal_eval(value) for value in tree.args]
    named = {keyword.arg or "**": ast.literal_eval(keyword.value) for keyword in tree.keywords}
    names = list(inspect.signature(method).parameters)[1:] if positional else ()
    return ToolCall(None, name, dict(zip(names, positional, strict=False)) | named)

"""Whether a call is one that the tools on offer take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jsonschema
import referencing.exceptions

from attar.data.types import ToolCall

__all__ = ["CallChecker", "Misfit"]

# Data sets have few tools; the cache only must not grow without end where they have many.
_REMEMBERED = 4096


class Misfit(NamedTuple):
    """Why a call is not taken."""

    reason: str
    """``unknown tool``, ``bad tools`` (the schema is of no use) or ``tool call`` (the arguments do not fit)"""
    detail: str
    """from the schema's side only: a value may be what nobody should see"""


class CallChecker:
    """Checks calls against schemas, each of which is read once.

    Schemas are JSON Schema 2020-12 unless ``$schema`` says otherwise, and are never fetched: a reference that leaves
    the schema makes it one that cannot be used.
    """

    def __init__(self) -> None:
        self._validators: dict[str, Any] = {}

    def __call__(self, call: ToolCall, tools: Sequence[dict[str, Any]]) -> Misfit | None:
        """What is wrong with a call of one of these tools (OpenAI schemas); None if nothing is."""
        offered = [tool["function"] for tool in tools if tool["function"]["name"] == call.name]
        if not offered:
            names = ", ".join(tool["function"]["name"] for tool in tools) or "none"
            return Misfit("unknown tool", f"calls {call.name!r}, on offer: {names}")
        try:
            error = jsonschema.exceptions.best_match(self._validator(offered[0]).iter_errors(call.arguments))
        except (jsonschema.SchemaError, referencing.exceptions.Unresolvable) as unusable:
            detail = f"the schema of {call.name!r} cannot be used: {str(unusable).splitlines()[0]}"
            return Misfit("bad tools", detail)
        if error is None:
            return None
        wanted = json.dumps(error.validator_value, ensure_ascii=False)[:80]
        return Misfit("tool call", f"({call.name}): {error.json_path} breaks {error.validator}: {wanted}")

    def _validator(self, function: dict[str, Any]) -> Any:
        schema = function.get("parameters")
        schema = {} if schema is None else schema
        key = json.dumps(schema)
        if key not in self._validators:
            if len(self._validators) >= _REMEMBERED:
                self._validators.clear()
            kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
            kind.check_schema(schema)
            self._validators[key] = kind(schema, registry=referencing.Registry())
        return self._validators[key]

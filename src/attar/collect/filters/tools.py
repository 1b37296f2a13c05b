"""Tool calls that the tools on offer would not take."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import referencing.exceptions

from attar.collect.rows import Row
from attar.data.types import Conversation

__all__ = ["Calls"]

# Data sets have few tools; the cache only must not grow without end where they have many.
_REMEMBERED = 4096


class Calls:
    """Drops a row with a call of a tool that is not on offer, or with arguments that do not fit its JSON schema.

    Schemas are JSON Schema 2020-12 unless ``$schema`` says otherwise, and are never fetched: a reference that leaves
    the schema makes it one that cannot be used.
    """

    def __init__(self) -> None:
        self._validators: dict[str, Any] = {}

    def __call__(self, row: Row) -> tuple[str, str] | None:
        """Look at every call of the assistant."""
        example = row.example
        if not isinstance(example, Conversation):
            return None
        for i, message in enumerate(example.messages):
            for j, call in enumerate(message.tool_calls):
                where = f"messages[{i}].tool_calls[{j}]"
                offered = [tool["function"] for tool in example.tools if tool["function"]["name"] == call.name]
                if not offered:
                    names = ", ".join(tool["function"]["name"] for tool in example.tools) or "none"
                    return "unknown tool", f"{where} calls {call.name!r}, on offer: {names}"
                try:
                    error = jsonschema.exceptions.best_match(self._validator(offered[0]).iter_errors(call.arguments))
                except (jsonschema.SchemaError, referencing.exceptions.Unresolvable) as unusable:
                    return "bad tools", f"the schema of {call.name!r} cannot be used: {str(unusable).splitlines()[0]}"
                if error is not None:
                    # The schema's side only: the value may be what nobody should see.
                    wanted = json.dumps(error.validator_value, ensure_ascii=False)[:80]
                    return "tool call", f"{where} ({call.name}): {error.json_path} breaks {error.validator}: {wanted}"
        return None

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

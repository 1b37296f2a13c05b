"""Whether tools can be offered at all: each has a name of its own and a schema that some arguments fit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import jsonschema.exceptions
import jsonschema.validators
import referencing
import referencing.exceptions
import referencing.jsonschema

from attar.errors import BadTools

__all__ = ["check_tools", "impossible"]

# JSON Schema's types, with numbers parted into integers and the rest, so that bounds can be compared for both.
_ATOMS = {
    "null": {"null"},
    "boolean": {"boolean"},
    "string": {"string"},
    "array": {"array"},
    "object": {"object"},
    "number": {"integer", "fraction"},
    "integer": {"integer"},
}
_ALL = frozenset[str]().union(*_ATOMS.values())

_Resolver = Any


def check_tools(tools: Sequence[Any], owner: str) -> None:
    """Refuse tools that an agent could not call.

    Args:
        tools: as OpenAI schemas.
        owner: whose they are, for messages.

    Raises:
        BadTools: names the tool and what is wrong: no name, a name that stands twice, no schema, a schema that is
            not an object's, that is no JSON Schema, that refers to something outside it, or that nothing fits.
    """
    seen: set[str] = set()
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise BadTools(
                f"{owner}: tool {number} has no name; wanted "
                '{"type": "function", "function": {"name": "...", "description": "...", "parameters": {...}}}'
            )
        if name in seen:
            raise BadTools(f"{owner}: two tools are named {name!r}, and a call could not say which; rename one")
        seen.add(name)
        if wrong := _wrong(function.get("parameters")):
            raise BadTools(f"{owner}: tool {name!r}: {wrong}")


def _wrong(schema: Any) -> str | None:
    if schema is None:
        nothing = '{"type": "object", "properties": {}}'
        return f"it has no schema (parameters is absent or null); for a tool without arguments write {nothing}"
    if not isinstance(schema, dict) or schema.get("type") != "object":
        seen = schema.get("type") if isinstance(schema, dict) else schema
        return f'parameters must be the schema of an object, with "type": "object"; here that is {_shown(seen)}'
    try:
        json.dumps(schema, allow_nan=False)
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
        return impossible(schema)
    except jsonschema.exceptions.SchemaError as error:
        return f"parameters is no JSON Schema: {error.json_path}: {error.message}"
    except referencing.exceptions.Unresolvable as error:
        return f"parameters refers to {error.ref!r}, which is not in it; nothing is fetched, so put it under $defs"
    except (TypeError, ValueError, RecursionError) as error:
        return f"parameters is no JSON: {str(error).splitlines()[0]}"


def _shown(value: Any) -> str:
    text = "absent or null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def impossible(schema: dict[str, Any]) -> str | None:
    """Why nothing fits a schema, or nothing fits one of its properties; None where that is not plain to see.

    Only contradictions that one can point at are found (bounds that cross, a required property that may not be, an
    ``enum`` whose values break the rest); a schema that passes may still be impossible, one that is refused is.

    Args:
        schema: a valid JSON Schema of an object.

    Raises:
        referencing.exceptions.Unresolvable: it refers to something that is not in it.
    """
    resource = referencing.Resource.from_contents(schema, referencing.jsonschema.DRAFT202012)
    resolver = referencing.Registry().with_resource("", resource).resolver()
    for contents, inner in _subschemas(resource, resolver):
        if isinstance(contents, dict) and isinstance(contents.get("$ref"), str):
            inner.lookup(contents["$ref"])
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    if kind in (jsonschema.Draft3Validator, jsonschema.Draft4Validator):
        return None  # other keywords; what is checked here would be wrong there
    search = _Search(kind(schema, registry=referencing.Registry()))
    if not search.types(schema, resolver, "parameters", frozenset()):
        return f"no arguments fit its schema: {search.reasons[0]}"
    for name, part in schema.get("properties", {}).items():
        # `false` says on purpose that the property may not be.
        if part is not False and not search.types(part, resolver, f"parameters.properties.{name}", frozenset()):
            return f"no value fits the argument {name!r}: {search.reasons[0]}"
    return None


def _subschemas(resource: Any, resolver: _Resolver) -> Iterator[tuple[Any, _Resolver]]:
    yield resource.contents, resolver
    for part in resource.subresources():
        yield from _subschemas(part, resolver.in_subresource(part))


class _Search:
    """Looks for types of which a value may fit: too many where in doubt, never too few."""

    def __init__(self, validator: Any) -> None:
        self._validator = validator
        # Before draft 2019-09 what stands beside a reference is not read.
        self._alone = isinstance(validator, (jsonschema.Draft6Validator, jsonschema.Draft7Validator))
        self.reasons: list[str] = []
        """why nothing fits, the innermost first"""

    def types(self, schema: Any, resolver: _Resolver, where: str, entered: frozenset[int]) -> frozenset[str]:
        """The types of values that may fit.

        Args:
            schema: a schema, or true or false.
            resolver: of its references.
            where: its place, for the reasons.
            entered: schemas that are being looked at. One that cannot do without a value of its own kind has no
                smallest value, and so none.
        """
        if schema is False:
            return self._none(where, "it is false")
        if not isinstance(schema, dict):
            return _ALL
        if id(schema) in entered:
            return self._none(where, "a value would have to contain one of its own kind, without end")
        before = len(self.reasons)
        left = self._left(schema, resolver, where, entered | {id(schema)})
        if left:
            del self.reasons[before:]
        elif len(self.reasons) == before:
            self._none(where, "its parts allow no type in common")
        return left

    def _left(self, schema: dict[str, Any], resolver: _Resolver, where: str, entered: frozenset[int]) -> frozenset[str]:
        possible: frozenset[str] = _ALL
        if "$ref" in schema:
            found = resolver.lookup(schema["$ref"])
            possible = self.types(found.contents, found.resolver, f"{where}.$ref", entered)
            if self._alone:
                return possible
        if "type" in schema:
            named = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
            possible &= frozenset[str]().union(*(_ATOMS[name] for name in named))
        for values in ([schema["const"]] if "const" in schema else None, schema.get("enum")):
            if values is not None and not any(self._fits(schema, value) for value in values):
                return self._none(where, f"none of {_shown(values)} fits the rest of it")
        if schema.get("not") in (True, {}):
            return self._none(where, "it excludes everything ('not')")
        for number, part in enumerate(schema.get("allOf", ())):
            possible &= self.types(part, resolver, f"{where}.allOf[{number}]", entered)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                parts = (
                    self.types(part, resolver, f"{where}.{key}[{number}]", entered)
                    for number, part in enumerate(schema[key])
                )
                possible &= frozenset[str]().union(*parts)
        return possible - self._bounded(schema, resolver, where, entered, possible)

    def _bounded(
        self, schema: dict[str, Any], resolver: _Resolver, where: str, entered: frozenset[int], possible: frozenset[str]
    ) -> set[str]:
        """The types that bounds and parts exclude."""
        out: set[str] = set()
        if possible & {"integer", "fraction"}:
            out |= self._numbers(schema, where)
        if "string" in possible and self._crossed(schema, "minLength", "maxLength", where):
            out.add("string")
        if "array" in possible and (
            self._crossed(schema, "minItems", "maxItems", where)
            or (
                schema.get("minItems", 0) > len(schema.get("prefixItems", ()))
                and isinstance(schema.get("items"), (dict, bool))
                and not self.types(schema["items"], resolver, f"{where}.items", entered)
            )
        ):
            out.add("array")
        if "object" in possible and not self._object(schema, resolver, where, entered):
            out.add("object")
        return out

    def _object(self, schema: dict[str, Any], resolver: _Resolver, where: str, entered: frozenset[int]) -> bool:
        required, properties = schema.get("required", []), schema.get("properties", {})
        most = schema.get("maxProperties", math.inf)
        if most < max(len(set(required)), schema.get("minProperties", 0)):
            self._none(where, f"maxProperties {most} is less than it must have")
            return False
        for name in required:
            if name in properties:
                if not self.types(properties[name], resolver, f"{where}.properties.{name}", entered):
                    return False
            elif schema.get("additionalProperties") is False and not schema.get("patternProperties"):
                self._none(where, f"{name!r} is required, is not among its properties, and others are forbidden")
                return False
        return True

    def _numbers(self, schema: dict[str, Any], where: str) -> set[str]:
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
        bottom, top = max(low, above), min(high, below)
        if bottom > top or (bottom == top and (bottom == above or top == below)):
            ends = f"{'above' if bottom == above else 'from'} {bottom} {'and below' if top == below else 'to'} {top}"
            self._none(where, f"no number is {ends}")
            return {"integer", "fraction"}
        if math.isinf(bottom) or math.isinf(top):
            return set()
        first = math.floor(bottom) + 1 if bottom == above else math.ceil(bottom)
        last = math.ceil(top) - 1 if top == below else math.floor(top)
        out = set()
        if first > last:
            self._none(where, f"no integer is from {bottom} to {top}")
            out.add("integer")
        if bottom == top and float(bottom).is_integer():
            out.add("fraction")
        return out

    def _crossed(self, schema: dict[str, Any], low: str, high: str, where: str) -> bool:
        if schema.get(low, 0) > schema.get(high, math.inf):
            self._none(where, f"{low} {schema[low]} is above {high} {schema[high]}")
            return True
        return False

    def _fits(self, schema: dict[str, Any], value: Any) -> bool:
        return bool(self._validator.evolve(schema=schema).is_valid(value))

    def _none(self, where: str, why: str) -> frozenset[str]:
        self.reasons.append(f"{where}: {why}")
        return frozenset()

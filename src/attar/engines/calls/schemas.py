"""JSON schemas that a model can be held to; what cannot be is refused by name before anything is written."""

from __future__ import annotations

import json
from typing import Any

import jsonschema

from attar.errors import DataError, require

__all__ = ["LAYOUT", "check_schema", "close_objects"]

LAYOUT = (", ", ": ")
"""what JSON has between items and behind keys, as ``json.dumps`` and chat templates write it"""
# Keywords that apply other schemas to the same value: what they allow must not be closed from the outside.
_COMBINED = {"allOf", "anyOf", "oneOf", "$ref", "not", "if", "patternProperties", "unevaluatedProperties"}
_MANY = ("prefixItems", "anyOf", "oneOf")
_NAMED = ("properties", "$defs", "definitions")


def check_schema(schema: Any, where: str) -> None:
    """Refuse a schema that no value fits, or with a keyword that the grammar library cannot hold a model to.

    Args:
        schema: a JSON schema.
        where: it stands, for messages.

    Raises:
        DataError: names the place and the reason.
        MissingExtra: the grammar library is not installed.
    """
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        path = "".join(f"[{key!r}]" for key in error.absolute_path)
        raise DataError(f"{where} is no JSON schema: {path or 'it'}: {error.message}") from error
    matcher = require("llguidance", "grammar").LLMatcher
    failed, messages = matcher.validate_grammar_with_warnings(matcher.grammar_from_json_schema(json.dumps(schema)))
    if failed:
        problem = " ".join(messages[0].split())
        cure = "mend it" if problem.startswith("Unsatisfiable") else "write it without that, or ask unconstrained"
        raise DataError(f"{where} cannot be held to: {problem[:300]}; {cure}")
    if not _ends(schema, schema, frozenset()):
        raise DataError(f"{where}: no value fits: what it requires refers to itself without end; mend it")


def close_objects(schema: Any) -> Any:
    """The schema with ``additionalProperties: false`` wherever an object lists its properties and says nothing else.

    What fits this fits the schema as it was; a model does not invent arguments.
    """
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            made[key] = {name: close_objects(inner) for name, inner in value.items()}
        elif key in _MANY and isinstance(value, list):
            made[key] = [close_objects(inner) for inner in value]
        elif key in ("items", "additionalProperties"):
            made[key] = close_objects(value)
        else:
            made[key] = value
    listed = schema.get("properties")
    if (
        isinstance(listed, dict)
        and "additionalProperties" not in schema
        and not _COMBINED.intersection(schema)
        and set(schema.get("required", ())) <= set(listed)
    ):
        made["additionalProperties"] = False
    return made


def _ends(schema: Any, root: Any, opened: frozenset[str]) -> bool:
    """Whether a value of finite size can fit, as far as references to the schema itself decide it."""
    if not isinstance(schema, dict):
        return schema is not False
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference in opened:
            return False
        if not _ends(_resolved(reference, root), root, opened | {reference}):
            return False
    if not all(_ends(inner, root, opened) for inner in schema.get("allOf", ())):
        return False
    for key in ("anyOf", "oneOf"):
        if key in schema and not any(_ends(inner, root, opened) for inner in schema[key]):
            return False
    kinds = schema.get("type")
    kinds = {kinds} if isinstance(kinds, str) else set(kinds or ())
    if kinds - {"object", "array"} or "const" in schema or "enum" in schema:
        return True
    if not kinds and not {"properties", "items", "prefixItems", "required"} & schema.keys():
        return True
    listed = schema.get("properties", {})
    whole = all(_ends(listed.get(name, True), root, opened) for name in schema.get("required", ()))
    heads = schema.get("prefixItems", [])
    least = schema.get("minItems", 0)
    filled = all(_ends(inner, root, opened) for inner in heads[:least]) and (
        least <= len(heads) or _ends(schema.get("items", True), root, opened)
    )
    if not kinds:
        return True  # a number would fit as well
    return ("object" in kinds and whole) or ("array" in kinds and filled)


def _resolved(reference: str, root: Any) -> Any:
    """What a reference within the schema stands for; llguidance has refused any other."""
    value = root
    for part in reference.removeprefix("#").strip("/").split("/") if reference.strip("#/") else ():
        key = part.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value.get(key, True)
    return value

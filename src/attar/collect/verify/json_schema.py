"""Answers that must be JSON of a given shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jsonschema
import jsonschema.exceptions
import jsonschema.validators
import referencing
import referencing.exceptions

from attar.collect.verify.verdict import Verdict, Verifier, wanted
from attar.data.types import Conversation
from attar.errors import RecipeError
from attar.recipe import verify as recipe

__all__ = ["json_schema", "parse_strict"]


def json_schema(part: recipe.JsonSchema) -> Verifier:
    """Whether the answer's text is JSON that fits a schema: the recipe's, or the one in the prompt's row.

    Raises:
        RecipeError: the recipe's schema is none.
    """
    fixed: Any = None
    if part.fits is not None:
        fixed = _validator(part.fits)
        if isinstance(fixed, str):
            raise RecipeError(f"collect.generate.verify: fits is no JSON schema ({fixed})")

    def verify(conversation: Conversation, row: Mapping[str, Any]) -> Verdict:
        validator: Any = fixed
        if part.key is not None:
            schema = wanted(row, part.key)
            if schema is None:
                return Verdict(False, f"no {part.key} in the row")
            validator = _validator(schema)
            if isinstance(validator, str):
                return Verdict(False, f"{part.key} is no schema")
        text = conversation.messages[-1].content
        try:
            value = parse_strict(_unfenced(text) if part.fence else text)
            fits = validator.is_valid(value)
        except (ValueError, RecursionError):
            return Verdict(False, "not json")
        except referencing.exceptions.Unresolvable as error:
            raise RecipeError(
                f"collect.generate.verify: the schema refers to {error.ref!r}, which is not in it; nothing is fetched, "
                "so put it under $defs"
            ) from error
        return Verdict(True) if fits else Verdict(False, "does not fit")

    return verify


def _validator(schema: Any) -> Any:
    """A validator that fetches nothing, or, as a string, what is wrong with the schema."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            return str(error)
    if not isinstance(schema, dict):
        return f"{type(schema).__name__}, an object is wanted"
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.exceptions.SchemaError as error:
        return error.message
    return kind(schema, registry=referencing.Registry())


def parse_strict(text: str) -> Any:
    """A JSON value and nothing else: no ``NaN``, no key that stands twice in an object.

    Raises:
        ValueError: it is none.
        RecursionError: it is nested too deep.
    """
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key stands twice")
    return made


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _unfenced(text: str) -> str:
    """What stands in a Markdown fence, where that is all there is."""
    lines = text.strip().splitlines()
    if len(lines) >= 3 and lines[0].strip() in ("```", "```json") and lines[-1].strip() == "```":
        return "\n".join(lines[1:-1])
    return text

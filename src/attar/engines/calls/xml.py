"""Calls as Qwen3-Coder writes them: a function in angle brackets, its parameters as text between tags."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from attar.data.conversations import BadRow

__all__ = ["read_xml"]

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
# Templates write what is no object or list as Python does.
_WORDS = {"True": True, "False": False, "None": None}


def read_xml(text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The name and the arguments, as JSON, of ``<function=NAME><parameter=KEY>value</parameter></function>``.

    A value is the text itself where the tool's schema wants a string, or says nothing of it; else it is JSON.

    Raises:
        BadRow: ``bad tool call``: the text is of another form, or a value is not of its type.
    """
    whole = _FUNCTION.fullmatch(text)
    if whole is None:
        raise BadRow("bad tool call", f"{text[:200]!r} is no <function=NAME>...</function>")
    name, body = whole[1].strip(), whole[2]
    types = _types(name, tools)
    arguments: dict[str, Any] = {}
    position = 0
    while found := _PARAMETER.match(body, position):
        key, position = found[1].strip(), found.end()
        if key in arguments:
            raise BadRow("bad tool call", f"{name}: the parameter {key!r} stands twice")
        arguments[key] = _value(f"{name}: the parameter {key!r}", found[2], types.get(key, ("string",)))
    if body[position:].strip():
        raise BadRow("bad tool call", f"{name}: {body[position:].strip()[:200]!r} is no <parameter=KEY>...</parameter>")
    return name, json.dumps(arguments, ensure_ascii=False)


def _types(name: str, tools: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """What each parameter of a tool may be; a parameter of which nothing is said is left out."""
    schemas = [tool["function"].get("parameters") or {} for tool in tools if tool["function"]["name"] == name]
    found = {}
    for key, schema in (schemas[0].get("properties") or {} if schemas else {}).items():
        kinds = schema.get("type") if isinstance(schema, dict) else None
        if kinds:
            found[key] = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    return found


def _value(what: str, text: str, kinds: tuple[str, ...]) -> Any:
    if kinds == ("string",):
        return text
    try:
        return _WORDS[text.strip()] if text.strip() in _WORDS else json.loads(text)
    except ValueError as error:
        if "string" in kinds:
            return text
        raise BadRow("bad tool call", f"{what} is {text[:100]!r}, wanted {' or '.join(kinds)}") from error

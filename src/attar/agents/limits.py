"""Results of tools as the agent reads them: whatever a tool returns can be written, and none is without end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pydantic
import pydantic_core

__all__ = ["Written", "write_result"]


class Written(NamedTuple):
    """A tool's result as the agent reads it."""

    text: str
    left_out: int = 0
    """characters cut from its middle"""
    fault: str = ""
    """why the text is not what the tool returned, for counting: ``circular``, ``too deep``, ``no json`` or
    ``half a surrogate pair``; a cut is no fault"""


def write_result(result: Any, max_chars: int) -> Written:
    """A tool's result as text.

    A string stays as it is, anything else becomes JSON: dataclasses and pydantic models as objects, sets in sorted
    order, dates, paths and the like as pydantic writes them. What is no JSON (NaN, an open file, a circle) becomes a
    text that says so, without the object's own repr, which may hold addresses that differ from run to run. Of a text
    longer than ``max_chars`` the first and the last half of ``max_chars`` are kept, and a line between them says how
    many characters were left out.

    Args:
        result: what the tool returned.
        max_chars: characters kept at most, the line that tells of the cut not counted.

    Raises:
        ValueError: max_chars is below 2.
    """
    if max_chars < 2:
        raise ValueError(f"max_chars is {max_chars}; wanted 2 or more, one for each end of a long result")
    fault = ""
    if isinstance(result, str):
        text = str(result)
    else:
        try:
            text = json.dumps(result, ensure_ascii=False, allow_nan=False, default=_plain)
        except RecursionError:
            fault, text = "too deep", "[result not shown: it is nested too deep to be written as JSON]"
        except Exception as error:
            # An object of the environment's own may raise anything when it is looked at.
            fault = "circular" if "ircular reference" in str(error) else "no json"
            why = "it contains itself" if fault == "circular" else f"it is no JSON ({_why(error)})"
            text = f"[result not shown: {why}]"
    if not _encodable(text):
        # Such a string cannot be written to any file; U+FFFD is what decoders put in its place.
        fault = fault or "half a surrogate pair"
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    left_out = max(0, len(text) - max_chars)
    if left_out:
        tail = max_chars // 2
        text = f"{text[: max_chars - tail]}\n[... {left_out} characters left out ...]\n{text[-tail:]}"
    return Written(text, left_out, fault)


def _plain(value: Any) -> Any:
    """A value that is nearer to JSON."""
    if isinstance(value, pydantic.BaseModel):
        return value.model_dump()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (set, frozenset)):
        # Their own order differs from run to run.
        return sorted(value, key=repr)
    if isinstance(value, Iterator):
        raise TypeError(f"{type(value).__name__}, which may have no end; return a list")
    return pydantic_core.to_jsonable_python(value)


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

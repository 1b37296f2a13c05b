"""JSON objects that arrive in pieces: where they end, and what of them can be handed on before that."""

from __future__ import annotations

import json
import math
from typing import Any

from attar.data.conversations import BadRow

__all__ = ["CallObject", "load_object"]


def load_object(text: str, what: str) -> dict[str, Any]:
    """A JSON object, strictly read: no key twice, no number that JSON has not.

    Args:
        text: the JSON.
        what: it is, for messages.

    Raises:
        BadRow: ``bad tool call``: the text is none.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            raise ValueError(f"a key stands twice among {', '.join(key for key, _ in pairs)}")
        return made

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number} is no number of JSON")
        return value

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        raise BadRow("bad tool call", f"{what} {text[:200]!r} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadRow("bad tool call", f"{what} {text[:200]!r} is {type(value).__name__}, a JSON object is wanted")
    return value


class CallObject:
    """A JSON object that is a call, or the arguments of one, read character by character.

    Args:
        name_key: under which the call's name stands; None where the object is the arguments alone.
        arguments_key: under which the arguments stand.
    """

    def __init__(self, name_key: str | None, arguments_key: str) -> None:
        self._name_key, self._arguments_key = name_key, arguments_key
        self._raw: list[str] = []
        self._depth = 0
        self._in_string = self._escaped = False
        self._key: str | None = None
        self._wants_key = True
        self._string_start = 0
        # Where the arguments begin and end, where they are an object.
        self._start: int | None = None if name_key is not None else 0
        self._end: int | None = None
        self._sent = 0
        self.name: str | None = None
        """as soon as it is known"""
        self.done = False

    def feed(self, text: str) -> int:
        """Read on, at most up to the object's end.

        Returns:
            How many characters were read.
        """
        for count, character in enumerate(text, start=1):
            self._raw.append(character)
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
                    self._string_ended()
            elif character == '"':
                self._in_string, self._string_start = True, len(self._raw) - 1
            elif character in "{[":
                self._depth += 1
                if self._depth == 2 and character == "{" and self._takes(self._arguments_key) and self._start is None:
                    self._start = len(self._raw) - 1
            elif character in "}]":
                self._depth -= 1
                if self._start is not None and self._end is None and self._depth == (self._name_key is not None):
                    self._end = len(self._raw)
                if self._depth == 0:
                    self.done = True
                    return count
            elif self._depth == 1 and character == ",":
                self._wants_key = True
            elif self._depth == 1 and character == ":":
                self._wants_key = False
        return len(text)

    def fragment(self) -> str:
        """What of the arguments is new, as far as they are an object."""
        if self._start is None:
            return ""
        text = "".join(self._raw[self._start + self._sent : self._end])
        self._sent += len(text)
        return text

    @property
    def raw(self) -> str:
        """All that was read."""
        return "".join(self._raw)

    def _takes(self, key: str) -> bool:
        """Whether a value that begins here stands under the key."""
        return self._name_key is not None and not self._wants_key and self._key == key

    def _string_ended(self) -> None:
        if self._depth != 1 or self._name_key is None:
            return
        if not self._wants_key and self._key != self._name_key:
            return
        try:
            string = json.loads("".join(self._raw[self._string_start :]))
        except ValueError:
            return  # the whole is read once more when it is complete, and says what is wrong
        if self._wants_key:
            self._key = string
        elif self.name is None:
            self.name = string

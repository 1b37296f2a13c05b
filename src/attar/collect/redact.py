"""Personal data and secrets out of recorded text, before it is written.

What is found becomes its kind in brackets, ``[EMAIL]``, so that a student learns the place and not the value.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from attar.data.secrets import KINDS, Found, Rule, find, literals, matches, redact

__all__ = ["Redactor", "pseudonym"]

# Short texts without anything to find: a call says its keys, roles and names again and again.
_REMEMBERED = 10_000


class Redactor:
    """Takes out what its rules find.

    Args:
        rules: keys of ``attar.data.secrets.KINDS``.
        patterns: the user's own, name -> regular expression; applied first.
    """

    def __init__(self, rules: Iterable[str], patterns: Mapping[str, str]) -> None:
        own = [Rule(name, matches(re.compile(pattern))) for name, pattern in patterns.items()]
        self._rules = [*own, *(Rule(name, KINDS[name]) for name in rules)]
        self._clean: set[str] = set()

    def knowing(self, secrets: Iterable[str]) -> Redactor:
        """One that takes out these very strings as well: the credentials of the call that is being written."""
        literal = sorted({secret for secret in secrets if len(secret) >= 6}, key=len, reverse=True)
        if not literal:
            return self
        other = Redactor((), {})
        # Of this call alone, so that its memory is another.
        other._rules = [Rule("key", literals(literal)), *self._rules]
        return other

    def find(self, text: str) -> list[Found]:
        """What the rules find, in order; where two overlap, the earlier rule has it."""
        if text in self._clean:
            return []
        found = find(text, self._rules)
        if not found and len(text) < 64:
            self._clean.add(text)
            if len(self._clean) > _REMEMBERED:
                self._clean.clear()
        return found

    def text(self, text: str, counts: Counter[str]) -> str:
        """The text without what was found, which is counted by rule."""
        found = self.find(text)
        if not found:
            return text
        counts.update(item.kind for item in found)
        return redact(text, found)

    def value(self, value: Any, counts: Counter[str]) -> Any:
        """A JSON value with every string in it redacted, keys included."""
        if isinstance(value, str):
            return self.text(value, counts)
        if isinstance(value, dict):
            return {self.text(key, counts): self.value(item, counts) for key, item in value.items()}
        if isinstance(value, list):
            return [self.value(item, counts) for item in value]
        return value

    def pieces(self, pieces: list[str], counts: Counter[str]) -> list[str]:
        """Pieces of one text, redacted as the whole is.

        A placeholder stands in the piece in which what it replaces began; the rest of that is gone from the others.
        """
        found = self.find("".join(pieces))
        if not found:
            return pieces
        counts.update(item.kind for item in found)
        result, offset, first = [], 0, 0
        for piece in pieces:
            end, parts, at = offset + len(piece), [], offset
            for item in itertools.islice(found, first, None):
                if item.start >= end:
                    break
                if item.start >= offset:
                    parts += [piece[at - offset : item.start - offset], item.placeholder]
                at = min(item.end, end)
                first += item.end <= end
            parts.append(piece[at - offset :])
            result.append("".join(parts))
            offset = end
        return result

    def label(self, value: str | None) -> str | None:
        """A label as it is, or its pseudonym where it holds something to redact."""
        return value if value is None or not self.find(value) else pseudonym(value)


def pseudonym(label: str) -> str:
    """What stands for a label that is not written, the same every time."""
    return "sha256:" + hashlib.sha256(label.encode("utf-8", "surrogatepass")).hexdigest()[:16]

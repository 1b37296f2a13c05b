"""Personal data and secrets out of recorded text, before it is written.

Patterns find what has a shape: addresses, keys, numbers. What has none (a name, a street) needs the user's own. What is
found becomes its rule's name in brackets, ``[EMAIL]``, so that a student learns the place and not the value.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

__all__ = ["RULES", "Found", "Redactor", "pseudonym"]

# An international number (E.164, at most 15 digits), one of the North American plan, one with a trunk zero. Letters,
# digits and what base64 is made of may not touch it: an encoded picture holds no telephone numbers.
_PHONE = r"""(?x) (?<![\w+/=.,-]) (?:
    \+ [1-9] (?: [ .\-()/]{0,2} \d ){7,14}
  | (?: 1[ .-] )? (?: \(\d{3}\)[ ]? | \d{3}[ .-] ) \d{3}[ .-]\d{4}
  | \(?0\d{2,4}\)? (?: [ ]?[ /.-][ ]? \d{3,4} ) (?: [ -]? \d{2,5} ){1,2}
) (?! [\w+/=] | [.,-]\d )"""
_EMAIL = r"(?<![\w.+%-])[\w.+%-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+"
# Prefixes that their issuers document: OpenAI, Anthropic, OpenRouter (sk-), Stripe, AWS, GitHub, GitLab, Slack, Google,
# Hugging Face, npm, PyPI, Groq, xAI, SendGrid; JSON web tokens; whatever is called a bearer token; private keys.
_KEY = r"""(?x) (?<![A-Za-z0-9]) (?:
    sk-[\w-]{16,512} | [rs]k_(?:live|test)_\w{16,128} | (?:AKIA|ASIA)[0-9A-Z]{16} | gh[pousr]_\w{30,255}
  | github_pat_\w{22,255} | glpat-[\w-]{20,255} | xox[abeoprs]-[\w-]{10,255} | AIza[\w-]{35} | ya29\.[\w-]{20,2048}
  | hf_[A-Za-z0-9]{30,64} | npm_\w{36} | pypi-[\w-]{32,512} | gsk_\w{32,128} | xai-\w{32,128}
  | SG\.[\w-]{16,64}\.[\w-]{16,128} | eyJ[\w-]{8,4096}\.eyJ[\w-]{8,8192}\.[\w-]{8,2048}
  | (?i:bearer)\ +[\w.~+/-]{16,4096}=*
  | -----BEGIN[ ][A-Z ]{0,32}PRIVATE[ ]KEY-----[^-]{1,12000}-----END[ ][A-Z ]{0,32}PRIVATE[ ]KEY-----
)"""


class _Rule(NamedTuple):
    name: str
    pattern: re.Pattern[str]
    markers: tuple[str, ...] = ()
    """one of these stands in every text that the pattern finds; looked for first, as that is far quicker"""


_KEY_MARKERS = tuple(
    [
        "sk-",
        "k_live_",
        "k_test_",
        "AKIA",
        "ASIA",
        "ghp_",
        "gho_",
        "ghu_",
        "ghs_",
        "ghr_",
        "github_pat_",
        "glpat-",
        "xox",
        "AIza",
        "ya29.",
        "hf_",
        "npm_",
        "pypi-",
        "gsk_",
        "xai-",
        "SG.",
        "eyJ",
        "earer",
        "EARER",
        "PRIVATE",
    ]
)
RULES: Mapping[str, _Rule] = {
    "email": _Rule("email", re.compile(_EMAIL), ("@",)),
    "key": _Rule("key", re.compile(_KEY), _KEY_MARKERS),
    "phone": _Rule("phone", re.compile(_PHONE)),
}

# A search holds the interpreter, and with it all traffic: long texts are searched in windows. What a rule finds in a
# text longer than a window may have at most this many characters.
_WINDOW, _LONGEST = 1 << 17, 1 << 14


class Found(NamedTuple):
    """A stretch of a text that a rule found."""

    start: int
    end: int
    name: str

    @property
    def placeholder(self) -> str:
        """What stands there afterwards."""
        return f"[{self.name.upper()}]"


def _search(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    begin, length = 0, len(text)
    while begin < length:
        end = min(begin + _WINDOW, length)
        sure = end if end == length else end - _LONGEST
        resume = sure
        for match in pattern.finditer(text, begin, end):
            if match.start() >= sure and end < length:
                break
            if match.end() > match.start():
                yield match.span()
                resume = max(resume, match.end())
        begin = resume


class Redactor:
    """Takes out what its rules find.

    Args:
        rules: names of ``RULES``.
        patterns: the user's own, name -> regular expression; applied first.
    """

    def __init__(self, rules: Iterable[str], patterns: Mapping[str, str]) -> None:
        own = [_Rule(name, re.compile(pattern)) for name, pattern in patterns.items()]
        self._rules = [*own, *(RULES[name] for name in rules)]

    def knowing(self, secrets: Iterable[str]) -> Redactor:
        """One that takes out these very strings as well: the credentials of the call that is being written."""
        literal = sorted({secret for secret in secrets if len(secret) >= 6}, key=len, reverse=True)
        if not literal:
            return self
        other = Redactor((), {})
        pattern = re.compile("|".join(map(re.escape, literal)))
        other._rules = [_Rule("key", pattern, tuple(literal)), *self._rules]
        return other

    def find(self, text: str) -> list[Found]:
        """What the rules find, in order; where two overlap, the earlier rule has it."""
        found: list[Found] = []
        for rule in self._rules:
            if rule.markers and not any(marker in text for marker in rule.markers):
                continue
            for start, end in _search(rule.pattern, text):
                if all(end <= other.start or start >= other.end for other in found):
                    found.append(Found(start, end, rule.name))
        return sorted(found)

    def text(self, text: str, counts: Counter[str]) -> str:
        """The text without what was found, which is counted by rule."""
        found = self.find(text)
        if not found:
            return text
        counts.update(item.name for item in found)
        parts, at = [], 0
        for item in found:
            parts += [text[at : item.start], item.placeholder]
            at = item.end
        return "".join(parts) + text[at:]

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
        counts.update(item.name for item in found)
        result, offset = [], 0
        for piece in pieces:
            end, parts, at = offset + len(piece), [], offset
            for item in found:
                if item.end <= offset or item.start >= end:
                    continue
                if item.start >= offset:
                    parts += [piece[at - offset : item.start - offset], item.placeholder]
                at = min(item.end, end)
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

"""Personal data and secrets out of recorded text, before it is written.

Patterns find what has a shape: addresses, keys, numbers. What has none (a name, a street) needs the user's own. What is
found becomes its rule's name in brackets, ``[EMAIL]``, so that a student learns the place and not the value.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["RULES", "Found", "Redactor", "pseudonym"]

# What a search begins with decides its speed (a set of characters is skipped to, a lookbehind is not), and a search
# holds the interpreter, and with it all traffic. So addresses and keys are looked for around marks that stand in each,
# numbers from their first character, and the user's patterns in windows of the text.

# An international number (E.164, at most 15 digits), one of the North American plan, one with a trunk zero. Letters,
# digits and what base64 is made of may not touch it: an encoded picture holds no telephone numbers.
_PHONE = re.compile(
    r"""(?x) [+(0-9] (?<! [\w+/=.,-] . ) (?:
    (?<=\+) [1-9] (?: [ .\-()/]{0,2} [0-9] ){7,14}
  | (?<=\() [0-9]{3} \) [ ]? [0-9]{3} [ .-] [0-9]{4}
  | (?<=1) [ .-] (?: \( [0-9]{3} \) [ ]? | [0-9]{3} [ .-] ) [0-9]{3} [ .-] [0-9]{4}
  | (?<=[0-9]) [0-9]{2} [ .-] [0-9]{3} [ .-] [0-9]{4}
  | (?: (?<=\() 0 | (?<=0) ) [0-9]{2,4} \)? [ ]? [ /.-] [ ]? [0-9]{3,4} (?: [ -]? [0-9]{2,5} ){1,2}
) (?! [\w+/=] | [.,-][0-9] )""",
    re.DOTALL,
)
_LOCAL = re.compile(r"[\w.+%-]{1,64}$")
_DOMAIN = re.compile(r"@[\w-]{1,63}(?:\.[\w-]{1,63})+")
# Prefixes that their issuers document: OpenAI, Anthropic, OpenRouter (sk-), Stripe, AWS, GitHub, GitLab, Slack, Google,
# Hugging Face, npm, PyPI, Groq, xAI, SendGrid; JSON web tokens; whatever is called a bearer token; private keys.
_KEYS = {
    mark: re.compile("(?<![A-Za-z0-9])" + pattern)
    for mark, pattern in {
        "sk-": r"sk-[\w-]{16,512}",
        "sk_live_": r"sk_live_\w{16,128}",
        "sk_test_": r"sk_test_\w{16,128}",
        "rk_live_": r"rk_live_\w{16,128}",
        "AKIA": r"AKIA[0-9A-Z]{16}",
        "ASIA": r"ASIA[0-9A-Z]{16}",
        "ghp_": r"ghp_\w{30,255}",
        "gho_": r"gho_\w{30,255}",
        "ghs_": r"ghs_\w{30,255}",
        "ghu_": r"ghu_\w{30,255}",
        "github_pat_": r"github_pat_\w{22,255}",
        "glpat-": r"glpat-[\w-]{20,255}",
        "xox": r"xox[abeoprs]-[\w-]{10,255}",
        "AIza": r"AIza[\w-]{35}",
        "ya29.": r"ya29\.[\w-]{20,2048}",
        "hf_": r"hf_[A-Za-z0-9]{30,64}",
        "npm_": r"npm_\w{36}",
        "pypi-": r"pypi-[\w-]{32,512}",
        "gsk_": r"gsk_\w{32,128}",
        "xai-": r"xai-\w{32,128}",
        "SG.": r"SG\.[\w-]{16,64}\.[\w-]{16,128}",
        "eyJ": r"eyJ[\w-]{8,4096}\.eyJ[\w-]{8,8192}\.[\w-]{8,2048}",
        "Bearer ": r"Bearer +[\w.~+/-]{16,4096}=*",
        "bearer ": r"bearer +[\w.~+/-]{16,4096}=*",
        "-----BEGIN ": r"-----BEGIN [A-Z ]{0,32}PRIVATE KEY-----[^-]{1,12000}-----END [A-Z ]{0,32}PRIVATE KEY-----",
    }.items()
}
# What a pattern finds in a text longer than a window may have at most this many characters.
_WINDOW, _LONGEST = 1 << 17, 1 << 14

Span = tuple[int, int]


def _marks(mark: str, text: str) -> Iterator[int]:
    at = text.find(mark)
    while at >= 0:
        yield at
        at = text.find(mark, at + 1)


def _emails(text: str) -> Iterator[Span]:
    for at in _marks("@", text):
        local = _LOCAL.search(text[max(0, at - 64) : at])
        domain = _DOMAIN.match(text, at)
        if local is not None and domain is not None:
            yield at - len(local[0]), domain.end()


def _keys(text: str) -> Iterator[Span]:
    for mark, pattern in _KEYS.items():
        for at in _marks(mark, text):
            if (match := pattern.match(text, at)) is not None:
                yield match.span()


def _matches(pattern: re.Pattern[str]) -> Callable[[str], Iterator[Span]]:
    def find(text: str) -> Iterator[Span]:
        begin, length = 0, len(text)
        while begin < length:
            end = min(begin + _WINDOW, length)
            resume = sure = end if end == length else end - _LONGEST
            for match in pattern.finditer(text, begin, end):
                if match.start() >= sure and end < length:
                    break
                if match.end() > match.start():
                    yield match.span()
                    resume = max(resume, match.end())
            begin = resume

    return find


def _literals(secrets: Sequence[str]) -> Callable[[str], Iterator[Span]]:
    def find(text: str) -> Iterator[Span]:
        for secret in secrets:
            for at in _marks(secret, text):
                yield at, at + len(secret)

    return find


class _Rule(NamedTuple):
    name: str
    find: Callable[[str], Iterator[Span]]


RULES: Mapping[str, Callable[[str], Iterator[Span]]] = {"email": _emails, "key": _keys, "phone": _matches(_PHONE)}


class Found(NamedTuple):
    """A stretch of a text that a rule found."""

    start: int
    end: int
    name: str

    @property
    def placeholder(self) -> str:
        """What stands there afterwards."""
        return f"[{self.name.upper()}]"


class Redactor:
    """Takes out what its rules find.

    Args:
        rules: names of ``RULES``.
        patterns: the user's own, name -> regular expression; applied first.
    """

    def __init__(self, rules: Iterable[str], patterns: Mapping[str, str]) -> None:
        own = [_Rule(name, _matches(re.compile(pattern))) for name, pattern in patterns.items()]
        self._rules = [*own, *(_Rule(name, RULES[name]) for name in rules)]

    def knowing(self, secrets: Iterable[str]) -> Redactor:
        """One that takes out these very strings as well: the credentials of the call that is being written."""
        literal = sorted({secret for secret in secrets if len(secret) >= 6}, key=len, reverse=True)
        if not literal:
            return self
        other = Redactor((), {})
        other._rules = [_Rule("key", _literals(literal)), *self._rules]
        return other

    def find(self, text: str) -> list[Found]:
        """What the rules find, in order; where two overlap, the earlier rule has it."""
        found: list[Found] = []
        for rule in self._rules:
            for start, end in rule.find(text):
                place = bisect.bisect_left(found, (start,))
                before = found[place - 1].end if place else 0
                after = found[place].start if place < len(found) else len(text)
                if before <= start and end <= after:
                    found.insert(place, Found(start, end, rule.name))
        return found

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

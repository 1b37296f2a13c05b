"""Secrets and personal data in text: found by declared patterns, replaced by placeholders.

Patterns miss what nobody declared, such as a name or a street; they are a net, not a proof. Each kind is chosen for few
false alarms: a key has its issuer's prefix and length, a card has an issuer's prefix and a right check digit (ISO/IEC
7812-1, Luhn), a phone number has a country code or the punctuation of one.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

__all__ = ["KINDS", "Finder", "Found", "Rule", "find", "literals", "matches", "redact"]

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
        "-----BEGIN ": r"-----BEGIN [A-Z ]{0,32}PRIVATE KEY-----[^-]{1,12000}"
        r"(?:-----END [A-Z ]{0,32}PRIVATE KEY-----)?",
    }.items()
}
# What a pattern finds in a text longer than a window may have at most this many characters.
_WINDOW, _LONGEST = 1 << 17, 1 << 14

Span = tuple[int, int]
Finder = Callable[[str], Iterator[Span]]
"""The stretches of a text that a rule finds, in order."""

# 13 to 19 digits, single blanks or hyphens between them, of an issuer: Visa, Mastercard, American Express, Discover.
_CARD = re.compile(
    r"[2-6](?<![\d.,-].)(?:(?<=4)|(?<=5)[1-5]|(?<=2)[2-7]|(?<=3)[47]|(?<=6)(?:011|5))(?:[ -]?\d){11,18}(?![\d.,]?\d)"
)
# In an address, between the scheme and the host.
_CREDENTIALS = re.compile(r"[^\s/:@]{1,64}:[^\s/:@]{3,128}(?=@)")


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
        if mark not in text:
            continue
        for at in _marks(mark, text):
            if (match := pattern.match(text, at)) is not None:
                yield match.span()
    for at in _marks("://", text):
        if (match := _CREDENTIALS.match(text, at + 3)) is not None:
            yield match.span()


def _luhn(digits: str) -> bool:
    doubled = (sum(divmod(2 * int(d), 10)) for d in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def _cards(text: str) -> Iterator[Span]:
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if 13 <= len(digits) <= 19 and _luhn(digits):
            yield match.span()


def matches(pattern: re.Pattern[str]) -> Finder:
    """A rule of a pattern, such as the user's own; what it finds of no length counts for nothing."""

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


def literals(secrets: Sequence[str]) -> Finder:
    """A rule that finds these very strings."""

    def find(text: str) -> Iterator[Span]:
        for secret in secrets:
            for at in _marks(secret, text):
                yield at, at + len(secret)

    return find


KINDS: Mapping[str, Finder] = {"key": _keys, "card": _cards, "email": _emails, "phone": matches(_PHONE)}
"""What is known, by kind."""


class Rule(NamedTuple):
    """What is looked for, and the kind that it stands for."""

    kind: str
    find: Finder


class Found(NamedTuple):
    """A stretch of a text, and of what kind it is."""

    start: int
    end: int
    kind: str

    @property
    def placeholder(self) -> str:
        """What stands there afterwards."""
        return f"[{self.kind.upper()}]"


def find(text: str, rules: Sequence[Rule]) -> list[Found]:
    """What the rules find, in the text's order; where two overlap, the earlier rule has it."""
    found: list[Found] = []
    for rule in rules:
        for start, end in rule.find(text):
            place = bisect.bisect_left(found, (start,))
            before = found[place - 1].end if place else 0
            after = found[place].start if place < len(found) else len(text)
            if before <= start and end <= after:
                found.insert(place, Found(start, end, rule.kind))
    return found


def redact(text: str, found: Sequence[Found]) -> str:
    """The text with each stretch that was found replaced by its kind in brackets, ``[KEY]``."""
    parts, at = [], 0
    for hit in found:
        parts += [text[at : hit.start], hit.placeholder]
        at = hit.end
    return "".join(parts) + text[at:]

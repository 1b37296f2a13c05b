"""How rows become splits: what is dropped, what is held out. Shared by the tasks; each adds what only it has."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from attar.recipe.base import Part, Positive, unique

__all__ = [
    "REFUSALS",
    "Balance",
    "Decontaminate",
    "Length",
    "NearDuplicates",
    "Outcome",
    "Pattern",
    "Policy",
    "Private",
    "Shared",
    "Split",
]

Policy = Literal["drop", "redact", "keep"]

_CANNOT = r"(?:can['’]?t|cannot|won['’]?t|am unable|am not able|['’]m unable|['’]m not able)"
REFUSALS = (
    r"i(?:['’]?m| am) (?:very |really |so )?sorry,? but (?:i|as an)\b",
    rf"(?:i(?:['’]?m| am) (?:very |really |so )?sorry|i apologi[sz]e|unfortunately)[,.]? (?:but )?i ?{_CANNOT}\b",
    rf"i ?{_CANNOT} (?:to )?(?:help|assist|comply|provide|fulfil|do that|answer|continue|engage|discuss|support)\b",
    r"i must decline\b",
    rf"as an ai(?: language)?(?: model| assistant)?,? i ?(?:{_CANNOT}|don['’]?t have)\b",
)
"""How refusals of English-speaking models begin."""


def _compiled(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is no regular expression ({error})") from error
    return value


Pattern = Annotated[str, AfterValidator(_compiled)]


class NearDuplicates(Part):
    """Rows of which nearly all words, in nearly the same order, stand in an earlier row as well."""

    threshold: float = Field(default=0.8, ge=0.5, le=1, strict=False)
    """Jaccard similarity of the sets of shingles, of the whole and of the answers, from which a row is a duplicate"""
    shingle: Positive = 5
    """words of a shingle"""


class Decontaminate(Part):
    """What happens to rows to be trained on that tell a test case."""

    action: Literal["drop", "refuse"] = "drop"
    """drop them and count them, or refuse the run and list them"""
    ngram: Annotated[int, Field(ge=5)] | None = 13
    """a row that shares so many words in a row with a test case tells it (GPT-3, appendix C); None: only the same
    prompt and near duplicates do"""
    common: Positive = 10
    """words that more rows than this share are a turn of phrase, and tell nothing"""


class Length(Part):
    """Limits on what a row says, in characters, tools and roles not counted."""

    min_characters: Positive | None = None
    max_characters: Positive | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Length:
        low, high = self.min_characters, self.max_characters
        if low is not None and high is not None and low > high:
            raise ValueError(f"curate.length.min_characters: {low} is above max_characters, {high}")
        return self


class Private(Part):
    """Secrets and personal data: drop the row, put a placeholder in their place, or keep them."""

    keys: Policy = "redact"
    """API keys, access tokens, private keys, passwords in URLs"""
    cards: Policy = "redact"
    """payment cards: an issuer's prefix and a right check digit"""
    emails: Policy = "keep"
    phones: Policy = "keep"
    patterns: dict[str, Pattern] = Field(default_factory=dict)
    """your own regular expressions, by the word that stands in the placeholder"""
    patterns_policy: Policy = "redact"


class Outcome(Part):
    """What was said of a row afterwards, as `attar record` stores it and tracing tools export it."""

    failed: Literal["drop", "keep"] = "drop"
    """rows that failed: the outcome is false or says so, is an object with `solved: false` or its like, or is below
    `at_least`"""
    key: str = "outcome"
    """of a row or its `meta`; dots go deeper"""
    at_least: float | None = Field(default=None, strict=False)
    """a number from which an outcome is good; None: numbers tell no failure"""

    @model_validator(mode="after")
    def _used(self) -> Outcome:
        if self.failed == "keep" and self.at_least is not None:
            raise ValueError("curate.outcome.at_least: failed is keep, so nothing is dropped; leave it out")
        return self


class Balance(Part):
    """Caps; the rows that stay are a random sample."""

    source_key: str = "source"
    """key of a row or its `meta` that names where it comes from; dots go deeper"""
    per_source: Positive | None = None


class Split(Part):
    """What is held out."""

    by: Literal["random", "group", "time"] = "random"
    """random groups; the same, and every row must name its group; or the newest groups"""
    group_key: str | None = "group"
    """key of a row or its `meta` that names what stays on one side; dots go deeper. None: rows stand alone"""
    time_key: str = "created"
    """key of a row's time, in it or its `meta`, ISO 8601 or seconds since 1970, for `by: time`"""

    @model_validator(mode="after")
    def _possible(self) -> Split:
        if self.by == "group" and self.group_key is None:
            raise ValueError("curate.split.group_key: by: group needs the key of a row that names its group")
        return self


class Shared(Part):
    """What every task's curation has."""

    near_duplicates: NearDuplicates | None = NearDuplicates()
    """None keeps them"""
    decontaminate: Decontaminate = Decontaminate()
    length: Length = Length()
    languages: Annotated[tuple[str, ...], Field(strict=False), AfterValidator(unique)] = ()
    """codes of ISO 639-1 of the languages that are kept; none: all of them, and nothing is detected"""
    private: Private = Private()
    balance: Balance = Balance()
    split: Split = Split()

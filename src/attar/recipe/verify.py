"""How an answer is checked."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from attar.recipe.part import Part, Positive

__all__ = ["Exact", "Function", "JsonSchema", "Regex", "UnitTests", "Verifier"]


def _compiled(key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key}: {pattern!r} is no regular expression ({error})") from error


class Function(Part):
    """The user's own."""

    kind: Literal["function"]
    name: str = Field(pattern=r"^[\w.]+:\w+$")
    """`package.module:function` of (conversation, row) that returns a verdict, or whether the answer is right"""


class Regex(Part):
    """A pattern that stands in the answer's text."""

    kind: Literal["regex"]
    pattern: str

    @model_validator(mode="after")
    def _possible(self) -> Regex:
        _compiled("pattern", self.pattern)
        return self


class Exact(Part):
    """The right answer, or a list of right ones, which stands in the prompt's row."""

    kind: Literal["exact"]
    key: str = "answer"
    """of the row"""
    pattern: str | None = None
    """whose last match in the text, its first group, is the answer; None: the whole text"""
    compare: Literal["text", "number", "verbatim"] = "text"
    """text: case, white space, a full stop at the end and forms of one character apart; number: and by value, `$1,000`
    is `1000.0`; verbatim: only white space around it apart"""

    @model_validator(mode="after")
    def _possible(self) -> Exact:
        if self.pattern is not None and _compiled("pattern", self.pattern).groups < 1:
            raise ValueError(f"pattern: {self.pattern!r} has no group; put ( ) around the answer")
        return self


class JsonSchema(Part):
    """JSON of a given shape, and nothing beside it."""

    kind: Literal["json_schema"]
    fits: dict[str, Any] | None = None
    """the schema, where all prompts have the same"""
    key: str | None = None
    """of the row, where each prompt has its own"""
    fence: bool = False
    """whether the JSON may stand in a Markdown fence"""

    @model_validator(mode="after")
    def _possible(self) -> JsonSchema:
        if (self.fits is None) == (self.key is None):
            raise ValueError("json_schema: set fits, or key, one of the two")
        return self


class UnitTests(Part):
    """Python code that passes the tests in the prompt's row, run in a process of its own."""

    kind: Literal["unit_tests"]
    key: str = "tests"
    """of the row: a list of {call, args, kwargs, returns} or of {stdin, stdout}, or code with assertions"""
    timeout_s: float = Field(default=10.0, gt=0, strict=False)
    """of all calls together, or of each program"""
    memory_mb: Positive = 1024
    output_kb: Positive = 256
    """of a program; one that writes more is stopped"""
    isolation: Literal["required", "limits"] = "required"
    """required: without network, without other processes in sight, and with files that it can only read but for a
    folder of its own, which needs Linux with user namespaces; limits: only time, memory and files' sizes are limited
    where there are none, so that what a model wrote runs with your rights"""


Verifier = Annotated[Function | Regex | Exact | JsonSchema | UnitTests, Field(discriminator="kind")]

"""Answers that are Python code, checked by running it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from attar.collect.verify.sandbox import Limits, Ran, run_python
from attar.collect.verify.verdict import Verdict, Verifier, wanted
from attar.data.types import Conversation
from attar.recipe import verify as recipe

__all__ = ["code_of", "unit_tests"]

_FENCE = re.compile(r"^ {0,3}```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)^ {0,3}```[ \t]*$", re.MULTILINE | re.DOTALL)


def unit_tests(part: recipe.UnitTests) -> Verifier:
    """Whether the answer's code passes the tests in the prompt's row.

    Calls and programs are compared here, outside the process that runs the code, which never sees what is expected:
    printing it, stopping early or redefining equality helps nothing. Code with assertions runs beside the answer, which
    can reach it: stopping early is seen, redefining what the assertions use is not.
    """
    limits = Limits(part.timeout_s, part.memory_mb, part.output_kb, required=part.isolation == "required")

    def verify(conversation: Conversation, row: Mapping[str, Any]) -> Verdict:
        tests = wanted(row, part.key)
        if tests is None:
            return Verdict(False, f"no {part.key} in the row")
        code = code_of(conversation.messages[-1].content)
        if code is None:
            return Verdict(False, "no code")
        if isinstance(tests, str):
            return _ended(run_python(code, limits, tests=tests))
        if not isinstance(tests, list) or not all(isinstance(test, Mapping) for test in tests):
            return Verdict(False, f"{part.key} are no tests")
        if all({"call", "returns"} <= set(test) for test in tests):
            return _called(code, tests, limits)
        if all("stdout" in test for test in tests):
            return _printed(code, tests, limits)
        return Verdict(False, f"{part.key} are no tests")

    return verify


def code_of(text: str) -> str | None:
    """The last fenced block of Python or of nothing in particular, else the whole text where it is code."""
    blocks = _FENCE.findall(text)
    code = str(blocks[-1]) if blocks else text
    try:
        compile(code, "answer.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return code if code.strip() else None


def _called(code: str, tests: list[Mapping[str, Any]], limits: Limits) -> Verdict:
    # What is expected stays here.
    calls = [{key: test[key] for key in ("call", "args", "kwargs") if test.get(key) is not None} for test in tests]
    ran = run_python(code, limits, calls=calls)
    if ran.ended != "done":
        return _ended(ran)
    if len(ran.results) != len(tests):
        return Verdict(False, "crashed")
    for test, result in zip(tests, ran.results, strict=True):
        if "value" not in result or not _same(result["value"], test["returns"]):
            return Verdict(False, "failed a test")
    return Verdict(True)


def _printed(code: str, tests: list[Mapping[str, Any]], limits: Limits) -> Verdict:
    for test in tests:
        ran = run_python(code, limits, stdin=str(test.get("stdin") or ""))
        if ran.ended != "done":
            return _ended(ran)
        if _lines(ran.output) != _lines(str(test["stdout"])):
            return Verdict(False, "failed a test")
    return Verdict(True)


def _ended(ran: Ran) -> Verdict:
    if ran.ended == "done":
        return Verdict(True)
    if ran.ended == "crashed" and "AssertionError" in ran.errors[-500:]:
        return Verdict(False, "failed a test")
    if ran.ended == "crashed" and "MemoryError" in ran.errors[-500:]:
        return Verdict(False, "too much memory")
    return Verdict(False, ran.ended)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _same(got: Any, expected: Any) -> bool:
    """Whether two JSON values are equal: truth is no number, and fractions may differ in their last digits."""
    expected = json.loads(json.dumps(expected))
    if isinstance(got, bool) or isinstance(expected, bool):
        return got is expected
    if isinstance(got, (int, float)) and isinstance(expected, (int, float)):
        exact = isinstance(got, int) and isinstance(expected, int)
        return got == expected if exact else math.isclose(got, expected, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(got, list) and isinstance(expected, list):
        return len(got) == len(expected) and all(map(_same, got, expected))
    if isinstance(got, dict) and isinstance(expected, dict):
        return set(got) == set(expected) and all(_same(got[key], expected[key]) for key in got)
    return type(got) is type(expected) and bool(got == expected)

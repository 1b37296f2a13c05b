"""Verifiers on right, wrong, adversarial and unparseable answers."""

import json

import pytest
from pydantic import TypeAdapter, ValidationError

from attar.collect.verify import VERIFIERS, Verdict, load_verifiers
from attar.collect.verify.unit_tests import code_of
from attar.data.types import Conversation, Message
from attar.errors import RecipeError, RunError
from attar.recipe.verify import Verifier

PARTS = TypeAdapter(Verifier)


def check(part, text, **row):
    [(_, verifier)] = load_verifiers([PARTS.validate_python(part)])
    return verifier(Conversation((Message("user", "?"), Message("assistant", text, reasoning="42"))), row)


def right(conversation, row):
    return conversation.messages[-1].content == row["answer"]


def told(conversation, row):
    return Verdict(False, "too short")


def odd(conversation, row):
    return "yes"


def test_a_function_of_the_user_s():
    name = f"{__name__}:right"
    assert check({"kind": "function", "name": name}, "4", answer="4") == (True, "")
    assert check({"kind": "function", "name": name}, "5", answer="4") == (False, "not right")
    assert check({"kind": "function", "name": f"{__name__}:told"}, "5") == (False, "too short")
    with pytest.raises(RunError, match="returned 'yes'; a Verdict"):
        check({"kind": "function", "name": f"{__name__}:odd"}, "5")
    with pytest.raises(RecipeError, match="nowhere:f is no function"):
        check({"kind": "function", "name": "nowhere:f"}, "5")
    [(shown, _), (plain, _)] = load_verifiers(
        [PARTS.validate_python({"kind": "function", "name": name}), PARTS.validate_python({"kind": "exact"})]
    )
    assert (shown, plain) == (name, "exact")


def test_a_pattern():
    part = {"kind": "regex", "pattern": r"\b\d{4}-\d\d-\d\d\b"}
    assert check(part, "on 2025-11-24.").ok
    assert check(part, "yesterday") == (False, "no match")
    assert not check({"kind": "regex", "pattern": "42"}, "no number here").ok  # it stands in the reasoning only


def test_a_pattern_that_would_never_end(monkeypatch):
    monkeypatch.setattr("attar.collect.verify.text._SECONDS", 0.05)
    assert check({"kind": "regex", "pattern": r"(a+)+$"}, "a" * 5000 + "b").reason == "pattern took too long"
    part = {"kind": "exact", "pattern": r"((a+)+)$"}
    assert check(part, "a" * 5000 + "b", answer="a").reason == "pattern took too long"


@pytest.mark.parametrize(
    ("answer", "reference", "compare", "ok"),
    [
        ("Oslo", "Oslo", "text", True),
        ("  oslo.\n", "Oslo", "text", True),
        ("ｏｓｌｏ", "Oslo", "text", True),
        ("New\n York", "new york", "text", True),
        ("It is Oslo", "Oslo", "text", False),
        ("Oslo, or Bergen", "Oslo", "text", False),
        ("", "Oslo", "text", False),
        ("oslo", "Oslo", "verbatim", False),
        (" Oslo\n", "Oslo", "verbatim", True),
        ("true", True, "text", True),
        ("either", ["one", "either"], "text", True),
        ("1000.0", "$1,000", "number", True),
        ("\N{MINUS SIGN}3", -3, "number", True),
        ("1e3", 1000, "number", True),
        (".5", 0.5, "number", True),
        ("1,00", 100, "number", False),
        ("1000", "1000.5", "number", False),
        ("nan", "nan", "number", True),
        ("inf", "infinity", "number", False),
        ("9" * 5000, "1", "number", False),
        ("0", 0, "number", True),
        ("1000.0", "1000", "text", False),
        ("50%", "50", "number", False),
    ],
)
def test_the_right_answer(answer, reference, compare, ok):
    assert check({"kind": "exact", "compare": compare}, answer, answer=reference).ok is ok


def test_the_answer_in_a_text():
    part = {"kind": "exact", "pattern": r"answer is (\S+)", "compare": "number"}
    assert check(part, "The answer is 3. No: the answer is 4.", answer=4).ok
    assert check(part, "The answer is 4? No: the answer is 3.", answer=4) == (False, "another answer")
    assert check(part, "4", answer=4) == (False, "no answer found")
    assert check(part, "the answer is 4", key=4) == (False, "no answer in the row")


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "n": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ('{"city": "Oslo", "n": 1}', ""),
        (' {"city": "Oslo"}\n', ""),
        ('{"n": 1}', "does not fit"),
        ('{"city": 5}', "does not fit"),
        ("[]", "does not fit"),
        ('Here: {"city": "Oslo"}', "not json"),
        ('{"city": "Oslo"} {"city": "Oslo"}', "not json"),
        ('```json\n{"city": "Oslo"}\n```', "not json"),
        ('{"city": 5, "city": "Oslo"}', "not json"),
        ('{"city": "Oslo", "n": NaN}', "not json"),
        ("[" * 200_000, "not json"),
        ('{"city": "Oslo", "n": ' + "9" * 10_000 + "}", "not json"),
        ("", "not json"),
    ],
)
def test_json_of_a_shape(answer, reason):
    assert check({"kind": "json_schema", "fits": SCHEMA}, answer) == (not reason, reason)


def test_json_in_a_fence_and_a_schema_of_the_row():
    fenced = '```json\n{"city": "Oslo"}\n```'
    assert check({"kind": "json_schema", "fits": SCHEMA, "fence": True}, fenced).ok
    assert not check({"kind": "json_schema", "fits": SCHEMA, "fence": True}, "So:\n" + fenced).ok
    part = {"kind": "json_schema", "key": "schema"}
    assert check(part, '{"city": "Oslo"}', schema=SCHEMA).ok
    assert check(part, '{"city": "Oslo"}', schema=json.dumps(SCHEMA)).ok
    assert check(part, "{}", schema=SCHEMA).reason == "does not fit"
    assert check(part, "{}", schema={"type": 5}).reason == "schema is no schema"
    assert check(part, "{}").reason == "no schema in the row"


def test_a_schema_that_cannot_be_used():
    with pytest.raises(RecipeError, match="fits is no JSON schema"):
        check({"kind": "json_schema", "fits": {"type": 5}}, "{}")
    with pytest.raises(RecipeError, match=r"refers to 'https://example.org/s'.*nothing is fetched"):
        check({"kind": "json_schema", "fits": {"$ref": "https://example.org/s"}}, "{}")


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"kind": "regex", "pattern": "("}, "no regular expression"),
        ({"kind": "exact", "pattern": "x"}, "has no group"),
        ({"kind": "json_schema"}, "one of the two"),
        ({"kind": "json_schema", "fits": {}, "key": "a"}, "one of the two"),
        ({"kind": "function", "name": "f"}, "name"),
        ({"kind": "unit_tests", "timeout_s": 0}, "greater than 0"),
        ({"kind": "exact", "k": 1}, "Extra inputs"),
        ({"kind": "magic"}, "magic"),
    ],
)
def test_parts_that_are_refused(part, words):
    with pytest.raises(ValidationError, match=words):
        PARTS.validate_python(part)


def test_every_kind_of_the_recipe_is_made():
    from attar.recipe import verify

    kinds = {getattr(verify, name).model_fields["kind"].annotation.__args__[0] for name in verify.__all__[:-1]}
    assert kinds == set(VERIFIERS)


def test_the_code_in_an_answer():
    assert code_of("Sure:\n```python\nx = 1\n```\nDone.") == "x = 1\n"
    assert code_of("```\nx = 1\n```\nbetter:\n```py\nx = 2\n```") == "x = 2\n"
    assert code_of("x = 1") == "x = 1"
    assert code_of("I would loop over it.") is None
    assert code_of("```python\nx = (\n```") is None
    assert code_of("") is None
    assert code_of("x = '\0'") is None

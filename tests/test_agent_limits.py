import dataclasses
import datetime
import json
import math

import pydantic
import pytest

from attar.agents.limits import write_result
from attar.data.schemas import check_tools
from attar.errors import AttarError, BadTools

# results as text


@dataclasses.dataclass
class Mail:
    to: str
    tags: set


class Meeting(pydantic.BaseModel):
    day: datetime.date
    people: set[str]


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("as it is: {'a': 1}\n", "as it is: {'a': 1}\n"),
        ("", ""),
        (None, "null"),
        (True, "true"),
        ({"b": [1, 2.5], "a": "é"}, '{"b": [1, 2.5], "a": "é"}'),
        ((1, "x"), '[1, "x"]'),
        ({3, 1, 2}, "[1, 2, 3]"),
        (set("gfedcba"), json.dumps(list("abcdefg"))),
        (Mail("Ada", {"b", "a"}), '{"to": "Ada", "tags": ["a", "b"]}'),
        (
            Meeting(day=datetime.date(2026, 1, 2), people={"z", "a"}),
            '{"day": "2026-01-02", "people": ["a", "z"]}',
        ),
    ],
)
def test_a_string_stays_and_all_else_becomes_json(result, text):
    assert write_result(result, 1000) == (text, 0, "")


def circle():
    value = {"a": []}
    value["a"].append(value)
    return value


def deep():
    value = []
    for _ in range(200_000):
        value = [value]
    return value


class Explodes(dict):
    def items(self):
        raise KeyError("secret")

    def __len__(self):
        return 1


@pytest.mark.parametrize(
    ("result", "fault"),
    [
        (circle(), "circular"),
        (deep(), "too deep"),
        (object(), "no json"),
        ({"price": math.nan}, "no json"),
        ({(1, 2): 3}, "no json"),
        (iter([1]), "no json"),
        ("half a pair: \ud83d", "half a surrogate pair"),
        ({"deep": "\udc00"}, "half a surrogate pair"),
    ],
)
def test_what_cannot_be_written_says_so(result, fault):
    written = write_result(result, 1000)
    assert written.fault == fault
    assert written.left_out == 0
    assert len(written.text.encode()) < 300
    assert json.loads(json.dumps(written.text)) == written.text
    if fault != "half a surrogate pair":
        assert written.text.startswith("[result not shown: ")
    # Addresses differ from run to run.
    assert "0x" not in written.text


def test_an_object_that_raises_is_no_json():
    assert write_result([Explodes()], 1000).fault in ("", "no json")


def test_a_pair_of_surrogates_is_one_character():
    assert write_result("\ud83d\ude00", 10) == ("\U0001f600", 0, "half a surrogate pair")


def test_a_long_result_keeps_its_head_and_tail_and_says_what_was_left_out():
    text = "".join(chr(97 + i % 26) for i in range(1000))
    written = write_result(text, 101)
    assert written.text == text[:51] + "\n[... 899 characters left out ...]\n" + text[-50:]
    assert (written.left_out, written.fault) == (899, "")
    assert write_result(text, 1000) == (text, 0, "")
    assert write_result(text, 999).left_out == 1
    assert write_result(list(range(1000)), 20).text == "[0, 1, 2, \n[... 4870 characters left out ...]\n 998, 999]"


def test_a_cut_keeps_both_ends():
    with pytest.raises(ValueError, match="max_chars is 1; wanted 2 or more"):
        write_result("abc", 1)


# tools on offer


def tool(parameters, name="book"):
    return {"type": "function", "function": {"name": name, "description": "Book a room.", "parameters": parameters}}


def of(**properties):
    return {"type": "object", "properties": properties, "required": list(properties)}


NOTHING = {"type": "object", "properties": {}}
TREE = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/node"}},
    "required": ["root"],
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "left": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "left"],
        }
    },
}


@pytest.mark.parametrize(
    "parameters",
    [
        NOTHING,
        TREE,
        of(day={"type": "string", "enum": ["mon", "tue"], "minLength": 3}),
        of(count={"type": ["integer", "null"], "minimum": 5, "maximum": 3}),  # null fits
        of(count={"minimum": 5, "maximum": 3}),  # a string fits
        of(count={"type": "integer", "minimum": 3, "maximum": 3}),
        of(count={"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}),
        of(ids={"type": "array", "items": False, "maxItems": 0}),
        of(pair={"type": "array", "prefixItems": [{"type": "string"}], "items": False, "minItems": 1}),
        of(either={"oneOf": [{"type": "string"}, False]}),
        of(kind={"const": None}),
        {"type": "object", "properties": {"never": False}},
        {"type": "object", "required": ["x1"], "patternProperties": {"^x": {}}, "additionalProperties": False},
        # Before draft 2019-09 what stands beside a reference is not read.
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "properties": {"a": {"$ref": "#/definitions/text", "type": "null"}},
            "required": ["a"],
            "definitions": {"text": {"type": "string"}},
        },
    ],
)
def test_a_schema_that_something_fits_is_taken(parameters):
    check_tools([tool(parameters)], "office")


CIRCLE = {"type": "object", "properties": {}}
CIRCLE["properties"]["a"] = CIRCLE


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        (None, "it has no schema"),
        ({}, 'must be the schema of an object, with "type": "object"; here that is absent or null'),
        ({"type": "string"}, "here that is 'string'"),
        (["x"], "here that is "),
        (CIRCLE, "parameters is no JSON"),
        (of(day={"type": "date"}), r"no JSON Schema: \$\.properties\.day\.type"),
        (of(day={"$ref": "#/$defs/day"}), "refers to '/\\$defs/day', which is not in it"),
        (of(day={"$ref": "https://example.org/day.json"}), "nothing is fetched"),
        (
            of(count={"type": "integer", "minimum": 5, "maximum": 3}),
            "no arguments fit .*count: no number is from 5 to 3",
        ),
        (of(count={"type": "number", "exclusiveMinimum": 2, "maximum": 2}), "no number is above 2 to 2"),
        (of(count={"type": "integer", "minimum": 1.2, "maximum": 1.8}), "no integer is from 1.2 to 1.8"),
        (of(day={"type": "string", "minLength": 5, "maxLength": 4}), "minLength 5 is above maxLength 4"),
        (of(day={"type": "string", "enum": [1, 2]}), r"none of \[1, 2\] fits the rest of it"),
        (of(day={"type": "string", "const": None}), "none of"),
        (of(day={"not": {}}), "it excludes everything"),
        # The first part that nothing fits is not what is wrong.
        (
            of(a={"anyOf": [{"not": {}}, {"type": "null"}]}, b={"type": "integer", "minimum": 5, "maximum": 3}),
            r"no arguments fit its schema: parameters\.properties\.b: ",
        ),
        (of(day=False), "day: it is false"),
        (of(day={"allOf": [{"type": "string"}, {"type": "integer"}]}), "its parts allow no type in common"),
        (of(day={"type": "string", "anyOf": [{"type": "null"}, {"type": "array"}]}), "no type in common"),
        (of(ids={"type": "array", "items": False, "minItems": 1}), "items: it is false"),
        (of(ids={"type": "array", "minItems": 3, "maxItems": 2}), "minItems 3 is above maxItems 2"),
        (
            {"type": "object", "properties": {"a": {}}, "required": ["b"], "additionalProperties": False},
            "'b' is required, is not among its properties",
        ),
        ({"type": "object", "required": ["a", "b"], "maxProperties": 1}, "maxProperties 1 is less"),
        (
            {
                "type": "object",
                "properties": {"node": {"$ref": "#/$defs/node"}},
                "required": ["node"],
                "$defs": {"node": of(next={"$ref": "#/$defs/node"})},
            },
            "one of its own kind, without end",
        ),
        # an argument that may be left out, but never given
        (
            {"type": "object", "properties": {"a": {"type": "string", "enum": []}}},
            "no value fits the argument 'a'",
        ),
    ],
)
def test_a_schema_that_is_none_or_that_nothing_fits_is_refused_by_name(parameters, why):
    with pytest.raises(BadTools, match=rf"office: tool 'book': .*{why}") as caught:
        check_tools([tool(NOTHING, "fine"), tool(parameters)], "office")
    assert isinstance(caught.value, AttarError)
    assert len(str(caught.value)) < 400


def test_two_tools_of_one_name_are_refused():
    with pytest.raises(BadTools, match="office: two tools are named 'book'"):
        check_tools([tool(NOTHING), tool(NOTHING, "other"), tool(NOTHING)], "office")


@pytest.mark.parametrize("bad", [None, {}, {"function": "book"}, {"function": {"name": ""}}, {"name": "book"}])
def test_a_tool_without_a_name_is_refused_by_number(bad):
    with pytest.raises(BadTools, match="office: tool 1 has no name"):
        check_tools([tool(NOTHING), bad], "office")

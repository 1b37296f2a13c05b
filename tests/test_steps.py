"""A step against the teacher's: what counts as the same."""

import pytest

from agents import TOOLS, call
from attar.data.tools import CallChecker
from attar.data.types import Message, ToolCall
from attar.grading.steps import grade_step, same_value


def grade(answer, reference):
    return grade_step(answer, reference, TOOLS, CallChecker())


TEXT = Message("assistant", "Done.")


def test_the_same_call_is_acceptable_and_its_id_and_reasoning_do_not_count():
    mine = Message("assistant", "Now.", (ToolCall("x", "add", {"n": 1}),), reasoning="So.")
    result = grade(mine, call("add", n=1))
    assert (result.acceptable, result.kind, result.tools, result.valid, result.hallucinated) == (True,) * 4 + (False,)


@pytest.mark.parametrize(
    ("answer", "reference", "acceptable", "kind", "tools", "valid", "hallucinated"),
    [
        (call("add", n=2), call("add", n=1), False, True, True, True, False),
        (call("fail", n=1), call("add", n=1), False, True, False, True, False),
        (call("add", n="1"), call("add", n=1), False, True, True, False, False),
        (call("sub", n=1), call("add", n=1), False, True, False, False, True),
        (TEXT, call("add", n=1), False, False, False, True, False),
        (call("add", n=1), TEXT, False, False, False, True, False),
        (Message("assistant", "Something else."), TEXT, True, True, True, True, False),
        (None, TEXT, False, False, False, False, False),
    ],
)
def test_grades(answer, reference, acceptable, kind, tools, valid, hallucinated):
    result = grade(answer, reference)
    assert (result.acceptable, result.kind, result.tools) == (acceptable, kind, tools)
    assert (result.valid, result.hallucinated) == (valid, hallucinated)


def several(*numbers):
    return Message("assistant", "", tuple(ToolCall(None, "add", {"n": n}) for n in numbers))


@pytest.mark.parametrize(
    ("mine", "theirs", "same"),
    [((1, 2), (2, 1), True), ((1, 1), (1,), False), ((1, 1), (1, 2), False), ((1,), (1, 1), False)],
)
def test_parallel_calls_have_no_order_but_a_number(mine, theirs, same):
    assert grade(several(*mine), several(*theirs)).acceptable is same


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (1, 1.0, True),
        (True, 1, False),
        (True, True, True),
        ("a ", "a", True),
        ("A", "a", False),
        ("1", 1, False),
        (None, None, True),
        (None, "", False),
        ([1, 2], [2, 1], False),
        ([1, 2], [1, 2.0], True),
        ({"a": 1, "b": "x"}, {"b": "x ", "a": 1}, True),
        ({"a": 1}, {"a": 1, "b": None}, False),
    ],
)
def test_values(one, other, same):
    assert same_value(one, other) is same
    assert same_value(other, one) is same

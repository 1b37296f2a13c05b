"""Curating episodes: outcomes, evidence, thoughts, failures."""

import json

import pytest

from attar.collect.filters import row_filters
from attar.collect.rows import Row
from attar.data.conversations import parse_conversation
from attar.recipe import parse_recipe

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


def recipe(**curate):
    content = {"name": "a", "task": "agent", "data": {"train": "x.jsonl"}, "teacher": {"model": "hf:x"}}
    return parse_recipe(content | {"curate": curate}, "test")


def step(reasoning=None, number=0):
    call = {"id": f"c{number}", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    return {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": reasoning}


def result(text, number=0):
    return {"role": "tool", "content": text, "tool_call_id": f"c{number}"}


def row(*messages, outcome=None):
    raw = {"messages": [{"role": "user", "content": "When is lunch with Ann?"}, *messages], "tools": TOOLS}
    if outcome is not None:
        raw["outcome"] = outcome
    return Row(raw, parse_conversation(raw))


def dropped(row, **curate):
    return next((drop for step in row_filters(recipe(**curate))[0] if (drop := step(row)) is not None), None)


DONE = {"role": "assistant", "content": "Lunch is at 12."}
GOOD = {"success": True, "score": 1.0, "reason": ""}


@pytest.mark.parametrize(
    ("outcome", "drop"),
    [
        (GOOD, None),
        ({"success": False, "score": 0.0, "reason": "wrong day"}, "failed"),
        (None, "no outcome"),
    ],
)
def test_only_successes_are_kept_unless_all_are_wanted(outcome, drop):
    found = dropped(row(DONE, outcome=outcome))
    assert (found and found[0]) == drop
    assert dropped(row(DONE, outcome=outcome), outcome={"failed": "keep", "unknown": "keep"}) is None


def test_long_episodes():
    messages = [step(number=0), result("12:00 lunch", 0), step(number=1), result("12:00 lunch", 1), DONE]
    assert dropped(row(*messages, outcome=GOOD), max_steps=3) is None
    assert dropped(row(*messages, outcome=GOOD), max_steps=2) == ("too many steps", "3, curate.max_steps is 2")


@pytest.mark.parametrize(
    ("answer", "grounded"),
    [
        ("Lunch is at 12:30.", True),
        ("Lunch is at 13:30.", False),
        ("It is \u201clunch, room 4\u201d.", True),
        ('It is "lunch with Bob".', False),
        ("It is soon.", True),
    ],
)
def test_an_answer_must_come_from_what_was_seen(answer, grounded):
    messages = [step(), result("12:30 lunch, room 4"), {"role": "assistant", "content": answer}]
    drop = dropped(row(*messages, outcome=GOOD), ungrounded="drop")
    assert (drop is None) == grounded
    assert drop is None or drop[0] == "ungrounded answer"
    assert dropped(row(*messages, outcome=GOOD)) is None


def test_reasoning_is_shortened_and_mended_failures_are_not_learned():
    messages = [
        step("Look first. Then think.", 0),
        result("Error: busy", 0),
        step("Again.", 1),
        result("12:00", 1),
        DONE,
    ]
    kept = row(*messages, outcome=GOOD)
    assert dropped(kept, reasoning={"policy": "shorten"}) is None
    assert [m.reasoning for m in kept.example.messages if m.role == "assistant"] == ["Look first.", "Again.", None]
    assert [m.train for m in kept.example.messages if m.role == "assistant"] == [False, None, None]
    gone = row(*messages, outcome=GOOD)
    assert dropped(gone, failed_calls="drop", reasoning={"policy": "strip"}) is None
    assert [m.role for m in gone.example.messages] == ["user", "assistant", "tool", "assistant"]
    assert all(m.reasoning is None for m in gone.example.messages)


def test_a_result_that_nobody_asked_for_is_dropped_with_its_episode():
    stray = row({"role": "tool", "content": "12:00", "tool_call_id": "c9"}, DONE, outcome=GOOD)
    assert dropped(stray, failed_calls="drop")[0] == "stray result"


def test_the_recipe_says_what_goes_together():
    assert json.dumps(recipe().dump()["curate"]["reasoning"]) == '{"policy": "keep", "tokens": null}'
    with pytest.raises(Exception, match="belongs to policy: shorten"):
        recipe(reasoning={"policy": "strip", "tokens": 5})

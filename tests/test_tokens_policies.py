"""How much reasoning is left, and which failed calls."""

from collections import Counter
from dataclasses import replace

import pytest

import families
from attar.data.conversations import parse_conversation
from attar.data.episodes import Episode, Outcome, Step
from attar.errors import DataError
from attar.tokens import Reasoning, encode_plain, with_reasoning, without_failures


def thinking(*texts):
    rows = [{"role": "user", "content": "?"}]
    rows += [{"role": "assistant", "content": "a", "reasoning_content": text} for text in texts]
    return parse_conversation({"messages": rows})


def left(talk):
    return [message.reasoning for message in talk.messages if message.role == "assistant"]


# reasoning


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("Ask. Then answer.", "Ask."),
        ("It is 3.5 degrees, e.g. cold. So no.", "It is 3.5 degrees, e.g. cold."),
        ('"Why?" she asked. No.', '"Why?"'),
        ("1. Look it up. 2. Say so.", "1. Look it up."),
        ("look it up\nthen say so", "look it up"),
        ("先查天气。然后回答。", "先查天气。"),
        ("Really?! Yes.", "Really?!"),
        ("no end at all", "no end at all"),
    ],
)
def test_the_first_sentence(text, first):
    assert left(with_reasoning(thinking(text), Reasoning("shorten"))) == [first]


def test_reasoning_is_kept_stripped_or_shortened_and_counted():
    talk = thinking("One. Two.", None, " One. ", " ")
    counts = Counter()
    assert with_reasoning(talk, Reasoning(), counts=counts) == talk
    assert +counts == {"reasoning kept": 2, "reasoning characters": 13, "reasoning characters left": 13}
    counts.clear()
    assert left(with_reasoning(talk, Reasoning("strip"), counts=counts)) == [None, None, None, " "]
    assert +counts == {"reasoning stripped": 2, "reasoning characters": 13}
    counts.clear()
    assert left(with_reasoning(talk, Reasoning("shorten"), counts=counts)) == ["One.", None, " One. ", " "]
    assert +counts == {
        "reasoning kept": 1,
        "reasoning shortened": 1,
        "reasoning characters": 13,
        "reasoning characters left": 8,
    }
    assert left(talk) == ["One. Two.", None, " One. ", " "]  # as it was


def test_a_budget_of_tokens_ends_behind_a_sentence_or_a_word():
    tokenizer = families.tokenizer("chatml")
    text = "Ask the tool. Then say so. And stop."

    def cut(tokens):
        return left(with_reasoning(thinking(text), Reasoning("shorten", tokens), tokenizer))[0]

    def length(part):
        return len(encode_plain(tokenizer, part))

    assert cut(length(text)) == text
    assert cut(length(text) - 1) == "Ask the tool. Then say so."
    assert cut(length("Ask the tool.")) == "Ask the tool."
    assert cut(length("Ask the tool.") - 1) == "Ask the"
    assert cut(1) is None
    with pytest.raises(ValueError, match="no tokenizer to count"):
        with_reasoning(thinking(text), Reasoning("shorten", 3))


@pytest.mark.parametrize(("policy", "tokens"), [("keep", 3), ("shorten", 0), ("cut", None)])
def test_policies_that_cannot_be(policy, tokens):
    with pytest.raises(ValueError, match="wanted"):
        Reasoning(policy, tokens)


# failed calls


def call(number, tool):
    return {"id": f"c{number}", "function": {"name": tool, "arguments": {"n": number}}}


def made(*steps, ids=True):
    """A conversation of steps, each calls and results: ``(tool, failed)``; a text is an answer."""
    rows, number = [{"role": "user", "content": "?"}], 0
    for step in steps:
        if isinstance(step, str):
            rows.append({"role": "assistant", "content": step})
            continue
        calls, results = [], []
        for tool, failed in step:
            calls.append(call(number, tool) if ids else {"function": call(number, tool)["function"]})
            results.append(
                {"role": "tool", "content": "error" if failed else "ok"}
                | ({"tool_call_id": f"c{number}"} if ids else {})
            )
            number += 1
        rows += [{"role": "assistant", "content": "", "tool_calls": calls}, *results]
    return parse_conversation({"messages": rows})


def failed(message):
    return message.content == "error"


def shape(talk):
    """Calls, results and answers, in order."""
    return [
        [c.arguments["n"] for c in m.tool_calls] if m.tool_calls else m.content
        for m in talk.messages
        if m.role != "user"
    ]


REFLECTION = ([("a", True)], [("a", False), ("b", True)], [("b", False)], "done")


@pytest.mark.parametrize("ids", [True, False])
def test_repaired_calls_are_kept_unlearned_or_dropped(ids):
    talk = made(*REFLECTION, ids=ids)
    counts = Counter()
    assert without_failures(talk, "keep", failed, counts) is talk
    assert counts == {"failed calls": 2, "repaired calls": 2}
    counts.clear()
    unlearned = without_failures(talk, "unlearn", failed, counts)
    assert [m.train for m in unlearned.messages if m.role == "assistant"] == [False, False, None, None]
    assert shape(unlearned) == shape(talk)
    assert counts["messages not learned"] == 2
    counts.clear()
    dropped = without_failures(talk, "drop", failed, counts)
    assert shape(dropped) == [[1], "ok", [3], "ok", "done"]
    assert (counts["calls dropped"], counts["messages dropped"]) == (2, 1)
    assert shape(talk) == [[0], "error", [1, 2], "ok", "error", [3], "ok", "done"]


@pytest.mark.parametrize(
    "steps",
    [
        ([("a", True)], "it cannot be done"),
        ([("a", True)], [("b", False)], "another tool repairs nothing"),
        ([("a", False)], [("a", True)], "nor does an earlier call"),
        ([("a", True), ("a", False)], "nor one beside it"),
        ([("a", True)], [("a", True)], "nor one that fails"),
    ],
)
def test_what_nothing_repairs_stays(steps):
    talk, counts = made(*steps), Counter()
    for policy in ("unlearn", "drop"):
        assert without_failures(talk, policy, failed, counts) == talk
    assert counts["repaired calls"] == 0
    assert counts["failed calls"] > 0


def test_an_episode_keeps_its_steps_in_order():
    talk = made(*REFLECTION)
    numbers = [i for i, m in enumerate(talk.messages) if m.role == "assistant"]
    steps = tuple(Step(i, 100 + i, 5, 1.0, "stop") for i in numbers)
    episode = Episode(
        "world", "t1", "f", "engine", 0, 0, talk.messages, (), Outcome(True), "finished", steps, {"more": 1}
    )
    dropped = without_failures(episode, "drop", failed)
    assert [(s.message, s.prompt_tokens) for s in dropped.steps] == [(1, 103), (3, 106), (5, 108)]
    assert all(dropped.messages[s.message].role == "assistant" for s in dropped.steps)
    assert replace(dropped, messages=episode.messages, steps=steps) == episode
    assert with_reasoning(episode, Reasoning("strip")) == episode


def test_ids_that_come_again_belong_to_the_last_message():
    talk = made([("a", True)], [("a", False)])
    rows = talk.wire["messages"]
    rows[3]["tool_calls"][0]["id"] = rows[4]["tool_call_id"] = "c0"
    assert shape(without_failures(parse_conversation({"messages": rows}), "drop", failed)) == [[1], "ok"]


@pytest.mark.parametrize(
    "rows", [[{"role": "tool", "content": "ok", "tool_call_id": "c7"}], [{"role": "tool", "content": "x"}] * 2]
)
def test_a_result_that_nobody_asked_for_is_refused(rows):
    before = made([("a", True)]).wire["messages"][:2]
    answer = {"role": "assistant", "content": "done"}
    with pytest.raises(DataError, match=r"messages\[\d\] is the result of the call .* does not make"):
        without_failures(parse_conversation({"messages": [*before, *rows, answer]}), "keep", failed)


def test_a_policy_that_is_none():
    with pytest.raises(ValueError, match="policy is 'forget'; wanted keep, unlearn or drop"):
        without_failures(made(*REFLECTION), "forget", failed)

"""Relabelling: which steps are learned, from whom, and in what company."""

from dataclasses import replace

import pytest

from agents import Counter, call
from attar.agents.environments import Task
from attar.agents.episodes import Try, play
from attar.agents.relabel import Label, ask_labels, new_states, relabelled, states_of
from attar.data.types import Message
from attar.engines.base import Answer, Failure
from attar.engines.scripted import ScriptedChat

DONE = Message("assistant", "Done.")


def played(*messages):
    """What a student did that says these messages one after another."""
    engine = ScriptedChat(lambda request: messages[sum(m.role == "assistant" for m in request.messages)])
    [episode] = play(engine, Counter, [Try(Task("t", "f", {"goal": 3}))], policy="student", seed=0)
    return episode


def labels(*messages):
    return [Label(n, message, None if message else "length") for n, message in enumerate(messages)]


def learned(conversation):
    return [n for n, m in enumerate(conversation.messages) if m.role == "assistant" and m.train is not False]


def changed(messages, **fields):
    """The messages, the assistant's with other fields."""
    return tuple(replace(m, **fields) if m.role == "assistant" else m for m in messages)


# system, user, add, tool, add, tool, done
STUDENT = played(call("add", n=1), call("add", n=5), DONE)


def test_steps_that_the_teacher_would_have_taken_are_learned_in_its_words():
    thinking = replace(call("add", n=1), reasoning="One more.")
    result = relabelled(STUDENT, labels(thinking, call("add", n=5), Message("assistant", "All done.")), 3)
    [own] = result.conversations
    assert (result.agreed, result.corrected, result.beyond, result.unusable) == (3, 0, 0, 0)
    assert learned(own) == [2, 4, 6]
    assert own.messages[2].reasoning == "One more."
    assert own.messages[2].tool_calls[0].id == own.messages[3].tool_call_id == "call_0_0"
    assert own.messages[6].content == "All done."
    assert own.group == "t"


def test_a_correction_is_learned_after_what_the_student_did():
    result = relabelled(STUDENT, labels(call("add", n=1), call("add", n=2), DONE), 3)
    own, branch = result.conversations
    assert (result.agreed, result.corrected) == (2, 1)
    assert learned(own) == [2, 6]
    assert own.messages[4].tool_calls[0].arguments == {"n": 5}
    assert learned(branch) == [4]
    assert len(branch.messages) == 5
    assert branch.messages[4].tool_calls[0].arguments == {"n": 2}
    assert branch.messages[:4] == tuple(
        replace(m, train=False) if m.role == "assistant" else m for m in own.messages[:4]
    )


def test_only_the_first_corrections_are_learned():
    wrong = call("add", n=9)
    result = relabelled(STUDENT, labels(wrong, wrong, wrong), 2)
    assert [learned(c) for c in result.conversations] == [[2], [4]]
    assert (result.corrected, result.beyond) == (2, 1)


@pytest.mark.parametrize("answer", [None, call("sub", n=1), call("add", n="one")])
def test_an_answer_that_cannot_be_used_teaches_nothing(answer):
    result = relabelled(STUDENT, labels(answer, answer, answer), 3)
    assert result.conversations == ()
    assert result.unusable == 3


def test_every_step_needs_a_label():
    with pytest.raises(ValueError, match="has 3 steps"):
        relabelled(STUDENT, labels(DONE), 3)


def test_the_teacher_is_asked_in_every_state_and_sees_no_more_than_the_student_saw():
    seen = []

    def answer(request):
        seen.append(len(request.messages))
        if len(request.messages) == 4:
            return Answer(Message("assistant", "Do"), "length", 1, 1, 0, "m", 0.0)
        if len(request.messages) == 6:
            return Failure("timeout", "", False, 0.0)
        return call("add", n=1)

    found = list(ask_labels(ScriptedChat(answer), [STUDENT, STUDENT], max_tokens=9, temperature=None))
    assert seen == [2, 4, 6, 2, 4, 6]
    assert [(n, label.step, label.reason) for n, label in found] == [
        (0, 0, None), (0, 1, "length"), (1, 0, None), (1, 1, "length"),
    ]  # fmt: skip


def test_a_state_is_what_was_asked_called_and_returned():
    other = replace(
        STUDENT, messages=tuple(replace(m, reasoning="x") if m.role == "assistant" else m for m in STUDENT.messages)
    )
    assert list(states_of(STUDENT.conversation)) == list(states_of(other.conversation))
    known = set()
    assert new_states([STUDENT], known) == (3, 3)
    assert new_states([STUDENT, played(call("add", n=1), call("add", n=2), DONE)], known) == (1, 6)

"""What is computed of episodes: pass^k, the first difference, demonstrations."""

from dataclasses import replace

import pytest

from agents import Counter, call, counting
from attar.agents.demonstrations import Demonstrated, choose_demonstrations
from attar.agents.environments import Task
from attar.agents.episodes import Try, play
from attar.data.types import Message
from attar.engines.base import ChatRequest
from attar.engines.scripted import ScriptedChat
from attar.evaluate.agent import pass_hat
from attar.evaluate.breaks import first_difference, where_it_breaks

DONE = Message("assistant", "Done.")


def played(*messages, goal=2, task="t", family="f"):
    def answer(request):
        if not messages:
            return counting(request)
        return messages[sum(m.role == "assistant" for m in request.messages)]

    [episode] = play(ScriptedChat(answer), Counter, [Try(Task(task, family, {"goal": goal}))], policy="p", seed=0)
    return episode


TEACHER = played()


@pytest.mark.parametrize(
    ("successes", "trials", "k", "value"),
    [(3, 3, 3, 1.0), (2, 3, 3, 0.0), (2, 3, 2, 1 / 3), (2, 4, 1, 0.5), (0, 2, 1, 0.0), (3, 4, 2, 0.5)],
)
def test_pass_hat_is_the_chance_that_k_drawn_trials_all_succeed(successes, trials, k, value):
    assert pass_hat(successes, trials, k) == pytest.approx(value)


def test_the_first_difference_is_the_first_step_that_does_something_else():
    assert first_difference(TEACHER, TEACHER) is None
    number, mine, theirs = first_difference(played(call("add", n=1), call("add", n=7), DONE), TEACHER)
    assert (number, mine.tool_calls[0].arguments, theirs.tool_calls[0].arguments) == (1, {"n": 7}, {"n": 1})
    number, mine, theirs = first_difference(played(DONE), TEACHER)
    assert (number, mine.content) == (0, "Done.")
    longer = played(call("add", n=1), call("add", n=1), call("add", n=1), DONE)
    number, mine, theirs = first_difference(longer, TEACHER)
    assert (number, theirs.content) == (2, "Done.")


def test_words_alone_are_no_difference():
    said = played(replace(call("add", n=1), reasoning="One."), call("add", n=1), Message("assistant", "It is two."))
    assert first_difference(said, TEACHER) is None


def test_only_tasks_that_the_teacher_did_and_the_student_did_not_are_shown():
    late = played(call("add", n=1), call("add", n=7), DONE, task="late")
    early = played(DONE, task="early")
    good = played(task="good")
    arms = {"student": [[late, early, good, early]], "teacher": [[TEACHER, TEACHER, TEACHER, early]]}
    shown = where_it_breaks(arms)
    assert [(case["task"], case["step"]) for case in shown] == [("early", 1), ("late", 2)]
    assert shown[1]["teacher"] == "add(n=1)"
    assert shown[1]["student"] == "add(n=7)"
    assert shown[1]["before"] == 'tool: {"value": 1}'
    assert shown[1]["request"] == "Reach 2."
    assert where_it_breaks({}) == []


def test_demonstrations_stand_behind_the_systems_text_and_before_the_task():
    seen = []

    def answer(request):
        seen.append(request.messages)
        return DONE

    engine = Demonstrated(ScriptedChat(answer), [TEACHER])
    asked = (Message("system", "Count."), Message("user", "Reach 9."))
    list(engine.chat([ChatRequest(asked, 9)]))
    roles = [message.role for message in seen[0]]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "tool", "assistant", "user"]
    assert seen[0][1].content == "Reach 2."
    assert seen[0][-1].content == "Reach 9."
    assert engine.capabilities == {"text"}


def test_demonstrations_are_short_successes_of_different_families():
    long, short = played(goal=3, task="long", family="a"), played(goal=1, task="short", family="a")
    other, failed = played(goal=2, task="other", family="b"), played(DONE, task="failed", family="c")
    chosen = choose_demonstrations([long, failed, other, short], 2)
    assert [episode.task for episode in chosen] == ["short", "other"]
    assert [episode.task for episode in choose_demonstrations([long, failed, other, short], 9)] == [
        "short", "other", "long",
    ]  # fmt: skip

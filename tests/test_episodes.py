"""Episodes: what is played, in what order, and what becomes of everything that can go wrong."""

import time

import pytest

from agents import HANGING, Counter, call, counting
from attar.agents.environments import Task
from attar.agents.episodes import Asking, Limits, Try, play, seed_of
from attar.data.episodes import Episode
from attar.data.types import Message, ToolCall
from attar.engines.base import Answer, Failure
from attar.engines.scripted import ScriptedChat
from attar.errors import EnvironmentLost

WORK = Task("t", "f", {"goal": 3})


def played(answer, tries=None, make=Counter, **options):
    tries = [Try(WORK)] if tries is None else tries
    return list(play(ScriptedChat(answer), make, tries, policy="scripted", seed=0, **options))


def one(answer, **options):
    [episode] = played(answer, **options)
    return episode


def script(*messages):
    """Answers these messages one after another."""
    return lambda request: messages[sum(m.role == "assistant" for m in request.messages)]


DONE = Message("assistant", "Done.")


def test_an_episode_holds_all_that_was_said_and_its_outcome():
    episode = one(counting)
    assert [m.role for m in episode.messages] == ["system", "user", *["assistant", "tool"] * 3, "assistant"]
    assert [m.content for m in episode.messages if m.role == "tool"] == [f'{{"value": {n}}}' for n in (1, 2, 3)]
    assert (episode.outcome.success, episode.outcome.score, episode.stopped) == (True, 1.0, "finished")
    assert (episode.environment, episode.task, episode.family, episode.policy) == ("counter-1", "t", "f", "scripted")
    assert [step.message for step in episode.steps] == [2, 4, 6, 8]
    assert Episode.read(episode.wire) == episode


def test_results_name_the_calls_that_they_belong_to():
    both = Message("assistant", "", (ToolCall(None, "add", {"n": 1}), ToolCall("mine", "add", {"n": 2})))
    episode = one(script(both, DONE))
    ids = [c.id for c in episode.messages[2].tool_calls]
    assert ids == ["call_0_0", "mine"]
    assert [m.tool_call_id for m in episode.messages if m.role == "tool"] == ids
    assert episode.outcome.success


@pytest.mark.parametrize(
    ("name", "arguments", "result", "reason"),
    [
        ("fail", {"n": 1}, "error: not today", "tool error"),
        ("crash", {"n": 1}, "error: ZeroDivisionError: by zero", "tool raised"),
        ("exit", {"n": 1}, "error: RuntimeError: SystemExit: 3", "tool raised"),
        ("loop", {"n": 1}, "[result not shown: it contains itself]", "result circular"),
        ("nothing", {}, "error: calls 'nothing', on offer: add, fail, crash, hang, huge, loop, exit", "unknown tool"),
        ("add", {"n": "one"}, 'error: (add): $.n breaks type: "integer"', "tool call"),
    ],
)
def test_a_call_that_fails_is_a_result_and_is_counted(name, arguments, result, reason):
    episode = one(script(call(name, **arguments), DONE))
    assert episode.messages[3].content == result
    assert episode.steps[0].tool_errors == 1
    assert episode.meta["counts"] == {reason: 1}
    assert (episode.stopped, episode.outcome.success) == ("finished", False)


def test_a_huge_result_loses_its_middle():
    episode = one(script(call("huge", n=1), DONE), limits=Limits(result_characters=100))
    text = episode.messages[3].content
    assert text == "x" * 50 + "\n[... 4900 characters left out ...]\n" + "x" * 50
    assert episode.meta["counts"] == {"result cut": 1}


def test_an_environment_that_hangs_ends_its_own_episode_only():
    HANGING.clear()

    def answer(request):
        return call("hang", n=1) if "Reach 9." in request.messages[1].content else counting(request)

    tries = [Try(Task("bad", "f", {"goal": 9})), *(Try(Task(f"t{n}", "f", {"goal": 2})) for n in range(5))]
    try:
        episodes = {e.task: e for e in played(answer, tries, limits=Limits(call_s=0.3), at_once=2)}
    finally:
        HANGING.set()
    assert len(episodes) == 6
    bad = episodes.pop("bad")
    assert (bad.stopped, bad.outcome.success) == ("environment", False)
    assert "hung in hang: no result within 0.3 s" in bad.outcome.reason
    assert all(episode.outcome.success for episode in episodes.values())


def test_an_environment_that_cannot_start_is_an_episode_that_says_so():
    episodes = {e.task: e for e in played(counting, [Try(Task("bad", "f", "broken")), Try(WORK)])}
    assert episodes["bad"].outcome.reason == "the environment failed: RuntimeError: no such world"
    assert episodes["bad"].stopped == "environment"
    assert episodes["t"].outcome.success


def test_an_environment_that_says_it_is_lost_ends_the_episode():
    class Lost(Counter):
        def call(self, tool, arguments):
            raise EnvironmentLost("the server is gone")

    episode = one(counting, make=Lost)
    assert (episode.stopped, episode.outcome.reason) == ("environment", "the environment is lost: the server is gone")


def test_tools_that_cannot_be_offered_are_the_environments_fault():
    class Twice(Counter):
        def start(self, task):
            beginning = super().start(task)
            return beginning._replace(tools=beginning.tools[:1] * 2)

    assert "the environment failed: BadTools" in one(counting, make=Twice).outcome.reason


def test_a_verdict_of_another_type_is_refused():
    class Vague(Counter):
        def finish(self, messages):
            return True

    assert "finish gave a bool" in one(counting, make=Vague).outcome.reason


@pytest.mark.parametrize(
    ("limits", "stopped", "steps"),
    [(Limits(steps=2), "steps", 2), (Limits(seconds=0.0), "time", 0), (Limits(tokens=0), "tokens", 0)],
)
def test_limits_end_an_episode_which_is_then_judged(limits, stopped, steps):
    episode = one(counting, limits=limits)
    assert (episode.stopped, len(episode.steps), episode.outcome.reason) == (stopped, steps, "wrong value")


def spoken(finish_reason="stop", usd=0.0, tokens=5, text="Done."):
    return Answer(Message("assistant", text), finish_reason, 1, tokens, 0, "m", usd)


def test_an_answer_may_write_only_what_is_left_of_the_tokens():
    rooms = []

    def answer(request):
        rooms.append(request.max_tokens)
        return Answer(call("add", n=1), "tool_calls", 1, 30, 0, "m", 0.0)

    assert one(answer, limits=Limits(answer_tokens=40, tokens=70)).stopped == "tokens"
    assert rooms == [40, 40, 10]


def test_money_ends_an_episode():
    paid = Answer(call("add", n=1), "tool_calls", 1, 1, 0, "m", 0.4)
    episode = one(lambda request: paid, limits=Limits(usd=1.0))
    assert (episode.stopped, len(episode.steps)) == ("money", 3)


def test_a_cut_answer_ends_the_episode():
    assert one(lambda request: spoken("length")).stopped == "tokens"


@pytest.mark.parametrize(
    ("failure", "stopped"),
    [
        (Failure("bad tool call", "is no JSON", True, 0.0), "bad call"),
        (Failure("timeout", "no answer", False, 0.0), "engine"),
        (Failure("bad request", "too long", True, 0.0), "engine"),
    ],
)
def test_a_request_that_fails_ends_the_episode(failure, stopped):
    episode = one(lambda request: failure)
    assert (episode.stopped, episode.meta["counts"]) == (stopped, {failure.reason: 1})


def test_a_user_who_speaks_again_is_answered():
    class Talking(Counter):
        def answer(self, messages):
            users = sum(m.role == "user" for m in messages)
            return (Message("user", "And one more."),) if users < 3 else ()

    episode = one(script(call("add", n=1), DONE, call("add", n=1), DONE, call("add", n=1), DONE), make=Talking)
    assert [m.content for m in episode.messages if m.role == "user"] == ["Reach 3.", "And one more.", "And one more."]
    assert episode.outcome.success


class Waiting:
    """Answers nothing before the number of requests that it holds is what it was told, or nobody has another one."""

    capabilities = frozenset({"text"})

    def __init__(self, answer):
        self._answer, self.batches = answer, []

    def chat(self, requests):
        number, block = 0, []
        for request in requests:
            if request is not None:
                block.append((number, request))
                number += 1
                continue
            assert block, "nothing is out, so nothing can be waited for"
            self.batches.append(len(block))
            yield from ((n, Answer(self._answer(r), "stop", 1, 1, 0, "m", 0.0)) for n, r in block)
            block = []
        assert not block


def test_many_episodes_share_a_batch_and_seeds_do_not_depend_on_it():
    tries = [Try(Task(f"t{n}", "f", {"goal": 2}), trial) for n in range(4) for trial in (0, 1)]
    engine = Waiting(counting)
    together = list(play(engine, Counter, tries, policy="p", seed=3, at_once=8))
    assert sum(engine.batches) == 24
    # Eight, but for an environment whose thread was kept waiting.
    assert max(engine.batches) >= 4
    alone = list(play(Waiting(counting), Counter, tries, policy="p", seed=3, at_once=1))

    def key(episode):
        return episode.task, episode.trial, episode.seed, episode.messages, episode.outcome

    assert sorted(map(key, together), key=repr) == sorted(map(key, alone), key=repr)
    assert len({episode.seed for episode in together}) == 8


def test_requests_carry_trial_seed_and_how_to_ask():
    seen = []

    def answer(request):
        seen.append((request.sample, request.seed, request.temperature, request.tool_choice))
        return counting(request)

    played(answer, [Try(Task("t", "f", {"goal": 1}), 4)], asking=Asking(temperature=0.5, tool_choice="auto"))
    first = seed_of(0, "t", 4)
    assert seen == [(4, first % 2**31, 0.5, "auto"), (4, (first + 1) % 2**31, 0.5, "auto")]


def test_leaving_early_ends_the_environments():
    closed = []

    class Closing(Counter):
        def close(self):
            closed.append(1)

    episodes = play(ScriptedChat(counting), Closing, [Try(WORK, n) for n in range(9)], policy="p", seed=0, at_once=3)
    next(episodes)
    episodes.close()
    for _ in range(100):
        if len(closed) == 3:
            break
        time.sleep(0.02)
    assert len(closed) == 3

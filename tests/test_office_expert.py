"""The script that solves the office's tasks, from where it begins and from where others have led."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from attar.agents.office import Office, OfficeExpert
from attar.agents.office.generate import SPLITS
from attar.agents.office.phrases import read_request
from attar.agents.office.pools import SLOTS
from attar.data.types import Message, ToolCall
from attar.engines.base import Answer, ChatEngine, ChatRequest, Failure
from offices import EXPERT, answer_calls, begin, called, expert, go_on, play, saying, without_ids

OFFICE = Office(train=360)
EVERY = [task for split in SPLITS for task in OFFICE.tasks(split)]


@pytest.fixture(scope="module")
def episodes():
    return [(task, *play(OFFICE, task)) for task in EVERY]


def test_it_solves_every_task_in_as_many_calls_as_the_task_states(episodes):
    failed = [(t.id, outcome) for t, m, outcome in episodes if not outcome.success]
    assert not failed
    assert [len(called(m)) for _, m, _ in episodes] == [t.data["calls"] for t, _, _ in episodes]


def test_its_calls_are_one_at_a_time_with_a_short_reason_and_its_answers_have_none(episodes):
    for _, messages, _ in episodes:
        for message in messages:
            if message.tool_calls:
                assert len(message.tool_calls) == 1
                assert message.content == ""
                assert 1 < len(message.reasoning.split()) <= 6
            elif message.role == "assistant":
                assert message.reasoning is None
                assert message.content


def test_episodes_are_short(episodes):
    """In characters, of which a token has about three; without the system prompt."""
    lengths = Counter()
    for task, messages, _ in episodes:
        size = sum(len(m.content) + len(m.reasoning or "") + len(str([c.wire for c in m.tool_calls])) for m in messages)
        lengths[task.data["calls"]] = max(lengths[task.data["calls"]], size - len(messages[0].content))
    assert all(size < 160 + 200 * calls for calls, size in lengths.items()), lengths


def test_it_names_itself_scripted_and_costs_nothing():
    [(number, answer)] = EXPERT.chat([ChatRequest(tuple(begin(OFFICE, EVERY[0])), 256)])
    assert isinstance(EXPERT, ChatEngine)
    assert isinstance(answer, Answer)
    assert (number, answer.model, answer.usd, answer.finish_reason) == (0, "scripted", 0.0, "tool_calls")
    assert OfficeExpert().capabilities == {"text"}


def test_a_request_that_it_does_not_know_is_a_failure_and_no_guess():
    for messages in ((Message("user", "Make tea."),), (Message("system", "Hello."),)):
        [(_, failure)] = EXPERT.chat([ChatRequest(messages, 256)])
        assert isinstance(failure, Failure)
        assert (failure.reason, failure.final) == ("bad request", True)


def test_it_goes_by_what_the_messages_say():
    task = next(t for t in EVERY if t.family == "mail" and t.data["calls"] == 2 and not t.data["trouble"])
    messages = begin(OFFICE, task)
    messages += answer_calls(OFFICE, expert(messages))
    messages[-1] = replace(messages[-1], content="Odd Person odd@x.org")
    assert expert(messages).tool_calls[0].arguments["to"] == "odd@x.org"


def test_results_belong_to_calls_by_id_or_by_order_and_may_be_of_one_turn():
    task = next(t for t in EVERY if t.family == "cancel" and t.data["calls"] == 4 and not t.data["trouble"])
    messages = play(OFFICE, task)[0]
    searches = called(messages)[:2]
    begun = begin(OFFICE, task)
    turn = answer_calls(OFFICE, Message("assistant", "", tuple(searches)))
    wanted = called(messages)[2]
    assert expert([*begun, *turn]).tool_calls == (wanted,)
    assert expert([*begun, turn[0], turn[2], turn[1]]).tool_calls == (wanted,)
    assert expert([*begun, *without_ids(turn)]).tool_calls == (wanted,)
    # a result that nobody asked for tells nothing, nor does a call without one
    assert expert([*begun, turn[0], turn[1]]).tool_calls[0].arguments == searches[1].arguments
    assert expert([*begun, replace(turn[1], tool_call_id="x")]).tool_calls[0].arguments == searches[0].arguments


def wrong_call(rng, own):
    """What an agent that errs might do, sent mail and new contacts apart, which no tool takes back."""
    state, request = OFFICE.state, begin_request()
    named = re.findall(r"\w+day \d+[ap]m", request) or list(SLOTS)
    calls = [
        ("create_event", {"title": rng.choice(["Odd party", "Budget review"]), "when": rng.choice(named)}),
        ("create_event", {"title": "Odd party", "when": rng.choice(SLOTS)}),
        ("add_task", {"title": "Odd job"}),
        ("find_events", {"text": rng.choice(["Friday", "Nonsense", ""])}),
        ("send_mail", {"to": 1}),
        ("nonsense", {}),
    ]
    calls += [("move_event", {"id": event.id, "when": rng.choice([*named, *SLOTS])}) for event in state.events]
    calls += [("cancel_event", {"id": event.id}) for event in state.events]
    calls += [("complete_task", {"id": todo.id}) for todo in state.todos]
    calls += [("save_contact", {"name": contact.name, "email": "odd@x.org"}) for contact in state.contacts]
    early = [(call.name, call.arguments) for call in own if call.name not in ("send_mail", "save_contact")]
    return rng.choice(early if early and rng.random() < 0.4 else calls)


def begin_request():
    return OFFICE._task.data["request"]


def test_it_puts_right_what_another_agent_did_wrong():
    """Three in ten steps are not its own, and every task still ends as it should."""
    failed, wrong = [], 0
    for task in [*OFFICE.tasks("test"), *OFFICE.tasks("unseen"), *OFFICE.tasks("train")[:180]]:
        own, rng = called(play(OFFICE, task)[0]), random.Random(task.id)

        def policy(messages, own=own, rng=rng):
            if rng.random() < 0.3 and len(called(messages)) < 12:
                return Message("assistant", "", (ToolCall(f"own_{len(messages)}", *wrong_call(rng, own)),))
            return expert(messages)

        messages, outcome = play(OFFICE, task, policy)
        wrong += sum(call.id.startswith("own") for call in called(messages))
        if not outcome.success:
            failed.append((task.id, outcome.reason))
    assert not failed
    assert wrong > 400


def first(family, trouble="", calls=None):
    return next(
        t for t in EVERY if t.family == family and t.data["trouble"] == trouble and calls in (None, t.data["calls"])
    )


def test_what_cannot_be_taken_back_is_left_and_the_rest_is_done():
    task = first("todo", calls=1)
    messages = begin(OFFICE, task)
    for said in (
        ("send_mail", {"to": "odd@x.org", "text": "Hello."}),
        ("save_contact", {"name": "A B", "email": "a@b.org"}),
    ):
        messages += answer_calls(OFFICE, saying(said)(messages))
    messages, outcome = go_on(OFFICE, messages, expert)
    assert [call.name for call in called(messages)[2:]] == ["add_task"]
    assert (messages[-1].content, outcome.reason) == ("Done.", "touched more")


def test_what_was_done_is_not_done_again():
    for task in (first("mail"), first("book"), first("todo"), first("save"), first("finish")):
        messages = play(OFFICE, task)[0]
        assert expert(messages[:-1]) == messages[-1]


def test_a_tool_that_goes_on_failing_is_given_up():
    task = first("todo", calls=1)
    messages = begin(OFFICE, task)
    for _ in range(3):
        turn = answer_calls(OFFICE, expert(messages))
        messages += [turn[0], replace(turn[1], content="add_task: the server is gone")]
    assert expert(messages).content == "CANNOT: add_task fails."


def put_right(task, *calls):
    """What the script does after another agent's calls, and the outcome."""
    messages = begin(OFFICE, task)
    for call in calls:
        messages += answer_calls(OFFICE, saying(call)(messages))
    messages, outcome = go_on(OFFICE, messages, expert)
    assert outcome.success, outcome
    return [(call.name, call.arguments) for call in called(messages)[len(calls) :]]


def test_an_hour_that_another_agent_has_cleared_counts_as_taken():
    task = first("book", "taken")
    [(title, when)] = [event.split(" on ") for event in read_request(task.data["request"])[1]["events"]]
    [blocker] = [event for event in task.data["start"]["events"] if event["when"] == when]
    wrong = ("cancel_event", {"id": blocker["id"]}), ("create_event", {"title": title, "when": when})
    assert put_right(task, *wrong) == [
        ("cancel_event", {"id": "e21"}),
        ("create_event", {"title": blocker["title"], "when": when}),
        ("create_event", {"title": title, "when": when}),
    ]


def test_what_was_rightly_done_is_taken_back_where_the_wish_turns_out_impossible():
    task = first("meet", calls=3)
    start = task.data["start"]
    dead = [contact["email"] for contact in start["contacts"]]
    mails = [mail for mail in start["mails"] if mail["address"] not in dead]
    start = start | {"mails": mails}
    lost = replace(task, data=task.data | {"start": start, "goal": start, "dead": dead, "answer": "CANNOT"})
    done = put_right(lost)
    assert [name for name, _ in done] == [
        "find_contact",
        "create_event",
        "send_mail",
        "search_mail",
        "cancel_event",
    ]


def test_events_that_stand_in_each_others_hours_go_back_in_an_order_that_works():
    task = first("todo", calls=1)
    one, two = task.data["start"]["events"][:2]
    free = next(slot for slot in SLOTS if all(event["when"] != slot for event in task.data["start"]["events"]))
    wrong = ("move_event", {"id": one["id"], "when": free}), ("move_event", {"id": two["id"], "when": one["when"]})
    done = put_right(task, *wrong)
    assert done[:2] == [
        ("move_event", {"id": two["id"], "when": two["when"]}),
        ("move_event", {"id": one["id"], "when": one["when"]}),
    ]


def test_what_was_cancelled_and_booked_again_is_the_same_event():
    task = first("move")
    wish = read_request(task.data["request"])[1]
    [event] = [event for event in task.data["start"]["events"] if event["title"] == wish["title"]]
    wrong = (
        ("find_events", {"text": event["title"]}),
        ("cancel_event", {"id": event["id"]}),
        ("create_event", {"title": event["title"], "when": event["when"]}),
    )
    assert put_right(task, *wrong) == [("move_event", {"id": "e21", "when": wish["when"]})]

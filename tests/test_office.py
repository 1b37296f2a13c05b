"""The office: its tools, its tasks, how it judges."""

import json
import random
from collections import Counter

import jsonschema
import pytest

from attar.agents.environments import Environment, Task, ToolError
from attar.agents.office import Office
from attar.agents.office.families import FORMS, TROUBLES, UNSEEN
from attar.agents.office.generate import SPLITS, draw_tasks
from attar.agents.office.phrases import PHRASES, read_request
from attar.agents.office.pools import EVENTS, FIRST_NAMES, LAST_NAMES, TASKS, TOPICS
from attar.agents.office.state import Contact, Event, Mail, State, Todo, words
from attar.agents.office.tools import TOOLS, Desk
from attar.data.types import Message, ToolCall
from offices import answer_calls, begin, called, expert, go_on, play, saying

OFFICE = Office(train=360)
EVERY = [task for split in SPLITS for task in OFFICE.tasks(split)]


def small_state():
    return State(
        contacts=[Contact("Ana Ruiz", "ana@post.com"), Contact("Ben Berg", "ben@old.org")],
        events=[Event("e1", "Budget review", "Tuesday 2pm"), Event("e2", "Sales call", "Friday 9am")],
        mails=[Mail("m1", "Ana Ruiz", "ana@post.com", "Parking plan", "The room is ready.")],
        todos=[Todo("t1", "Sign lease")],
    )


@pytest.fixture
def desk():
    return Desk(small_state(), dead=["ben@old.org"])


# Tools


@pytest.mark.parametrize(
    ("tool", "arguments", "result"),
    [
        ("find_contact", {"name": "ana"}, "Ana Ruiz ana@post.com"),
        ("find_contact", {"name": "An"}, "no match"),
        ("save_contact", {"name": "Leo Diaz", "email": "leo@x.org"}, "saved"),
        ("save_contact", {"name": "ana ruiz", "email": "ana@x.org"}, "saved, was ana@post.com"),
        ("find_events", {"text": "Budget review"}, "e1 Budget review Tuesday 2pm"),
        ("find_events", {"text": "friday"}, "e2 Sales call Friday 9am"),
        ("find_events", {"text": ""}, "e1 Budget review Tuesday 2pm\ne2 Sales call Friday 9am"),
        ("create_event", {"title": "Team lunch", "when": "monday 1PM"}, "booked e21"),
        ("move_event", {"id": "e1", "when": "Friday 10am"}, "moved Budget review from Tuesday 2pm"),
        ("cancel_event", {"id": "e2"}, "cancelled Sales call Friday 9am"),
        ("search_mail", {"text": "parking"}, "m1 Ana Ruiz: Parking plan"),
        ("search_mail", {"text": "Ana Ruiz"}, "m1 Ana Ruiz: Parking plan"),
        ("read_mail", {"id": "m1"}, "ana@post.com: The room is ready."),
        ("send_mail", {"to": "ana@post.com", "text": "Hello."}, "sent"),
        ("find_tasks", {"text": "lease"}, "t1 Sign lease"),
        ("add_task", {"title": "Print agenda"}, "added t21"),
        ("complete_task", {"id": "t1"}, "done Sign lease"),
    ],
)
def test_a_tool_answers_in_a_line_for_each_thing(desk, tool, arguments, result):
    assert desk.call(tool, arguments) == result


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("delete_all", {}, "no tool delete_all; there are find_contact, .*complete_task"),
        ("create_event", {"title": "Team lunch", "when": "Tuesday 2pm"}, "^Tuesday 2pm is taken$"),
        ("create_event", {"title": "Team lunch", "when": "tomorrow"}, "when is tomorrow; wanted one of Monday.*9am"),
        ("create_event", {"title": " ", "when": "Monday 9am"}, "title is empty"),
        ("move_event", {"id": "e1", "when": "Friday 9am"}, "^Friday 9am is taken$"),
        ("move_event", {"id": "e1", "when": "Sunday 9am"}, "when is Sunday 9am; wanted one of Monday"),
        ("move_event", {"id": "e9", "when": "Friday 9am"}, "no event e9; find_events shows the ids"),
        ("cancel_event", {"id": "Sales call"}, "no event Sales call; find_events shows"),
        ("read_mail", {"id": "m7"}, "no mail m7; search_mail shows"),
        ("complete_task", {"id": "t7"}, "no task t7; find_tasks shows"),
        ("send_mail", {"to": "Ana", "text": "Hello."}, "Ana is no address; find_contact shows it"),
        ("send_mail", {"to": "ana@post.com", "text": ""}, "text is empty"),
        ("send_mail", {"to": "ben@old.org", "text": "Hello."}, "^ben@old.org bounced$"),
        ("save_contact", {"name": "Leo Diaz", "email": "leo"}, "leo is no address"),
        ("save_contact", {"name": "Ana Ruiz", "email": "leo"}, "leo is no address"),
        ("save_contact", {"name": "", "email": "leo@x.org"}, "name is empty"),
        ("add_task", {"title": ""}, "title is empty"),
    ],
)
def test_a_call_that_cannot_be_done_says_why_and_changes_nothing(desk, tool, arguments, message):
    with pytest.raises(ToolError, match=message):
        desk.call(tool, arguments)
    assert desk.state == small_state()


@pytest.mark.parametrize("tool", [tool["function"] for tool in TOOLS], ids=lambda tool: tool["name"])
def test_arguments_that_do_not_fit_the_schema_are_refused_with_what_is_wanted(desk, tool):
    names = list(tool["parameters"]["properties"])
    right = dict.fromkeys(names, "x")
    for wrong, complaint in [
        (right | {names[-1]: 5}, f"{names[-1]}: 5 is not of type 'string'"),
        (right | {names[0]: None}, f"{names[0]}: None is not of type 'string'"),
        ({name: "x" for name in names[1:]}, f"'{names[0]}' is a required property"),
        (right | {"other": "x"}, "'other' was unexpected"),
    ]:
        with pytest.raises(ToolError) as raised:
            desk.call(tool["name"], wrong)
        assert f"{tool['name']} takes {', '.join(names)}; " in str(raised.value)
        assert complaint in str(raised.value)
    assert desk.state == small_state()


def test_the_tools_are_openai_schemas_and_few_words():
    assert len(TOOLS) == 12
    for tool in TOOLS:
        assert tool["type"] == "function"
        jsonschema.Draft202012Validator.check_schema(tool["function"]["parameters"])
    assert len(json.dumps(TOOLS)) < 3200


def test_a_busy_tool_fails_once_at_a_call_that_fits():
    desk = Desk(small_state(), busy=["add_task"])
    with pytest.raises(ToolError, match="takes title"):
        desk.call("add_task", {})
    with pytest.raises(ToolError, match=r"^add_task is busy, try again$"):
        desk.call("add_task", {"title": "Print agenda"})
    assert desk.state == small_state()
    assert desk.call("add_task", {"title": "Print agenda"}) == "added t21"


def test_an_id_is_never_given_twice(desk):
    desk.call("create_event", {"title": "Team lunch", "when": "Monday 9am"})
    desk.call("cancel_event", {"id": "e21"})
    assert desk.call("create_event", {"title": "Team lunch", "when": "Monday 9am"}) == "booked e22"


def test_a_state_is_json_and_is_not_shared():
    state = small_state()
    again = State.read(json.loads(json.dumps(state.wire)))
    assert again == state
    again.events[0].when = "Monday 9am"
    assert state == small_state()


def test_what_counts_of_a_state_is_all_but_ids_and_marks_at_the_ends():
    state, other = small_state(), small_state()
    other.events[0].id, other.events[0].title = "e9", "budget  review."
    assert other.content == state.content
    for change in (
        lambda s: s.contacts[0].__setattr__("email", "x@y.org"),
        lambda s: s.events[0].__setattr__("when", "Monday 9am"),
        lambda s: s.events.append(s.events[0]),
        lambda s: s.mails.clear(),
        lambda s: s.todos.clear(),
    ):
        other = small_state()
        change(other)
        assert other.content != state.content


# Tasks


def test_it_is_an_environment():
    assert isinstance(OFFICE, Environment)
    assert OFFICE.tasks("nonsense") == ()
    assert [len(Office(train=5, val=0, calibration=1, test=2, unseen=3).tasks(s)) for s in SPLITS] == [5, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="test is -1; wanted a number of tasks"):
        Office(test=-1)


def test_a_task_is_json_and_the_same_every_time_whatever_was_played_before():
    task = OFFICE.tasks("test")[7]
    first = begin(OFFICE, task)
    assert json.loads(json.dumps(task.data)) == task.data
    draw_tasks.cache_clear()
    again = Office(train=1).tasks("test")
    assert list(again) == [t for t in EVERY if t in again]
    assert again[7].data == task.data
    assert begin(OFFICE, Task(task.id, task.family, json.loads(json.dumps(task.data)))) == first
    assert [message.role for message in first] == ["system", "user"]
    assert OFFICE.state == State.read(task.data["start"])


def test_more_tasks_begin_with_the_same_and_another_seed_has_others():
    assert Office(test=30).tasks("test") == Office(test=60).tasks("test")[:30]
    assert not {t.id for t in Office(seed=1).tasks("test")} & {t.id for t in OFFICE.tasks("test")}


def test_ids_are_unique():
    assert len({task.id for task in EVERY}) == len(EVERY)


def test_a_sixth_for_each_number_of_calls_and_a_third_with_trouble():
    for split in SPLITS:
        tasks = OFFICE.tasks(split)
        assert Counter(t.data["calls"] for t in tasks) == dict.fromkeys(range(1, 7), len(tasks) // 6)
        assert sum(bool(t.data["trouble"]) for t in tasks) == len(tasks) // 3
    for calls in range(1, 7):
        tasks = [t for t in OFFICE.tasks("train") if t.data["calls"] == calls]
        kinds = Counter(TROUBLES[t.data["trouble"]] for t in tasks if t.data["trouble"])
        assert sum(kinds.values()) == len(tasks) // 3
        assert max(kinds.values()) - min(kinds.values()) <= 1
        possible = {1: {"missing", "impossible"}, 5: {"missing", "wrong"}, 6: {"missing", "wrong"}}
        assert set(kinds) == possible.get(calls, {"missing", "wrong", "impossible"})


def test_every_family_and_trouble_comes_up():
    train = Office().tasks("train")
    assert {t.family for t in train} == {form.split("+")[0] for form in FORMS} - set(UNSEEN)
    assert {t.family for t in OFFICE.tasks("unseen")} == set(UNSEEN)
    assert {t.data["trouble"] for t in train} == {"", *TROUBLES} - {"second"}
    assert {t.data["trouble"] for t in Office(unseen=180).tasks("unseen")} == {""} | {
        trouble for form, entry in FORMS.items() if form.split("+")[0] in UNSEEN for trouble in entry.calls
    }


def test_no_request_and_no_parameters_of_one_split_stand_in_another_of_any_seed():
    sides = [[*Office(seed=seed, train=360).tasks(split)] for seed in (0, 1) for split in SPLITS]
    for i, side in enumerate(sides):
        for j, other in enumerate(sides[:i]):
            if i % len(SPLITS) == j % len(SPLITS):
                continue
            assert not {t.data["request"] for t in side} & {t.data["request"] for t in other}
            assert not {meaning(t) for t in side} & {meaning(t) for t in other}
    for side in sides:
        assert len({meaning(t) for t in side}) == len(side)


def meaning(task):
    return json.dumps(read_request(task.data["request"]))


def test_pools_that_hold_no_more_say_so(monkeypatch):
    monkeypatch.setattr("attar.agents.office.generate._ATTEMPTS", 1)
    with pytest.raises(ValueError, match=r"val: no new task of \d calls after \d+ tasks; .*ask for fewer"):
        draw_tasks("val", 60, 99)
    with pytest.raises(ValueError, match="split is 'dev'; wanted one of train"):
        draw_tasks("dev", 1, 0)


def test_every_phrasing_is_read_as_what_it_says_and_as_nothing_else():
    values = {
        "events": ["Budget review on Monday 9am", "Team lunch on Friday 10am", "Sales demo on Friday 2pm"],
        "tasks": ["Sign lease", "Print agenda", "Check minutes"],
        "titles": ["Budget review", "Team lunch"],
        "names": ["Ana Adams", "Ben"],
        "name": "Clara",
        "title": "Press briefing",
        "off": "Legal call",
        "task": "File contract",
        "done": "Scan passport",
        "topic": "Parking plan",
        "when": "Tuesday 2pm",
        "other": "Monday 11am",
        "day": "Friday",
        "email": "clara@post.com",
        "text": "Book Team lunch and tell Ana: it is late.",
    }
    shown = values | {
        "events": "Budget review on Monday 9am, Team lunch on Friday 10am and Sales demo on Friday 2pm",
        "tasks": "Sign lease, Print agenda and Check minutes",
        "titles": "Budget review and Team lunch",
        "names": "Ana Adams and Ben",
    }
    assert PHRASES.keys() == FORMS.keys()
    for form, phrases in PHRASES.items():
        for phrase in phrases:
            read = read_request(phrase.format(**shown))
            assert read is not None, phrase
            assert read == (form, {name: values[name] for name in read[1]}), phrase
            assert all(f"{{{name}}}" in phrase for name in read[1])
    assert read_request("Make tea.") is None


def test_a_search_can_only_find_what_is_meant():
    assert not set(FIRST_NAMES) & set(LAST_NAMES)
    for pool in (EVENTS, TASKS, TOPICS):
        assert len({frozenset(words(item)) for item in pool}) == len(pool)
    names = words(" ".join(FIRST_NAMES + LAST_NAMES))
    assert not names & words(" ".join(TOPICS) + " New address")


# Judging


def test_doing_nothing_and_saying_done_never_succeeds():
    for task in EVERY:
        outcome = play(OFFICE, task, saying("Done."))[1]
        assert not outcome.success, task
        assert outcome.score == 0
        assert outcome.reason in ("nothing done", "no refusal", "wrong answer")


@pytest.mark.parametrize("word", ["CANNOT", "NEED"])
def test_refusing_always_succeeds_only_where_that_is_right(word):
    for task in EVERY:
        outcome = play(OFFICE, task, saying(f"{word}: no."))[1]
        assert outcome.success == (task.data["answer"] == word)
        right = {word: "", "": "nothing done"}.get(task.data["answer"], "wrong refusal")
        assert outcome.reason == ("gave up" if task.data["says"] else right)


def test_calls_at_random_do_not_succeed():
    rng = random.Random(0)
    arguments = [{"id": f"{letter}{n}"} for letter in "emt" for n in range(1, 5)]
    arguments += [{"text": "Friday"}, {"title": "Odd hour", "when": "Monday 9am"}, {"title": "Odd job"}]
    lucky = 0
    for task in EVERY[:300]:
        calls = [(rng.choice(TOOLS)["function"]["name"], rng.choice(arguments)) for _ in range(8)]
        messages, outcome = play(OFFICE, task, saying(*calls))
        assert len(called(messages)) == 8
        lucky += outcome.success
    # A guess may hit the one event that is to be cancelled.
    assert lucky <= 1


EXTRA = [
    ("create_event", {"title": "Odd hour", "when": None}),
    ("add_task", {"title": "Odd job"}),
    ("save_contact", {"name": "Odd Person", "email": "odd@x.org"}),
    ("send_mail", {"to": "odd@x.org", "text": "Hello."}),
    ("complete_task", {"id": None}),
    ("cancel_event", {"id": None}),
]


@pytest.mark.parametrize(("tool", "arguments"), EXTRA, ids=[tool for tool, _ in EXTRA])
def test_touching_one_thing_more_fails(tool, arguments):
    """Whatever the tool, at the end of an episode that would have succeeded."""
    for task in EVERY[::5]:
        messages = play(OFFICE, task)[0]
        free = next(h for h in ("Monday 9am", "Tuesday 9am", "Friday 4pm", "Friday 5pm", "Monday 2pm") if is_free(h))
        store = "todos" if tool == "complete_task" else "events"
        untouched = [row["id"] for row in task.data["start"][store] if row in task.data["goal"][store]]
        filled = {name: value or {"when": free, "id": untouched[0]}[name] for name, value in arguments.items()}
        answer_calls(OFFICE, Message("assistant", "", (ToolCall("x", tool, filled),)))
        outcome = OFFICE.finish(messages)
        assert (outcome.success, outcome.reason, outcome.score) == (False, "touched more", 0.0), task


def is_free(hour):
    return all(event.when != hour for event in OFFICE.state.events)


def example(**changes):
    """A task to tell Ana something and to note something."""
    start, goal = small_state(), small_state()
    goal.todos.append(Todo("", "Print agenda"))
    goal.todos.append(Todo("", "Scan lease"))
    row = {"request": "-", "start": start.wire, "goal": goal.wire, "answer": "", "says": "", "busy": [], "dead": []}
    return Task("example", "example", row | changes)


ADD, OTHER = ("add_task", {"title": "Print agenda"}), ("add_task", {"title": "scan lease."})


@pytest.mark.parametrize(
    ("said", "reason", "score"),
    [
        ((ADD, OTHER), "", 1.0),
        ((OTHER, ADD, "All is on the list."), "", 1.0),
        ((ADD,), "half done", 0.5),
        ((), "nothing done", 0.0),
        ((ADD, ("add_task", {"title": "Sign lease"})), "wrong change", 0.0),
        ((ADD, OTHER, ("add_task", {"title": "Sign lease"})), "touched more", 0.0),
        ((ADD, OTHER, OTHER), "touched more", 0.0),
        ((ADD, OTHER, "CANNOT: no."), "gave up", 0.0),
        ((ADD, OTHER, " "), "no answer", 0.0),
    ],
)
def test_an_outcome_has_a_reason_and_a_score(said, reason, score):
    outcome = play(OFFICE, example(), saying(*said))[1]
    assert (outcome.success, outcome.reason, outcome.score) == (not reason, reason, score)


@pytest.mark.parametrize(
    ("says", "said", "reason"),
    [
        ("ana@post.com", "ana@post.com", ""),
        ("ana@post.com", "It is ana@post.com.", ""),
        ("ana@post.com", "ben@old.org", "wrong answer"),
        ("ana@post.com", "ana@post.com or ben@old.org", "wrong answer"),
        ("ana@post.com", "Ana Ruiz", "wrong answer"),
        ("Tuesday 2pm", "It is on Tuesday 2pm.", ""),
        ("Tuesday 2pm", "Tuesday", "wrong answer"),
        ("Tuesday 2pm", "NEED: which?", "gave up"),
    ],
)
def test_what_was_asked_must_be_said_and_nothing_else_of_its_kind(says, said, reason):
    task = example(goal=small_state().wire, says=says)
    assert play(OFFICE, task, saying(said))[1].reason == reason


def test_an_episode_that_is_cut_off_has_no_answer():
    task = example(goal=small_state().wire)
    messages = begin(OFFICE, task)
    assert OFFICE.finish(messages).reason == "no answer"
    messages += answer_calls(OFFICE, Message("assistant", "", (ToolCall("x", "find_tasks", {"text": ""}),)))
    assert OFFICE.finish(messages).reason == "no answer"
    assert OFFICE.finish(()).reason == "no answer"
    assert go_on(OFFICE, messages, saying("Done."))[1].success


def test_an_episode_that_has_not_begun_has_no_end():
    with pytest.raises(ValueError, match="no episode has begun"):
        Office().finish(())


def test_the_rule_of_refusals_stands_in_the_prompt():
    system = begin(OFFICE, EVERY[0])[0].content
    assert '"CANNOT: ' in system
    assert '"NEED: ' in system
    assert expert(begin(OFFICE, EVERY[0])).role == "assistant"

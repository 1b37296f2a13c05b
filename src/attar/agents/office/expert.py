"""A script that solves the office's tasks from the messages alone. It is no model: imitating it is imitation."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from attar.agents.office.notes import End, Next, Notes
from attar.agents.office.phrases import read_request
from attar.data.types import Message, ToolCall
from attar.engines.base import ChatRequest, Failure
from attar.engines.scripted import ScriptedChat

__all__ = ["OfficeExpert"]


class OfficeExpert(ScriptedChat):
    """Says what to do next in any state of an episode of the office, its own or another agent's.

    It reads the request by the grammar that the tasks are worded in and everything else from the results of the
    calls so far. What another agent changed and should not have, it takes back where a tool can, and goes on; what no
    tool takes back (a mail, a new contact) it leaves. Its answers name the model ``scripted``.
    """

    def __init__(self) -> None:
        super().__init__(_next)


def _next(request: ChatRequest) -> Message | Failure:
    wish = next((message.content for message in request.messages if message.role == "user"), "")
    read = read_request(wish)
    if read is None:
        return Failure(
            "bad request", f"{wish[:80]!r} is no request that the office's script knows", final=True, usd=0.0
        )
    form, named = read
    notes = Notes(request.messages)
    refused = False
    try:
        answer = _PLANS[form](notes, named) or "Done."
    except Next as call:
        return _call(call, notes.count)
    except End as end:
        answer, refused = str(end), True
    step = notes.next(refused)
    return Message("assistant", answer) if step is None else _call(step, notes.count)


def _call(step: Next, number: int) -> Message:
    call = ToolCall(f"call_{number + 1}", step.tool, step.arguments)
    return Message("assistant", "", (call,), reasoning=step.why)


def _one(lines: list[str], what: str) -> str:
    """The only line; its first word is the id."""
    if not lines:
        raise End(f"CANNOT: no {what}.")
    if len(lines) > 1:
        raise End(f"NEED: which {what}?")
    return lines[0]


def _event(n: Notes, text: str) -> str:
    return _one(n.look("find_events", "Find the event.", text), text).split()[0]


def _task(n: Notes, text: str) -> str:
    return _one(n.look("find_tasks", "Find the task.", text), text).split()[0]


def _read(n: Notes, line: str) -> tuple[str, str]:
    """Address and body of a found mail."""
    address, _, body = "\n".join(n.look("read_mail", "Read it.", line.split()[0])).partition(": ")
    return address, body


def _topic(n: Notes, topic: str) -> tuple[str, str]:
    return _read(n, _one(n.look("search_mail", "Find the mail.", topic), f"{topic} mail"))


def _person(n: Notes, name: str) -> str:
    """The address of a contact, or of who wrote under that name."""
    lines = n.look("find_contact", "Find the address.", name)
    if lines:
        return _one(lines, name).split()[-1]
    return _written(n, name, "No contact, search the mail.")


def _written(n: Notes, name: str, why: str) -> str:
    return _read(n, _one(n.look("search_mail", why, name), name))[0]


def _send(n: Notes, name: str, to: str, text: str) -> None:
    if n.act("send_mail", "Send it.", to=to, text=text):
        to = _written(n, name, "It bounced, search the mail.")
        if n.act("send_mail", "Send it.", to=to, text=text):
            raise End(f"CANNOT: {to} bounced.")


def _book(n: Notes, title: str, when: str) -> None:
    _free(n.act("create_event", "Book it.", title=title, when=when))


def _shift(n: Notes, event: str, when: str) -> None:
    _free(n.act("move_event", "Move it.", id=event, when=when))


def _free(problem: str) -> None:
    if problem:
        raise End(f"CANNOT: {problem}.")


def _plan_book(n: Notes, p: Any) -> None:
    for event in p["events"]:
        _book(n, *event.split(" on "))


def _plan_todo(n: Notes, p: Any) -> None:
    for task in p["tasks"]:
        n.act("add_task", "Add it.", title=task)


def _plan_address(n: Notes, p: Any) -> str:
    return _person(n, p["name"])


def _plan_save(n: Notes, p: Any) -> None:
    n.act("save_contact", "Save it.", name=p["name"], email=p["email"])


def _plan_save_from_mail(n: Notes, p: Any) -> None:
    line = _one(n.look("search_mail", "Find the mail.", p["name"]), p["name"])
    name = line.partition(" ")[2].partition(":")[0]
    n.act("save_contact", "Save it.", name=name, email=_read(n, line)[0])


def _plan_move(n: Notes, p: Any) -> None:
    _shift(n, _event(n, p["title"]), p["when"])


def _plan_cancel(n: Notes, p: Any) -> None:
    for event in [_event(n, title) for title in p["titles"]]:
        n.act("cancel_event", "Cancel it.", id=event)


def _plan_finish(n: Notes, p: Any) -> None:
    for task in [_task(n, title) for title in p["tasks"]]:
        n.act("complete_task", "Tick it off.", id=task)


def _plan_mail(n: Notes, p: Any) -> None:
    for name, to in [(name, _person(n, name)) for name in p["names"]]:
        _send(n, name, to, p["text"])


def _plan_meet(n: Notes, p: Any) -> None:
    people = [(name, _person(n, name)) for name in p["names"]]
    _book(n, p["title"], p["when"])
    for name, to in people:
        _send(n, name, to, p["text"])


def _plan_reply(n: Notes, p: Any) -> None:
    n.act("send_mail", "Send it.", to=_topic(n, p["topic"])[0], text=p["text"])


def _plan_accept(n: Notes, p: Any) -> None:
    address, body = _topic(n, p["topic"])
    proposed = re.search(r"have (.+) on (\w+ \d+[ap]m)", body)
    if not proposed:
        raise End("NEED: which hour?")
    _book(n, proposed[1], proposed[2])
    if "text" in p:
        n.act("send_mail", "Send it.", to=address, text=p["text"])


def _plan_postpone(n: Notes, p: Any) -> None:
    event, to = _event(n, p["title"]), _person(n, p["name"])
    _shift(n, event, p["when"])
    _send(n, p["name"], to, p["text"])


def _plan_handover(n: Notes, p: Any) -> None:
    event, to = _event(n, p["title"]), _person(n, p["name"])
    n.act("cancel_event", "Cancel it.", id=event)
    n.act("add_task", "Add it.", title=p["task"])
    _send(n, p["name"], to, p["text"])


def _plan_when(n: Notes, p: Any) -> str:
    line = _one(n.look("find_events", "Find the event.", p["title"]), p["title"])
    return " ".join(line.split()[-2:])


def _plan_sender(n: Notes, p: Any) -> str:
    return _topic(n, p["topic"])[0]


def _plan_either(n: Notes, p: Any) -> None:
    if n.act("create_event", "Book it.", title=p["title"], when=p["when"]):
        _free(n.act("create_event", "Taken, book the other.", title=p["title"], when=p["other"]))


def _plan_clear(n: Notes, p: Any) -> None:
    lines = n.look("find_events", "Find the events.", p["day"])
    if not lines:
        raise End(f"CANNOT: no event on {p['day']}.")
    for line in lines:
        n.act("cancel_event", "Cancel it.", id=line.split()[0])
    n.act("add_task", "Add it.", title=p["task"])


def _plan_forward(n: Notes, p: Any) -> None:
    _, body = _topic(n, p["topic"])
    _send(n, p["name"], _person(n, p["name"]), body)


def _plan_swap(n: Notes, p: Any) -> None:
    n.act("complete_task", "Tick it off.", id=_task(n, p["done"]))
    n.act("add_task", "Add it.", title=p["task"])


def _plan_shuffle(n: Notes, p: Any) -> None:
    event, off = _event(n, p["title"]), _event(n, p["off"])
    to = _person(n, p["name"]) if "name" in p else ""
    _shift(n, event, p["when"])
    n.act("cancel_event", "Cancel it.", id=off)
    if "task" in p:
        n.act("add_task", "Add it.", title=p["task"])
    if "name" in p:
        _send(n, p["name"], to, p["text"])


_PLANS: dict[str, Callable[[Notes, Any], str | None]] = {
    "book": _plan_book,
    "todo": _plan_todo,
    "address": _plan_address,
    "save": _plan_save,
    "save+mail": _plan_save_from_mail,
    "move": _plan_move,
    "cancel": _plan_cancel,
    "finish": _plan_finish,
    "mail": _plan_mail,
    "meet": _plan_meet,
    "reply": _plan_reply,
    "accept": _plan_accept,
    "accept+tell": _plan_accept,
    "postpone": _plan_postpone,
    "handover": _plan_handover,
    "when": _plan_when,
    "sender": _plan_sender,
    "either": _plan_either,
    "clear": _plan_clear,
    "forward": _plan_forward,
    "swap": _plan_swap,
    "shuffle": _plan_shuffle,
    "shuffle+tell": _plan_shuffle,
    "shuffle+todo": _plan_shuffle,
}
"""What to do for each form of request; its answer is ``Done.`` where it returns none."""

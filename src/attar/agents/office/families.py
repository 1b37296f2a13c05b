"""What can be asked for: thirteen families for training and testing, seven that only ``unseen`` tests.

A form of request states how many calls a task of it takes, by trouble and by how many things it names. The families:

- seen: ``book`` events, put tasks on the list (``todo``), say an ``address``, ``save`` a contact, ``move`` an event,
  ``cancel`` events, ``finish`` tasks, ``mail`` people, ``meet`` (book and mail), ``reply`` to a mail, ``accept`` what a
  mail proposes, ``postpone`` (move and mail), ``handover`` (cancel, put on the list, mail)
- unseen: say ``when`` an event is, say the address of the ``sender`` of a mail, book at ``either`` of two hours,
  ``clear`` a day (and put on the list), ``forward`` a mail, ``swap`` tasks, ``shuffle`` (move and cancel; and mail, or
  put on the list)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attar.agents.office.drafts import Draft
from attar.agents.office.phrases import Parameters
from attar.agents.office.pools import DAYS
from attar.agents.office.state import Event, Mail, Sent, Todo

__all__ = ["FORMS", "TROUBLES", "UNSEEN", "Form"]

TROUBLES = {
    "which": "missing",
    "namesake": "missing",
    "elsewhere": "missing",
    "unsaid": "missing",
    "busy": "wrong",
    "stale": "wrong",
    "second": "wrong",
    "absent": "impossible",
    "nobody": "impossible",
    "taken": "impossible",
    "lost": "impossible",
}
"""What can be the matter with a task, and of which kind it is: information is missing, a tool gives a wrong result, the
wish is impossible. ``which``: two things fit; ``namesake``: two people do; ``elsewhere``: the address stands in a mail
only; ``unsaid``: no hour is named; ``busy``: a tool fails once; ``stale``: a contact's address is dead, a mail shows
the new one; ``second``: the first hour is taken, the second is not; ``absent``, ``nobody``: no such thing or person;
``taken``: the hour is; ``lost``: the address is dead, and there is no other."""

UNSEEN = ("when", "sender", "either", "clear", "forward", "swap", "shuffle")
"""families that no training task has"""


@dataclass(frozen=True)
class Form:
    """A form of request: how a task of it is made, and how long it is."""

    build: Callable[[Draft, int, str], Parameters]
    """(draft, how many things are named, trouble or nothing) -> what the request names"""
    tools: tuple[str, ...]
    """those that every task of it calls, of which one may be busy"""
    calls: dict[str, tuple[int, ...]]
    """trouble, or nothing -> calls that a task takes with 1, 2, ... things named; 0 where there is no such task"""


def _book(d: Draft, count: int, trouble: str) -> Parameters:
    events = [Event("", d.title(), d.free()) for _ in range(count)]
    d.add(*events)
    if trouble == "taken":
        d.takes(events[-1].when)
    return {"events": [f"{event.title} on {event.when}" for event in events]}


def _todo(d: Draft, count: int, trouble: str) -> Parameters:
    todos = [Todo("", d.todo_title()) for _ in range(count)]
    d.add(*todos)
    return {"tasks": [todo.title for todo in todos]}


def _address(d: Draft, count: int, trouble: str) -> Parameters:
    asked, d.says = d.person(trouble)
    return {"name": asked}


def _save(d: Draft, count: int, trouble: str) -> Parameters:
    person = d.someone()
    d.add(person)
    return {"name": person.name, "email": person.email}


def _save_from_mail(d: Draft, count: int, trouble: str) -> Parameters:
    person = d.someone()
    asked = d.called(person)
    if trouble == "absent":
        d.refuse("CANNOT")
    else:
        d.mail(person)
    if trouble == "namesake":
        asked = person.name.split()[0]
        d.mail(d.someone(asked))
        d.refuse("NEED")
    d.add(person)
    return {"name": asked}


def _move(d: Draft, count: int, trouble: str) -> Parameters:
    event, when = d.named_event(trouble), d.free()
    d.move(event, when)
    if trouble == "taken":
        d.takes(when)
    return {"title": event.title, "when": when}


def _cancel(d: Draft, count: int, trouble: str) -> Parameters:
    events = [d.named_event(trouble if i == count - 1 else "") for i in range(count)]
    d.drop(*events)
    return {"titles": [event.title for event in events]}


def _finish(d: Draft, count: int, trouble: str) -> Parameters:
    todos = [d.named_todo(trouble if i == count - 1 else "") for i in range(count)]
    d.drop(*todos)
    return {"tasks": [todo.title for todo in todos]}


def _mail(d: Draft, count: int, trouble: str) -> Parameters:
    text, names = d.text(), []
    for i in range(count):
        name, address = d.person(trouble if i == count - 1 else "")
        names.append(name)
        d.add(Sent(address, text))
    return {"names": names, "text": text}


def _meet(d: Draft, count: int, trouble: str) -> Parameters:
    event = Event("", d.title(), d.free())
    d.add(event)
    if trouble == "taken":
        d.takes(event.when)
    return {"title": event.title, "when": event.when} | _mail(d, count, trouble)


def _reply(d: Draft, count: int, trouble: str) -> Parameters:
    mail, text = d.named_mail(trouble), d.text()
    d.add(Sent(mail.address, text))
    return {"topic": mail.subject, "text": text}


def _proposal(d: Draft, trouble: str) -> Mail:
    """A mail that proposes what is to be booked."""
    event = Event("", d.title(), d.free())
    when = "next week" if trouble == "unsaid" else f"on {event.when}"
    mail = d.named_mail(trouble, f"Can we have {event.title} {when}?")
    d.add(event)
    if trouble == "taken":
        d.takes(event.when)
    if trouble == "unsaid":
        d.refuse("NEED")
    return mail


def _accept(d: Draft, count: int, trouble: str) -> Parameters:
    return {"topic": _proposal(d, trouble).subject}


def _accept_and_tell(d: Draft, count: int, trouble: str) -> Parameters:
    mail, text = _proposal(d, trouble), d.text()
    d.add(Sent(mail.address, text))
    return {"topic": mail.subject, "text": text}


def _tell(d: Draft, trouble: str) -> Parameters:
    """Somebody is to be told something too."""
    name, address = d.person(trouble)
    text = d.text()
    d.add(Sent(address, text))
    return {"name": name, "text": text}


def _note(d: Draft) -> Parameters:
    """Something is to be put on the list too."""
    todo = Todo("", d.todo_title())
    d.add(todo)
    return {"task": todo.title}


def _postpone(d: Draft, count: int, trouble: str) -> Parameters:
    return _move(d, 1, trouble) | _tell(d, trouble)


def _handover(d: Draft, count: int, trouble: str) -> Parameters:
    event = d.named_event(trouble)
    d.drop(event)
    return {"title": event.title} | _note(d) | _tell(d, trouble)


def _when(d: Draft, count: int, trouble: str) -> Parameters:
    event = d.named_event(trouble)
    d.says = event.when
    return {"title": event.title}


def _sender(d: Draft, count: int, trouble: str) -> Parameters:
    mail = d.named_mail(trouble)
    d.says = mail.address
    return {"topic": mail.subject}


def _either(d: Draft, count: int, trouble: str) -> Parameters:
    title, when, other = d.title(), d.free(), d.free()
    d.add(Event("", title, other if trouble == "second" else when))
    if trouble in ("second", "taken"):
        d.event(d.title(), when)
    if trouble == "taken":
        d.takes(other)
    return {"title": title, "when": when, "other": other}


def _clear(d: Draft, count: int, trouble: str) -> Parameters:
    day = d.rng.choice(DAYS)
    if trouble == "absent":
        d.refuse("CANNOT")
    else:
        d.drop(*(d.event(d.title(), d.free(day)) for _ in range(count)))
    d.keep_free(day)
    return {"day": day} | _note(d)


def _forward(d: Draft, count: int, trouble: str) -> Parameters:
    mail = d.named_mail(trouble)
    name, address = d.person(trouble)
    d.add(Sent(address, mail.body))
    return {"name": name, "topic": mail.subject}


def _swap(d: Draft, count: int, trouble: str) -> Parameters:
    todo = d.named_todo(trouble)
    d.drop(todo)
    return {"done": todo.title} | _note(d)


def _shuffle(d: Draft, count: int, trouble: str) -> Parameters:
    moved, when, off = d.named_event(), d.free(), d.named_event(trouble)
    d.move(moved, when)
    d.drop(off)
    if trouble == "taken":
        d.takes(when)
    return {"title": moved.title, "when": when, "off": off.title}


def _shuffle_and_tell(d: Draft, count: int, trouble: str) -> Parameters:
    return _shuffle(d, 1, trouble) | _tell(d, trouble)


def _shuffle_and_note(d: Draft, count: int, trouble: str) -> Parameters:
    return _shuffle(d, 1, trouble) | _note(d)


FORMS: dict[str, Form] = {
    "book": Form(_book, ("create_event",), {"": (1, 2, 3), "busy": (2, 3, 4), "taken": (1,)}),
    "todo": Form(_todo, ("add_task",), {"": (1, 2, 3), "busy": (2, 3, 4)}),
    "address": Form(
        _address, ("find_contact",), {"": (1,), "busy": (2,), "namesake": (1,), "elsewhere": (3,), "nobody": (2,)}
    ),
    "save": Form(_save, ("save_contact",), {"": (1,), "busy": (2,)}),
    "save+mail": Form(
        _save_from_mail,
        ("search_mail", "read_mail", "save_contact"),
        {"": (3,), "busy": (4,), "absent": (1,), "namesake": (1,)},
    ),
    "move": Form(
        _move, ("find_events", "move_event"), {"": (2,), "busy": (3,), "absent": (1,), "which": (1,), "taken": (2,)}
    ),
    "cancel": Form(
        _cancel,
        ("find_events", "cancel_event"),
        {"": (2, 4, 6), "busy": (3, 5), "absent": (1, 2, 3), "which": (1, 2, 3)},
    ),
    "finish": Form(_finish, ("find_tasks", "complete_task"), {"": (2, 4, 6), "busy": (3, 5), "absent": (1, 2, 3)}),
    "mail": Form(
        _mail,
        ("find_contact", "send_mail"),
        {
            "": (2, 4, 6),
            "busy": (3, 5),
            "namesake": (1, 2, 3),
            "elsewhere": (4, 6),
            "nobody": (2, 3, 4),
            "stale": (5,),
            "lost": (3,),
        },
    ),
    "meet": Form(
        _meet,
        ("find_contact", "create_event", "send_mail"),
        {"": (3, 5), "busy": (4, 6), "namesake": (1, 2), "elsewhere": (5,), "nobody": (2, 3), "taken": (2, 3)},
    ),
    "reply": Form(
        _reply, ("search_mail", "read_mail", "send_mail"), {"": (3,), "busy": (4,), "absent": (1,), "which": (1,)}
    ),
    "accept": Form(
        _accept,
        ("search_mail", "read_mail", "create_event"),
        {"": (3,), "busy": (4,), "absent": (1,), "which": (1,), "unsaid": (2,), "taken": (3,)},
    ),
    "accept+tell": Form(
        _accept_and_tell,
        ("search_mail", "read_mail", "create_event", "send_mail"),
        {"": (4,), "busy": (5,), "absent": (1,), "which": (1,), "unsaid": (2,), "taken": (3,)},
    ),
    "postpone": Form(
        _postpone,
        ("find_events", "find_contact", "move_event", "send_mail"),
        {
            "": (4,),
            "busy": (5,),
            "absent": (1,),
            "which": (1,),
            "namesake": (2,),
            "nobody": (3,),
            "taken": (3,),
            "elsewhere": (6,),
        },
    ),
    "handover": Form(
        _handover,
        ("find_events", "find_contact", "cancel_event", "add_task", "send_mail"),
        {"": (5,), "busy": (6,), "absent": (1,), "which": (1,), "namesake": (2,), "nobody": (3,)},
    ),
    "when": Form(_when, ("find_events",), {"": (1,), "busy": (2,), "absent": (1,), "which": (1,)}),
    "sender": Form(_sender, ("search_mail", "read_mail"), {"": (2,), "busy": (3,), "absent": (1,), "which": (1,)}),
    "either": Form(_either, ("create_event",), {"": (1,), "busy": (2,), "second": (2,), "taken": (2,)}),
    "clear": Form(
        _clear, ("find_events", "cancel_event", "add_task"), {"": (3, 4, 5, 6), "busy": (4, 5, 6), "absent": (1,)}
    ),
    "forward": Form(
        _forward,
        ("search_mail", "read_mail", "find_contact", "send_mail"),
        {"": (4,), "busy": (5,), "absent": (1,), "which": (1,), "namesake": (3,), "nobody": (4,), "elsewhere": (6,)},
    ),
    "swap": Form(_swap, ("find_tasks", "complete_task", "add_task"), {"": (3,), "busy": (4,), "absent": (1,)}),
    "shuffle": Form(
        _shuffle,
        ("find_events", "move_event", "cancel_event"),
        {"": (4,), "busy": (5,), "absent": (2,), "which": (2,), "taken": (3,)},
    ),
    "shuffle+tell": Form(
        _shuffle_and_tell,
        ("find_events", "find_contact", "move_event", "cancel_event", "send_mail"),
        {"": (6,), "absent": (2,), "which": (2,), "namesake": (3,), "nobody": (4,), "taken": (4,)},
    ),
    "shuffle+todo": Form(
        _shuffle_and_note,
        ("find_events", "move_event", "cancel_event", "add_task"),
        {"": (5,), "busy": (6,), "absent": (2,), "which": (2,), "taken": (3,)},
    ),
}
"""Every form of request, by its name."""

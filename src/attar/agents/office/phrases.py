"""How requests are worded, and what a worded request means: one grammar, written and read."""

from __future__ import annotations

import re
from random import Random

from attar.agents.office.pools import DAYS

__all__ = ["PHRASES", "Parameters", "join", "read_request", "write_request"]

Parameters = dict[str, str | list[str]]
"""what a request names: a text, or several of a kind"""

PHRASES: dict[str, tuple[str, ...]] = {
    "book": (
        "Book {events}.",
        "Please put {events} in my calendar.",
        "Schedule {events}.",
        "I need {events} in the calendar.",
    ),
    "todo": (
        "Put {tasks} on my list.",
        "Add {tasks} to my tasks.",
        "Note as to do: {tasks}.",
        "Do not let me forget {tasks}.",
    ),
    "address": (
        "What is the address of {name}?",
        "Give me the address of {name}.",
        "Which address has {name}?",
        "I need the mail address of {name}.",
    ),
    "save": (
        "Save {name}, {email}, as a contact.",
        "Add {name} with {email} to my contacts.",
        "New contact: {name}, {email}.",
        "Keep the address {email} of {name}.",
    ),
    "save+mail": (
        "Save the address from the mail of {name}.",
        "{name} wrote to me, save the address.",
        "Add {name} to my contacts, the address is in the mail.",
        "Make a contact of {name} from the mail.",
    ),
    "move": (
        "Move {title} to {when}.",
        "Shift {title} to {when}, please.",
        "Put {title} at {when} instead.",
        "I want {title} at {when}, move it.",
    ),
    "cancel": (
        "Cancel {titles}.",
        "Take {titles} off my calendar.",
        "Drop {titles}.",
        "I will not come to {titles}, cancel.",
    ),
    "finish": (
        "Tick off {tasks}.",
        "I have done {tasks}.",
        "Mark {tasks} as done.",
        "Take {tasks} off my list.",
    ),
    "mail": (
        "Tell {names}: {text}",
        "Write to {names}: {text}",
        "Mail {names}: {text}",
        "Let {names} know: {text}",
    ),
    "meet": (
        "Book {title} on {when} and tell {names}: {text}",
        "Schedule {title} on {when} and write to {names}: {text}",
        "Put {title} on {when} in my calendar and mail {names}: {text}",
        "I need {title} on {when} in the calendar, let {names} know: {text}",
    ),
    "reply": (
        "Reply to the mail about {topic}: {text}",
        "Answer the {topic} mail: {text}",
        "Write back on {topic}: {text}",
        "Respond to the mail on {topic}: {text}",
    ),
    "accept": (
        "Book what the mail about {topic} proposes.",
        "Accept the meeting in the {topic} mail.",
        "Put the meeting from the {topic} mail in my calendar.",
        "The mail on {topic} proposes a meeting, book it.",
    ),
    "accept+tell": (
        "Book what the mail about {topic} proposes and reply: {text}",
        "Accept the meeting in the {topic} mail and write back: {text}",
        "Put the meeting from the {topic} mail in my calendar and answer: {text}",
        "The mail on {topic} proposes a meeting, book it and reply: {text}",
    ),
    "postpone": (
        "Move {title} to {when} and tell {name}: {text}",
        "Shift {title} to {when} and write to {name}: {text}",
        "Put {title} at {when} instead and mail {name}: {text}",
        "I want {title} at {when}, move it and let {name} know: {text}",
    ),
    "handover": (
        "Cancel {title}, put {task} on my list and tell {name}: {text}",
        "Drop {title}, add {task} to my tasks and write to {name}: {text}",
        "Take {title} off my calendar, put {task} on my list and mail {name}: {text}",
        "I will not come to {title}, cancel, note as to do {task} and let {name} know: {text}",
    ),
    "when": (
        "When is {title}?",
        "Which day and hour has {title}?",
        "Tell me the time of {title}.",
    ),
    "sender": (
        "From which address came the {topic} mail?",
        "What is the address of the sender of the mail about {topic}?",
        "Who wrote about {topic}? Give me the address.",
    ),
    "either": (
        "Book {title} on {when}, or on {other} if that is taken.",
        "Schedule {title} on {when}; if that is taken, on {other}.",
        "Put {title} in my calendar on {when}, if taken on {other}.",
    ),
    "clear": (
        "Cancel everything on {day} and put {task} on my list.",
        "Take all events on {day} off my calendar and add {task} to my tasks.",
        "I am ill on {day}, cancel every event and note as to do {task}.",
    ),
    "forward": (
        "Tell {name} what the mail about {topic} says.",
        "Forward the {topic} mail to {name}.",
        "Send {name} the words of the mail about {topic}.",
    ),
    "swap": (
        "Tick off {done} and put {task} on my list.",
        "I have done {done}, add {task} to my tasks.",
        "Take {done} off my list and put {task} on it.",
    ),
    "shuffle": (
        "Move {title} to {when} and cancel {off}.",
        "Shift {title} to {when} and drop {off}.",
        "Put {title} at {when} instead and take {off} off my calendar.",
    ),
    "shuffle+tell": (
        "Move {title} to {when}, cancel {off} and tell {name}: {text}",
        "Shift {title} to {when}, drop {off} and write to {name}: {text}",
        "Put {title} at {when} instead, take {off} off my calendar and mail {name}: {text}",
    ),
    "shuffle+todo": (
        "Move {title} to {when}, cancel {off} and put {task} on my list.",
        "Shift {title} to {when}, drop {off} and add {task} to my tasks.",
        "Put {title} at {when} instead, take {off} off my calendar and note as to do {task}.",
    ),
}
"""Of each form of request; a form is named by its family and what is added to it."""

_PAIR = r"[A-Z]\w+ [a-z]+"
_DAY = rf"(?:{'|'.join(DAYS)})"
_WHEN = rf"{_DAY} \d+[ap]m"
_NAME = r"[A-Z]\w+(?: [A-Z]\w+)?"
_SLOTS = {
    "title": _PAIR,
    "titles": _PAIR,
    "off": _PAIR,
    "task": _PAIR,
    "tasks": _PAIR,
    "done": _PAIR,
    "topic": _PAIR,
    "name": _NAME,
    "names": _NAME,
    "when": _WHEN,
    "other": _WHEN,
    "day": _DAY,
    "events": rf"{_PAIR} on {_WHEN}",
    "email": r"\S+@\S+\.\w+",
    "text": ".+",
}
_SEVERAL = ("titles", "tasks", "names", "events")


def _pattern(phrase: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", phrase)
    for i in range(0, len(pieces), 2):
        pieces[i] = re.escape(pieces[i])
    for i in range(1, len(pieces), 2):
        slot = _SLOTS[pieces[i]]
        several = rf"(?:(?:{slot}, )*{slot} and )?{slot}" if pieces[i] in _SEVERAL else slot
        pieces[i] = f"(?P<{pieces[i]}>{several})"
    return re.compile("".join(pieces))


_PATTERNS = {form: [_pattern(phrase) for phrase in phrases] for form, phrases in PHRASES.items()}


def join(items: list[str]) -> str:
    """Several as one text: ``A, B and C``."""
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else items[0]


def write_request(form: str, parameters: Parameters, rng: Random) -> str:
    """A request in one of the form's phrasings."""
    texts = {name: join(value) if isinstance(value, list) else value for name, value in parameters.items()}
    return rng.choice(PHRASES[form]).format(**texts)


def read_request(text: str) -> tuple[str, Parameters] | None:
    """Form and parameters of a request; None where no phrasing is that of the text."""
    for form, patterns in _PATTERNS.items():
        for pattern in patterns:
            found = pattern.fullmatch(text.strip())
            if found:
                named = found.groupdict().items()
                return form, {n: re.split(", | and ", v) if n in _SEVERAL else v for n, v in named}
    return None

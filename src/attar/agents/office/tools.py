"""The twelve tools: their schemas, as data, and what they do to the office.

Every tool's list of parameters is read by a small model at every step, so names and descriptions are short.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

import jsonschema
import jsonschema.exceptions

from attar.agents.environments import ToolError
from attar.agents.office.pools import DAYS, HOURS
from attar.agents.office.state import Contact, Event, Sent, State, Todo, plain, words

__all__ = ["NO_MATCH", "TOOLS", "Desk"]

NO_MATCH = "no match"
"""what a search that finds nothing says"""

# Name: (description, parameters); all parameters are strings, and all are required.
_DECLARED: dict[str, tuple[str, tuple[str, ...]]] = {
    "find_contact": ("Find people by name", ("name",)),
    "save_contact": ("Add a contact or change its address", ("name", "email")),
    "find_events": ("Find events by title or day", ("text",)),
    "create_event": ("Book an hour, when is like Tuesday 2pm", ("title", "when")),
    "move_event": ("Move an event, when is like Tuesday 2pm", ("id", "when")),
    "cancel_event": ("Cancel an event", ("id",)),
    "search_mail": ("Find mails by sender or subject", ("text",)),
    "read_mail": ("Read a mail", ("id",)),
    "send_mail": ("Send a text to an address", ("to", "text")),
    "find_tasks": ("Find tasks on the list", ("text",)),
    "add_task": ("Put a task on the list", ("title",)),
    "complete_task": ("Take a finished task off the list", ("id",)),
}

TOOLS: tuple[dict[str, Any], ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {parameter: {"type": "string"} for parameter in parameters},
                "required": list(parameters),
            },
        },
    }
    for name, (description, parameters) in _DECLARED.items()
)
"""OpenAI schemas"""

_VALIDATORS = {
    tool["function"]["name"]: jsonschema.Draft202012Validator(
        tool["function"]["parameters"] | {"additionalProperties": False}
    )
    for tool in TOOLS
}
_WHEN = re.compile(rf"({'|'.join(DAYS)}) ({'|'.join(HOURS)})", re.IGNORECASE)
_EMAIL = re.compile(r"[^@\s]+@[^@\s]+\.\w+")


class Desk:
    """The office at work on one state.

    Args:
        state: changed by the calls.
        busy: tools whose first call fails and asks to be tried again.
        dead: addresses that bounce.
    """

    def __init__(self, state: State, *, busy: Collection[str] = (), dead: Collection[str] = ()) -> None:
        self.state = state
        self._busy, self._dead = set(busy), {plain(address) for address in dead}
        self._made = 0
        self._tools: dict[str, Callable[..., str]] = {name: getattr(self, f"_{name}") for name in _DECLARED}

    def call(self, tool: str, arguments: dict[str, Any]) -> str:
        """The result of a call, a line or several.

        Raises:
            ToolError: there is no such tool, the arguments do not fit its schema, or it cannot be done; nothing has
                changed.
        """
        if tool not in self._tools:
            raise ToolError(f"no tool {tool}; there are {', '.join(self._tools)}")
        error = jsonschema.exceptions.best_match(_VALIDATORS[tool].iter_errors(arguments))
        if error is not None:
            where = "".join(f"{part}: " for part in error.path)
            raise ToolError(f"{tool} takes {', '.join(_DECLARED[tool][1])}; {where}{error.message}")
        if tool in self._busy:
            self._busy.remove(tool)
            raise ToolError(f"{tool} is busy, try again")
        return self._tools[tool](**arguments)

    def _find_contact(self, name: str) -> str:
        return _lines(f"{c.name} {c.email}" for c in self.state.contacts if words(name) <= words(c.name))

    def _save_contact(self, name: str, email: str) -> str:
        if not plain(name):
            raise ToolError("name is empty")
        for contact in self.state.contacts:
            if plain(contact.name) == plain(name):
                before, contact.email = contact.email, _address(email)
                return f"saved, was {before}"
        self.state.contacts.append(Contact(name.strip(), _address(email)))
        return "saved"

    def _find_events(self, text: str) -> str:
        found = (e for e in self.state.events if words(text) <= words(f"{e.title} {e.when}"))
        return _lines(f"{e.id} {e.title} {e.when}" for e in found)

    def _create_event(self, title: str, when: str) -> str:
        if not plain(title):
            raise ToolError("title is empty")
        event = Event(self._new_id("e", self.state.events), title.strip(), self._free(when))
        self.state.events.append(event)
        return f"booked {event.id}"

    def _move_event(self, id: str, when: str) -> str:
        event = _by_id(self.state.events, id, "event", "find_events")
        before, event.when = event.when, self._free(when)
        return f"moved {event.title} from {before}"

    def _cancel_event(self, id: str) -> str:
        event = _by_id(self.state.events, id, "event", "find_events")
        self.state.events.remove(event)
        return f"cancelled {event.title} {event.when}"

    def _search_mail(self, text: str) -> str:
        found = (m for m in self.state.mails if words(text) <= words(f"{m.sender} {m.subject}"))
        return _lines(f"{m.id} {m.sender}: {m.subject}" for m in found)

    def _read_mail(self, id: str) -> str:
        mail = _by_id(self.state.mails, id, "mail", "search_mail")
        return f"{mail.address}: {mail.body}"

    def _send_mail(self, to: str, text: str) -> str:
        if not plain(text):
            raise ToolError("text is empty")
        address = _address(to)
        if plain(address) in self._dead:
            raise ToolError(f"{address} bounced")
        self.state.sent.append(Sent(address, text.strip()))
        return "sent"

    def _find_tasks(self, text: str) -> str:
        return _lines(f"{t.id} {t.title}" for t in self.state.todos if words(text) <= words(t.title))

    def _add_task(self, title: str) -> str:
        if not plain(title):
            raise ToolError("title is empty")
        todo = Todo(self._new_id("t", self.state.todos), title.strip())
        self.state.todos.append(todo)
        return f"added {todo.id}"

    def _complete_task(self, id: str) -> str:
        todo = _by_id(self.state.todos, id, "task", "find_tasks")
        self.state.todos.remove(todo)
        return f"done {todo.title}"

    def _free(self, when: str) -> str:
        """The hour as it is written in the calendar."""
        found = _WHEN.fullmatch(when.strip())
        if not found:
            raise ToolError(f"when is {when}; wanted one of {', '.join(DAYS)} and one of {', '.join(HOURS)}")
        hour = f"{found[1].capitalize()} {found[2].lower()}"
        if any(event.when == hour for event in self.state.events):
            raise ToolError(f"{hour} is taken")
        return hour

    def _new_id(self, letter: str, items: list[Event] | list[Todo]) -> str:
        """An id that nothing has or had."""
        self._made += 1
        return f"{letter}{20 + self._made}"


def _lines(found: Any) -> str:
    return "\n".join(found) or NO_MATCH


def _by_id(items: list[Any], wanted: str, kind: str, finder: str) -> Any:
    for item in items:
        if item.id == wanted.strip():
            return item
    raise ToolError(f"no {kind} {wanted}; {finder} shows the ids")


def _address(text: str) -> str:
    if not _EMAIL.fullmatch(text.strip()):
        raise ToolError(f"{text} is no address; find_contact shows it")
    return text.strip()

"""A task in the making: who and what there is in the office, and what shall be changed."""

from __future__ import annotations

from random import Random
from typing import Any

from attar.agents.office.pools import (
    DOMAINS,
    EVENTS,
    FIRST_NAMES,
    LAST_NAMES,
    SLOTS,
    TASKS,
    TEXTS,
    TOPICS,
)
from attar.agents.office.state import Contact, Event, Mail, Sent, State, Todo

__all__ = ["Draft"]


class Draft:
    """Start and goal of a task, made together. What it draws is drawn once, so that nothing is meant twice.

    Args:
        rng: where all choices come from.
    """

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self._firsts, self._lasts = self._shuffled(FIRST_NAMES), self._shuffled(LAST_NAMES)
        self._titles, self._tasks = self._shuffled(EVENTS), self._shuffled(TASKS)
        self._topics, self._texts = self._shuffled(TOPICS), self._shuffled(TEXTS)
        self._slots = self._shuffled(SLOTS)
        self._start = State()
        self._moved: list[tuple[Event, str]] = []
        self._gone: list[Event | Todo] = []
        self._new: list[Contact | Event | Sent | Todo] = []
        self.dead: list[str] = []
        self.answer, self.says = "", ""

    def _shuffled(self, pool: tuple[str, ...]) -> list[str]:
        return self.rng.sample(pool, len(pool))

    def title(self) -> str:
        """Of an event, not used yet; so below."""
        return self._titles.pop()

    def todo_title(self) -> str:
        """Of a task."""
        return self._tasks.pop()

    def topic(self) -> str:
        """Of a mail."""
        return self._topics.pop()

    def text(self) -> str:
        """Of a mail that is to be sent."""
        return self._texts.pop()

    def free(self, day: str = "") -> str:
        """An hour at which nothing is."""
        slot = next(slot for slot in reversed(self._slots) if slot.startswith(day))
        self._slots.remove(slot)
        return slot

    def keep_free(self, day: str) -> None:
        """Let nothing more be on a day."""
        self._slots = [slot for slot in self._slots if not slot.startswith(day)]

    def someone(self, first: str = "") -> Contact:
        """A person, who is not among the contacts yet."""
        first, last = first or self._firsts.pop(), self._lasts.pop()
        taken = {contact.email for contact in self._start.contacts} | {mail.address for mail in self._start.mails}
        free = [domain for domain in DOMAINS if f"{first.lower()}@{domain}" not in taken]
        return Contact(f"{first} {last}", f"{first.lower()}@{self.rng.choice(free)}")

    def called(self, person: Contact) -> str:
        """How a request names the person: mostly in full."""
        return person.name if self.rng.random() < 0.7 else person.name.split()[0]

    def person(self, trouble: str = "") -> tuple[str, str]:
        """Somebody the request names: the name in it and the address to use.

        ``trouble``: ``namesake`` (two have the name), ``nobody`` (none has, nor wrote), ``elsewhere`` (only a mail
        shows the address), ``stale`` (the contact's address is dead, a mail shows the new one), ``lost`` (dead, and
        none does); another or none: a plain contact.
        """
        person = self.someone()
        if trouble == "namesake":
            first = person.name.split()[0]
            self._start.contacts.append(person)
            self._start.contacts.append(self.someone(first))
            self.refuse("NEED")
            return first, person.email
        if trouble == "nobody":
            self.refuse("CANNOT")
        elif trouble == "elsewhere":
            self.mail(person)
        else:
            self._start.contacts.append(person)
        asked, address = self.called(person), person.email
        if trouble in ("stale", "lost"):
            self.dead.append(address)
        if trouble == "lost":
            self.refuse("CANNOT")
        if trouble == "stale":
            renewed = Contact(person.name, self.someone(person.name.split()[0]).email)
            self.mail(renewed, "New address")
            address = renewed.email
        return asked, address

    def event(self, title: str, when: str = "") -> Event:
        """One that is in the calendar."""
        event = Event("", title, when or self.free())
        self._start.events.append(event)
        return event

    def named_event(self, trouble: str = "") -> Event:
        """The event that a request names; ``absent``: there is none, ``which``: there are two."""
        event = Event("", self.title(), self.free())
        if trouble == "absent":
            self.refuse("CANNOT")
        else:
            self._start.events.append(event)
        if trouble == "which":
            self.event(event.title)
            self.refuse("NEED")
        return event

    def named_todo(self, trouble: str = "") -> Todo:
        """The same of a task on the list."""
        todo = Todo("", self.todo_title())
        if trouble == "absent":
            self.refuse("CANNOT")
        else:
            self._start.todos.append(todo)
        return todo

    def mail(self, person: Contact, subject: str = "", body: str = "") -> Mail:
        """One that came in."""
        mail = Mail("", person.name, person.email, subject or self.topic(), body or self.text())
        self._start.mails.append(mail)
        return mail

    def named_mail(self, trouble: str = "", body: str = "") -> Mail:
        """The mail that a request names by its subject; ``absent``: there is none, ``which``: there are two."""
        person = self.someone()
        mail = Mail("", person.name, person.email, self.topic(), body or self.text())
        if trouble == "absent":
            self.refuse("CANNOT")
        else:
            self._start.mails.append(mail)
        if trouble == "which":
            self.mail(self.someone(), mail.subject)
            self.refuse("NEED")
        return mail

    def takes(self, when: str) -> None:
        """Let an event stand where another is wished, so that the wish is impossible."""
        self.event(self.title(), when)
        self.refuse("CANNOT")

    def refuse(self, answer: str) -> None:
        """Let the task be to change nothing and to say so, in an answer that begins with this word."""
        self.answer = answer

    def add(self, *items: Contact | Event | Sent | Todo) -> None:
        """To the goal."""
        self._new.extend(items)

    def drop(self, *items: Event | Todo) -> None:
        """From the goal."""
        self._gone.extend(items)

    def move(self, event: Event, when: str) -> None:
        """In the goal."""
        self._moved.append((event, when))

    def finish(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Fill the office with what has nothing to do with the task, and number all.

        Returns:
            Start and goal, as JSON.
        """
        start = self._start
        for _ in range(self.rng.randint(2, 3)):
            start.contacts.append(self.someone())
            start.todos.append(Todo("", self.todo_title()))
            self.mail(self.someone())
            self.event(self.title())
        numbered: dict[str, list[Any]] = {"e": start.events, "m": start.mails, "t": start.todos}
        for letter, items in numbered.items():
            self.rng.shuffle(items)
            for number, item in enumerate(items, 1):
                item.id = f"{letter}{number}"
        self.rng.shuffle(start.contacts)
        wire = start.wire
        if self.answer:
            return wire, wire
        moved = {event.id: when for event, when in self._moved}
        gone = {item.id for item in self._gone}
        goal = State.read(wire)
        goal.events = [Event(e.id, e.title, moved.get(e.id, e.when)) for e in goal.events if e.id not in gone]
        goal.todos = [todo for todo in goal.todos if todo.id not in gone]
        for item in self._new:
            place: Any = {Contact: goal.contacts, Event: goal.events, Sent: goal.sent, Todo: goal.todos}[type(item)]
            place.append(item)
        return wire, goal.wire

"""What there is in the office: plain data, JSON in and out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Contact", "Event", "Mail", "Sent", "State", "Todo", "plain", "words"]


def plain(text: str) -> str:
    """A text without what does not count when two are compared: case, spaces, marks at its ends."""
    return " ".join(text.split()).strip(" .!?\"'").casefold()


def words(text: str) -> set[str]:
    """The words by which something is found."""
    return {word.strip(".,:;!?\"'").casefold() for word in text.split()} - {""}


@dataclass
class Contact:
    """A person whose address is known."""

    name: str
    email: str


@dataclass
class Event:
    """An hour in the calendar."""

    id: str
    title: str
    when: str
    """weekday and hour: ``Tuesday 2pm``"""


@dataclass
class Mail:
    """A mail that came in."""

    id: str
    sender: str
    address: str
    subject: str
    body: str


@dataclass
class Sent:
    """A mail that went out."""

    to: str
    text: str


@dataclass
class Todo:
    """A line of the to-do list."""

    id: str
    title: str


@dataclass
class State:
    """The whole office."""

    contacts: list[Contact] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    mails: list[Mail] = field(default_factory=list)
    todos: list[Todo] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)

    @property
    def wire(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def read(cls, row: dict[str, Any]) -> State:
        """The state of such JSON; nothing is shared with it."""
        return cls(
            contacts=[Contact(**item) for item in row["contacts"]],
            events=[Event(**item) for item in row["events"]],
            mails=[Mail(**item) for item in row["mails"]],
            todos=[Todo(**item) for item in row["todos"]],
            sent=[Sent(**item) for item in row["sent"]],
        )

    @property
    def content(self) -> Counter[tuple[str, ...]]:
        """What counts when two states are compared: everything but ids, which a cancelled and restored event loses."""
        return Counter(self._content())

    def _content(self) -> Iterator[tuple[str, ...]]:
        for contact in self.contacts:
            yield "contacts", plain(contact.name), plain(contact.email)
        for event in self.events:
            yield "calendar", plain(event.title), event.when
        for mail in self.mails:
            yield "inbox", mail.address, mail.subject, mail.body
        for todo in self.todos:
            yield "tasks", plain(todo.title)
        for sent in self.sent:
            yield "mail", plain(sent.to), plain(sent.text)

"""What an episode's calls have changed so far, as their results tell, and what there was before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from attar.agents.office.state import plain, words
from attar.agents.office.tools import NO_MATCH
from attar.data.types import Message

__all__ = ["DONE", "Call", "Ledger", "past_calls", "shown_lines"]

DONE = {
    "create_event": re.compile(r"booked (\w+)"),
    "move_event": re.compile(r"moved (.+) from (\S+ \d+[ap]m)"),
    "cancel_event": re.compile(r"cancelled (.+) (\S+ \d+[ap]m)"),
    "add_task": re.compile(r"added (\w+)"),
    "complete_task": re.compile(r"done (.+)"),
    "save_contact": re.compile(r"saved(?:, was (.+))?"),
    "send_mail": re.compile("sent"),
}
"""What a tool that changes something says when it has."""

_SHOWN = {
    "find_contact": re.compile(r".+ \S+@\S+"),
    "find_events": re.compile(r"e\d+ .+"),
    "search_mail": re.compile(r"m\d+ .+: .+"),
    "read_mail": re.compile(r"\S+@\S+: .+"),
    "find_tasks": re.compile(r"t\d+ .+"),
}
"""A line of what a tool that looks something up says when it has found it."""


@dataclass(frozen=True)
class Call:
    """One past call and what came of it."""

    tool: str
    arguments: dict[str, Any]
    result: str


def past_calls(messages: Sequence[Message]) -> list[Call]:
    """The calls of an episode with their results, which are told by the call's id, or by their order where it has none.

    A call without a result is left out.
    """
    calls: list[Call] = []
    waiting: list[tuple[str | None, str, dict[str, Any]]] = []
    for message in messages:
        if message.role == "assistant":
            waiting = [(call.id, call.name, call.arguments) for call in message.tool_calls]
        elif message.role == "tool":
            answered = next((call for call in waiting if message.tool_call_id in (None, call[0])), None)
            if answered is not None:
                waiting.remove(answered)
                calls.append(Call(answered[1], answered[2], message.content.strip()))
    return calls


def shown_lines(call: Call) -> list[str] | None:
    """What a look-up found, line by line; None where it failed, or the tool looks nothing up."""
    if call.tool not in _SHOWN:
        return None
    if call.result == NO_MATCH:
        return []
    lines = call.result.splitlines()
    return lines if lines and all(_SHOWN[call.tool].fullmatch(line) for line in lines) else None


@dataclass
class Ledger:
    """What has changed. What was changed back is in it no more."""

    made: dict[str, tuple[str, str]] = field(default_factory=dict)
    """id of an event that was booked and is there -> title, hour"""
    moved: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    """id of an event that was there before -> title, its first hour, its hour now"""
    gone: dict[str, tuple[str, str]] = field(default_factory=dict)
    """id of a cancelled one -> title, first hour"""
    added: dict[str, str] = field(default_factory=dict)
    """id of a task that was put on the list and is there -> title"""
    finished: dict[str, str] = field(default_factory=dict)
    """id of a task that was taken off -> title"""
    saved: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    """contact -> name, address before or nothing, address now"""
    sent: list[tuple[str, str]] = field(default_factory=list)
    """address, text"""
    restored: dict[str, str] = field(default_factory=dict)
    """id of what was taken away and made again -> its new id"""

    def now(self, id_: str) -> str:
        """The id that something has now."""
        while id_ in self.restored:
            id_ = self.restored[id_]
        return id_

    def occupies(self, when: str) -> bool:
        """Whether an hour is taken by what was booked or moved."""
        hours = [at for _, at in self.made.values()] + [at for _, _, at in self.moved.values()]
        return any(plain(at) == plain(when) for at in hours)

    def freed(self, when: str) -> bool:
        """Whether something that was at an hour was moved away or cancelled."""
        hours = [first for _, first in self.gone.values()] + [first for _, first, _ in self.moved.values()]
        return any(plain(first) == plain(when) for first in hours)

    def before(self, tool: str, text: str, lines: list[str]) -> list[str]:
        """What a search that is made now would have shown before all changes.

        Args:
            tool: that searches.
            text: what it searches for.
            lines: what it shows.
        """
        if tool == "find_events":
            left = [line for line in lines if line.split()[0] not in self.made.keys() | self.moved.keys()]
            moved = {id_: (title, first) for id_, (title, first, _) in self.moved.items()}
            there = [f"{id_} {title} {first}" for id_, (title, first) in (self.gone | moved).items()]
        elif tool == "find_tasks":
            left = [line for line in lines if line.split()[0] not in self.added]
            there = [f"{id_} {title}" for id_, title in self.finished.items()]
        elif tool == "find_contact":
            left = [line for line in lines if plain(line.rpartition(" ")[0]) not in self.saved]
            return left + [f"{n} {old}" for n, old, _ in self.saved.values() if old and words(text) <= words(n)]
        else:
            return lines
        return left + [line for line in there if words(text) <= words(line.partition(" ")[2])]

    def note(self, call: Call) -> None:
        """Write down what a call changed; one that failed, or only looked, changed nothing."""
        given = {name: str(value).strip() for name, value in call.arguments.items()}
        done = DONE[call.tool].fullmatch(call.result) if call.tool in DONE else None
        if done is None:
            return
        match call.tool:
            case "create_event":
                self._create(done[1], given["title"], given["when"])
            case "move_event":
                self._move(given["id"], done[1], done[2], given["when"])
            case "cancel_event":
                if self.made.pop(given["id"], None) is None:
                    self.gone[given["id"]] = self.moved.pop(given["id"], (done[1], done[2]))[:2]
            case "add_task":
                self._add(done[1], given["title"])
            case "complete_task":
                if self.added.pop(given["id"], None) is None:
                    self.finished[given["id"]] = done[1]
            case "save_contact":
                key = plain(given["name"])
                first = self.saved.pop(key, ("", done[1] or ""))[1]
                if plain(first) != plain(given["email"]):
                    self.saved[key] = (given["name"], first, given["email"])
            case "send_mail":
                self.sent.append((plain(given["to"]), plain(given["text"])))

    def _create(self, id_: str, title: str, when: str) -> None:
        for gone, (old_title, first) in self.gone.items():
            if plain(old_title) == plain(title) and plain(first) == plain(when):
                self.restored[gone] = id_
                del self.gone[gone]
                return
        self.made[id_] = (title, when)

    def _move(self, id_: str, title: str, before: str, when: str) -> None:
        if id_ in self.made:
            self.made[id_] = (title, when)
            return
        first = self.moved.pop(id_, ("", before))[1]
        if plain(first) != plain(when):
            self.moved[id_] = (title, first, when)

    def _add(self, id_: str, title: str) -> None:
        for finished, old_title in self.finished.items():
            if plain(old_title) == plain(title):
                self.restored[finished] = id_
                del self.finished[finished]
                return
        self.added[id_] = title

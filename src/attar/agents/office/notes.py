"""What an episode's messages tell: what was looked up, what was changed, and what that still leaves to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from attar.agents.office.state import plain
from attar.agents.office.tools import NO_MATCH
from attar.data.types import Message

__all__ = ["End", "Next", "Notes", "past_calls"]

# What a search looks at, and a booking runs into.
_STORES = {
    "find_events": "calendar",
    "create_event": "calendar",
    "move_event": "calendar",
    "find_tasks": "tasks",
    "find_contact": "contacts",
}
# A call that fails as often as this, and not for a reason that a plan knows, fails for good.
_TRIES = 3


class Next(Exception):
    """A call to make now: tool, arguments and the reason."""

    def __init__(self, tool: str, arguments: dict[str, Any], why: str) -> None:
        self.tool, self.arguments, self.why = tool, arguments, why


class End(Exception):
    """An answer that refuses: all that was changed is to be undone before it."""


@dataclass(frozen=True)
class Call:
    """One past call."""

    tool: str
    arguments: dict[str, Any]
    result: str

    def same(self, tool: str, arguments: dict[str, Any]) -> bool:
        """Whether it is this call."""
        return self.tool == tool and {k: plain(str(v)) for k, v in self.arguments.items()} == {
            k: plain(v) for k, v in arguments.items()
        }


def past_calls(messages: Sequence[Message]) -> list[Call]:
    """The calls of an episode with their results, which are told by the call's id, or by their order where it has none.

    A call without a result is left out.
    """
    calls: list[Call] = []
    open_calls: list[tuple[str | None, str, dict[str, Any]]] = []
    for message in messages:
        if message.role == "assistant":
            open_calls = [(call.id, call.name, call.arguments) for call in message.tool_calls]
        elif message.role == "tool":
            named = [call for call in open_calls if message.tool_call_id in (None, call[0])]
            if named:
                open_calls.remove(named[0])
                calls.append(Call(named[0][1], named[0][2], message.content.strip()))
    return calls


@dataclass
class _Ledger:
    """What the calls so far have changed, as their results tell."""

    made: dict[str, tuple[str, str]] = field(default_factory=dict)
    """id of an event that was booked and is there -> title, hour"""
    moved: dict[str, tuple[str, str]] = field(default_factory=dict)
    """id of an event that was there before -> its first hour, its hour now"""
    gone: dict[str, tuple[str, str]] = field(default_factory=dict)
    """id of a cancelled one -> title, first hour"""
    added: dict[str, str] = field(default_factory=dict)
    """id of a task that was put on the list and is there -> title"""
    finished: dict[str, str] = field(default_factory=dict)
    """id of a task that was taken off -> title"""
    saved: dict[str, tuple[str, str]] = field(default_factory=dict)
    """contact -> address before, or nothing; address now"""
    sent: list[tuple[str, str]] = field(default_factory=list)
    """address, text"""
    restored: dict[str, str] = field(default_factory=dict)
    """id of what was taken away and made again -> its new id"""

    def clean(self, store: str) -> bool:
        """Whether a store is as it was, ids aside."""
        if store == "calendar":
            return not (self.made or self.moved or self.gone)
        if store == "tasks":
            return not (self.added or self.finished)
        return not self.saved if store == "contacts" else True

    def now(self, id_: str) -> str:
        """The id that something has now."""
        while id_ in self.restored:
            id_ = self.restored[id_]
        return id_

    def note(self, call: Call) -> None:
        """Write down what a call changed; one that failed, or only looked, changed nothing."""
        given = {name: str(value).strip() for name, value in call.arguments.items()}
        done = _DONE[call.tool].fullmatch(call.result) if call.tool in _DONE else None
        if done is None:
            return
        match call.tool:
            case "create_event":
                self._create(done[1], given["title"], given["when"])
            case "move_event":
                self._move(given["id"], done[1], given["when"])
            case "cancel_event":
                self._cancel(given["id"], done[1], done[2])
            case "add_task":
                self._add(done[1], given["title"])
            case "complete_task":
                if self.added.pop(given["id"], None) is None:
                    self.finished[given["id"]] = done[1]
            case "save_contact":
                name = plain(given["name"])
                first = self.saved.get(name, (done[1] or "", ""))[0]
                self.saved[name] = (first, given["email"])
                if plain(first) == plain(given["email"]):
                    del self.saved[name]
            case "send_mail":
                self.sent.append((plain(given["to"]), plain(given["text"])))

    def _create(self, id_: str, title: str, when: str) -> None:
        for gone, (old_title, first) in self.gone.items():
            if plain(old_title) == plain(title) and first == when:
                self.restored[gone] = id_
                del self.gone[gone]
                return
        self.made[id_] = (title, when)

    def _move(self, id_: str, before: str, when: str) -> None:
        if id_ in self.made:
            self.made[id_] = (self.made[id_][0], when)
            return
        first = self.moved.pop(id_, (before, ""))[0]
        if first != when:
            self.moved[id_] = (first, when)

    def _cancel(self, id_: str, title: str, when: str) -> None:
        if self.made.pop(id_, None) is None:
            self.gone[id_] = (title, self.moved.pop(id_, (when, ""))[0])

    def _add(self, id_: str, title: str) -> None:
        for finished, old_title in self.finished.items():
            if plain(old_title) == plain(title):
                self.restored[finished] = id_
                del self.finished[finished]
                return
        self.added[id_] = title


_DONE = {
    "create_event": re.compile(r"booked (\w+)"),
    "move_event": re.compile(r"moved, was (.+)"),
    "cancel_event": re.compile(r"cancelled (.+) (\S+ \d+[ap]m)"),
    "add_task": re.compile(r"added (\w+)"),
    "complete_task": re.compile(r"done (.+)"),
    "save_contact": re.compile(r"saved(?:, was (.+))?"),
    "send_mail": re.compile("sent"),
}
"""What a tool that changes something says when it has."""


class Notes:
    """A plan reads and acts through its notes: what is known is answered, what is not is the next call.

    A plan is written as if it ran once from beginning to end. It is run anew after each result; ``look`` answers from
    the past or raises :class:`Next`; ``act`` takes what was done for done and what was not for what will be, so that at
    the plan's end it is known which of the past changes it does not want.

    A look-up of a store that had been changed is not believed once the changes are undone.

    Args:
        messages: of the episode so far.
    """

    def __init__(self, messages: Sequence[Message]) -> None:
        self._ledger = _Ledger()
        self._past: list[tuple[Call, bool]] = []
        for call in past_calls(messages):
            self._past.append((call, self._ledger.clean(_STORES.get(call.tool, ""))))
            self._ledger.note(call)
        self._pending: Next | None = None
        self._claimed: set[str] = set()
        self._sent = list(self._ledger.sent)

    @property
    def count(self) -> int:
        """Number of calls so far."""
        return len(self._past)

    def look(self, tool: str, why: str, argument: str) -> list[str]:
        """The lines of a search or a mail; empty where nothing was found."""
        name = {"find_contact": "name", "read_mail": "id"}.get(tool, "text")
        arguments = {name: argument}
        tries = [entry for entry in self._past if entry[0].same(tool, arguments)]
        found = [entry for entry in tries if _shows(tool, entry[0].result)]
        dirty = not self._ledger.clean(_STORES.get(tool, ""))
        known = [call for call, clean in found if clean] or [call for call, _ in found if dirty]
        if not known:
            self._give_up(tool, len(tries) - len(found))
            raise self._pending or Next(tool, arguments, "Busy, try again." if len(tries) > len(found) else why)
        lines = [] if known[0].result == NO_MATCH else known[0].result.splitlines()
        return [line for line in lines if line.split()[0] not in self._ledger.made | self._ledger.added]

    def act(self, tool: str, why: str, **arguments: str) -> str:
        """Do something, once. Empty where it is done or about to be, else what a tool says against it."""
        if tool in ("move_event", "cancel_event", "complete_task"):
            arguments["id"] = self._ledger.now(arguments["id"])
        if self._done(tool, arguments):
            return ""
        if tool == "move_event" and arguments["id"] in self._ledger.gone:
            title, _ = self._ledger.gone[arguments["id"]]
            self._claimed.add(arguments["id"])
            return self.act("create_event", why, title=title, when=arguments["when"])
        failed = [entry for entry in self._past if entry[0].same(tool, arguments) and tool in _DONE]
        failed = [entry for entry in failed if not _DONE[tool].fullmatch(entry[0].result)]
        final = [entry for entry in failed if re.search(r" is taken$| bounced$", entry[0].result)]
        if final:
            store = "calendar" if tool != "send_mail" else ""
            believed = any(clean for _, clean in final) or not self._ledger.clean(store) or len(final) > 1
            if believed:
                return final[-1][0].result
        else:
            self._give_up(tool, len(failed))
        if self._pending is None:
            self._pending = Next(tool, arguments, "Busy, try again." if failed and not final else why)
        self._claimed.update(plain(value) for name, value in arguments.items() if name in ("id", "name"))
        return ""

    def _done(self, tool: str, arguments: dict[str, str]) -> bool:
        """Whether the past has it; what does it is then wanted."""
        ledger, wanted = self._ledger, {name: plain(value) for name, value in arguments.items()}
        match tool:
            case "create_event":
                there = [i for i, (t, when) in ledger.made.items() if (plain(t), plain(when)) == tuple(wanted.values())]
            case "add_task":
                there = [i for i, title in ledger.added.items() if plain(title) == wanted["title"]]
            case "move_event":
                at = ledger.moved.get(arguments["id"])
                there = [arguments["id"]] if at and plain(at[1]) == wanted["when"] else []
            case "cancel_event":
                there = [i for i in ledger.gone if i == arguments["id"]]
            case "complete_task":
                there = [i for i in ledger.finished if i == arguments["id"]]
            case "save_contact":
                there = [n for n, at in ledger.saved.items() if (n, plain(at[1])) == tuple(wanted.values())]
            case _:
                mail = (wanted["to"], wanted["text"])
                if mail not in self._sent:
                    return False
                self._sent.remove(mail)
                return True
        there = [id_ for id_ in there if id_ not in self._claimed]
        self._claimed.update(there[:1])
        return bool(there)

    def _give_up(self, tool: str, tries: int) -> None:
        if tries >= _TRIES:
            raise End(f"CANNOT: {tool} fails.")

    def next(self, refused: bool) -> Next | None:
        """What is to be done at the plan's end: undo what was not wanted, then what is still to do, or nothing.

        Args:
            refused: nothing at all was wanted.
        """
        if refused:
            self._claimed.clear()
            self._pending = None
        return next(self._undo(), self._pending)

    def _undo(self) -> Iterator[Next]:
        """The call that takes back each change that was not wanted, where a tool can."""
        ledger, why = self._ledger, "That was wrong, undo it."
        for id_ in ledger.made:
            if id_ not in self._claimed:
                yield Next("cancel_event", {"id": id_}, why)
        for id_, (first, _) in ledger.moved.items():
            if id_ not in self._claimed:
                yield Next("move_event", {"id": id_, "when": first}, why)
        for id_, (title, first) in ledger.gone.items():
            if id_ not in self._claimed:
                yield Next("create_event", {"title": title, "when": first}, why)
        for id_ in ledger.added:
            if id_ not in self._claimed:
                yield Next("complete_task", {"id": id_}, why)
        for id_, title in ledger.finished.items():
            if id_ not in self._claimed:
                yield Next("add_task", {"title": title}, why)
        for name, (first, _) in ledger.saved.items():
            if name not in self._claimed and first:
                yield Next("save_contact", {"name": name, "email": first}, why)


def _shows(tool: str, result: str) -> bool:
    """Whether a result is what a search or a mail shows, and not that it failed."""
    if tool == "read_mail":
        return re.match(r"\S+@\S+: ", result) is not None
    if tool == "search_mail":
        return result == NO_MATCH or re.match(r"m\d+ .+: ", result) is not None
    if tool == "find_contact":
        return result == NO_MATCH or re.search(r" \S+@\S+$", result) is not None
    return result == NO_MATCH or re.match(r"[et]\d+ ", result) is not None

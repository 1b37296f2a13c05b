"""How a plan reads an episode's messages: what was looked up, what was done, and what that leaves to do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from attar.agents.office.ledger import DONE, Ledger, past_calls, shown_lines
from attar.agents.office.state import plain
from attar.data.types import Message

__all__ = ["End", "Next", "Notes"]

# A call that fails as often as this, and not for a reason that a plan knows, fails for good.
_TRIES = 3
# What a tool says against a call that will not do, however often it is made.
_REFUSED = re.compile(r"\w+ \d+[ap]m is taken|\S+@\S+ bounced")


class Next(Exception):
    """A call to make now: tool, arguments and the reason."""

    def __init__(self, tool: str, arguments: dict[str, Any], why: str) -> None:
        self.tool, self.arguments, self.why = tool, arguments, why


class End(Exception):
    """An answer that refuses: all that was changed is to be undone before it."""


_Key = tuple[str, frozenset[tuple[str, str]]]


def _key(tool: str, arguments: dict[str, Any]) -> _Key:
    """The same of calls that do the same."""
    return tool, frozenset((name, plain(str(value))) for name, value in arguments.items())


class Notes:
    """A plan reads and acts through its notes.

    A plan is written as if it ran once from beginning to end, and is run anew after each result. ``look`` answers from
    the past, as things were before any change, or raises :class:`Next`. ``act`` takes what was done for done and what
    was not for what will be, so that at the plan's end it is known which past changes it does not want.

    Args:
        messages: of the episode so far.
    """

    def __init__(self, messages: Sequence[Message]) -> None:
        self._ledger = Ledger()
        self._shown: dict[_Key, list[str]] = {}
        self._refused: dict[_Key, str] = {}
        self._failed: Counter[_Key] = Counter()
        calls = past_calls(messages)
        for call in calls:
            key = _key(call.tool, call.arguments)
            lines = shown_lines(call)
            if lines is not None:
                text = next((str(value) for value in call.arguments.values()), "")
                self._shown.setdefault(key, self._ledger.before(call.tool, text, lines))
            elif call.tool not in DONE or not DONE[call.tool].fullmatch(call.result):
                self._note_failure(key, call.arguments, call.result)
            self._ledger.note(call)
        self.count = len(calls)
        """number of calls so far"""
        self._pending: Next | None = None
        self._wanted: set[str] = set()
        self._unsent = list(self._ledger.sent)

    def _note_failure(self, key: _Key, arguments: dict[str, Any], result: str) -> None:
        refused = _REFUSED.search(result)
        if not refused:
            self._failed[key] += 1
        # An hour that the episode itself has taken will be free again.
        elif not self._ledger.occupies(str(arguments.get("when", ""))):
            self._refused[key] = refused[0]

    def look(self, tool: str, why: str, argument: str) -> list[str]:
        """The lines of a search or a mail; empty where nothing was found."""
        arguments = {{"find_contact": "name", "read_mail": "id"}.get(tool, "text"): argument}
        key = _key(tool, arguments)
        if key in self._shown:
            return self._shown[key]
        raise self._pending or self._try(tool, arguments, why)

    def act(self, tool: str, why: str, **arguments: str) -> str:
        """Do something, once. Empty where it is done or about to be, else what there is against it."""
        if "id" in arguments:
            arguments["id"] = self._ledger.now(arguments["id"])
        if "when" in arguments and self._ledger.freed(arguments["when"]):
            return f"{arguments['when']} is taken"
        if self._done(tool, arguments):
            return ""
        key = _key(tool, arguments)
        if key in self._refused:
            return self._refused[key]
        if tool == "move_event" and arguments["id"] in self._ledger.gone:
            self._wanted.add(arguments["id"])
            title, _ = self._ledger.gone[arguments["id"]]
            return self.act("create_event", why, title=title, when=arguments["when"])
        if self._pending is None:
            self._pending = self._try(tool, arguments, why)
        self._wanted.update(plain(value) for name, value in arguments.items() if name in ("id", "name"))
        return ""

    def _try(self, tool: str, arguments: dict[str, str], why: str) -> Next:
        tries = self._failed[_key(tool, arguments)]
        if tries >= _TRIES:
            raise End(f"CANNOT: {tool} fails.")
        return Next(tool, arguments, "Busy, try again." if tries else why)

    def _done(self, tool: str, arguments: dict[str, str]) -> bool:
        """Whether it was done; what did it is then wanted. Arguments stand in the order of the tool's parameters."""
        ledger, wanted = self._ledger, [plain(value) for value in arguments.values()]
        match tool:
            case "create_event":
                there = [id_ for id_, (title, when) in ledger.made.items() if [plain(title), plain(when)] == wanted]
            case "move_event":
                there = [id_ for id_, (_, _, when) in ledger.moved.items() if [id_, plain(when)] == wanted]
            case "cancel_event":
                there = [id_ for id_ in ledger.gone if [id_] == wanted]
            case "add_task":
                there = [id_ for id_, title in ledger.added.items() if [plain(title)] == wanted]
            case "complete_task":
                there = [id_ for id_ in ledger.finished if [id_] == wanted]
            case "save_contact":
                there = [key for key, (_, _, email) in ledger.saved.items() if [key, plain(email)] == wanted]
            case _:
                mail = (wanted[0], wanted[1])
                if mail not in self._unsent:
                    return False
                self._unsent.remove(mail)
                return True
        there = [id_ for id_ in there if id_ not in self._wanted][:1]
        self._wanted.update(there)
        return bool(there)

    def next(self, refused: bool) -> Next | None:
        """What is to be done at the plan's end: undo what was not wanted, then what is still to do, or nothing.

        Args:
            refused: nothing at all was wanted.
        """
        if refused:
            self._wanted.clear()
            self._pending = None
        return next(self._undo(), self._pending)

    def _undo(self) -> Iterator[Next]:
        """The call that takes back each change that was not wanted, where a tool can."""
        ledger = self._ledger
        back: list[tuple[str, str, dict[str, str]]] = []
        back += [(id_, "cancel_event", {"id": id_}) for id_ in ledger.made]
        back += [(id_, "move_event", {"id": id_, "when": first}) for id_, (_, first, _) in ledger.moved.items()]
        back += [(id_, "create_event", {"title": title, "when": first}) for id_, (title, first) in ledger.gone.items()]
        back += [(id_, "complete_task", {"id": id_}) for id_ in ledger.added]
        back += [(id_, "add_task", {"title": title}) for id_, title in ledger.finished.items()]
        back += [(k, "save_contact", {"name": n, "email": old}) for k, (n, old, _) in ledger.saved.items() if old]
        for key, tool, arguments in back:
            # An hour that is taken by another change is free once that is undone.
            blocked = ledger.occupies(arguments.get("when", ""))
            if key not in self._wanted and not blocked and self._failed[_key(tool, arguments)] < _TRIES:
                yield Next(tool, arguments, "That was wrong, undo it.")

"""Calls of one episode, each of which repeats the turns before it, as one conversation.

An agent sends its whole history with every call, so that a log of an episode of n turns holds the first turn n times.
Two calls are turns of one conversation where the later one's messages begin with the earlier one's messages and its
answer, all of them equal, under the same tools, model and episode: then training on the whole, at both answers, is
training on each call. Where they differ anywhere, each stays a conversation of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from attar.data.types import Conversation, Message

__all__ = ["Merger", "learn_last"]

# Text of conversations that wait for a further turn. The oldest is written as it is; what comes later stands apart.
OPEN_BYTES = 128 * 2**20
# Of an answer that nobody should learn, wherever in the conversation it stands.
_CUT = ("length", "content_filter")


def learn_last(conversation: Conversation) -> Conversation:
    """The conversation of one call: its answer is learned, the answers in what was sent are only read."""
    *sent, answer = conversation.messages
    return replace(conversation, messages=(*map(_read_only, sent), answer))


def _read_only(message: Message) -> Message:
    return replace(message, train=False) if message.role == "assistant" else message


@dataclass
class _Open:
    """A conversation that a later call may go on with."""

    first: Conversation
    messages: list[Message]
    metas: dict[int, dict[str, Any]]
    """what is known of each answer that the log shows, by its place among the messages"""
    prefixes: list[bytes]
    size: int


class Merger:
    """Joins calls, in whatever order they come, within a bound of memory.

    ``counts`` says how many calls became a further turn (``merged``), stood twice (``repeated``), or could not be
    joined because the later call left the earlier answer's reasoning out (``reasoning dropped``); and how many answers
    stand in what was sent but not as a call in the log (``unlogged answer``): they are read, not learned.
    """

    def __init__(self, open_bytes: int = OPEN_BYTES) -> None:
        self._open_bytes = open_bytes
        self._size = 0
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._next = 0
        # Hash of a prefix that ends in an assistant's message -> the conversation and the message's place.
        self._places: dict[bytes, tuple[int, int]] = {}
        # The same of whole conversations, without the reasoning of the last answer.
        self._bare: dict[bytes, int] = {}
        self.counts: Counter[str] = Counter()

    def add(self, call: Conversation, meta: dict[str, Any]) -> Iterator[tuple[Conversation, dict[str, Any]]]:
        """Take in a call, its answer last; yields the conversations that leave the memory for it."""
        hashes, sizes = _prefix_hashes(call, meta.get("model"))
        last = len(call.messages) - 1
        if hashes[last] in self._places:
            number, place = self._places[hashes[last]]
            known = self._open[number]
            self.counts["repeated" if place in known.metas else "merged"] += 1
            known.metas.setdefault(place, meta)
            return
        for place in sorted((p for p in hashes if p < last), reverse=True):
            number, at = self._places.get(hashes[place], (-1, -1))
            if at == place and len(self._open[number].messages) == place + 1:
                self._extend(number, call, meta, hashes, sizes)
                self.counts["merged"] += 1
                break
            self.counts["reasoning dropped"] += hashes[place] in self._bare
        else:
            number = self._next
            self._next += 1
            self._open[number] = _Open(call, [], {}, [], 0)
            self._extend(number, call, meta, hashes, sizes)
        while self._size > self._open_bytes and len(self._open) > 1:
            yield self._close(next(iter(self._open)))

    def rest(self) -> Iterator[tuple[Conversation, dict[str, Any]]]:
        """What is still in memory, the longest untouched first."""
        while self._open:
            yield self._close(next(iter(self._open)))

    def _extend(
        self, number: int, call: Conversation, meta: dict[str, Any], hashes: dict[int, bytes], sizes: list[int]
    ) -> None:
        known = self._open[number]
        grown = sum(sizes[len(known.messages) :])
        known.size += grown
        self._size += grown
        known.messages = list(call.messages)
        known.metas[len(call.messages) - 1] = meta
        for place, value in hashes.items():
            if self._places.setdefault(value, (number, place)) == (number, place):
                known.prefixes.append(value)
        *sent, answer = call.messages
        if answer.reasoning is not None:
            bare, _ = _prefix_hashes(
                replace(call, messages=(*sent, replace(answer, reasoning=None))), meta.get("model")
            )
            self._bare[bare[len(sent)]] = number
            known.prefixes.append(bare[len(sent)])
        self._open.move_to_end(number)

    def _close(self, number: int) -> tuple[Conversation, dict[str, Any]]:
        known = self._open.pop(number)
        self._size -= known.size
        for value in known.prefixes:
            if self._places.get(value, (-1, -1))[0] == number:
                del self._places[value]
            if self._bare.get(value) == number:
                del self._bare[value]
        messages = []
        for place, message in enumerate(known.messages):
            logged = place in known.metas
            self.counts["unlogged answer"] += message.role == "assistant" and not logged
            messages.append(message if logged else _read_only(message))
        metas = [known.metas[place] for place in sorted(known.metas)]
        return replace(known.first, messages=tuple(messages)), _joined(metas)


def _prefix_hashes(call: Conversation, model: Any) -> tuple[dict[int, bytes], list[int]]:
    """Hashes of the prefixes that end in an assistant's message, by its place, and each message's size in bytes."""
    running = hashlib.sha256(json.dumps([call.group, model, call.tools], ensure_ascii=False).encode())
    hashes, sizes = {}, []
    for place, message in enumerate(call.messages):
        text = json.dumps(message.wire, ensure_ascii=False).encode()
        # A newline stands in no JSON: it ends the message.
        running.update(text + b"\n")
        sizes.append(len(text))
        if message.role == "assistant":
            hashes[place] = running.digest()
    return hashes, sizes


def _joined(metas: list[dict[str, Any]]) -> dict[str, Any]:
    """What is known of a conversation from its calls: counts are added, and the last call tells how it ended, unless
    an answer before it was cut.
    """
    joined: dict[str, Any] = {}
    for meta in metas:
        joined |= {key: value for key, value in meta.items() if value is not None}
    cut = [meta["finish_reason"] for meta in metas if meta.get("finish_reason") in _CUT]
    times = [meta["timestamp"] for meta in metas if meta.get("timestamp") is not None]
    usages = [meta["usage"] for meta in metas if meta.get("usage")]
    if cut:
        joined["finish_reason"] = cut[0]
    if times:
        joined["timestamp"] = times[0]
    if usages:
        joined["usage"] = {key: sum(u.get(key, 0) for u in usages) for key in sorted({k for u in usages for k in u})}
    return joined | {"calls": len(metas)}

"""What a local model writes, as a message: its reasoning, its text and its calls of tools, each apart.

One incremental reader serves both: a whole text is a stream of one piece.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from attar.data.conversations import BadRow, parse_conversation
from attar.data.types import Message
from attar.engines.calls.forms import Form
from attar.engines.calls.scan import CallObject, load_object
from attar.engines.calls.xml import read_xml

__all__ = ["THINK", "THOUGHT", "Delta", "Reader", "read_message"]

THINK, THOUGHT = "<think>", "</think>"


@dataclass(frozen=True)
class Delta:
    """What is new in a message."""

    kind: Literal["reasoning", "text", "name", "arguments"]
    text: str
    """a piece of it; a name comes whole, and the pieces of arguments are JSON when all are there"""
    call: int | None = None
    """the number of the call, counted from 0; None where it is none"""


@dataclass
class _Call:
    """A call, as far as it is read."""

    name: str | None = None
    id: str | None = None
    arguments: str = ""
    closed: bool = False


@dataclass
class _Field:
    """Text without white space at its ends, in pieces."""

    begun: bool = False
    space: str = ""

    def add(self, text: str) -> str:
        """What can be handed on."""
        text = self.space + text
        if not self.begun:
            text = text.lstrip()
        kept = text.rstrip()
        self.space = text[len(kept) :] if kept or self.begun else ""
        self.begun = self.begun or bool(kept)
        return kept


@dataclass
class _Read:
    reasoning: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)


class Reader:
    """Reads a model's text as it comes.

    Reasoning stands between ``<think>`` and ``</think>`` at the beginning, without white space at its ends. Calls are
    read where a form is given, and white space beside them is dropped. The deltas of all pieces, joined by kind and
    call, are the same wherever the text is cut.

    Args:
        form: how the model's template writes calls; None where no tools are on offer: then all is text.
        tools: on offer, as OpenAI schemas; a form that writes no JSON needs their types.
        thinking: whether the prompt has opened the reasoning.
    """

    def __init__(self, form: Form | None, *, tools: Sequence[Mapping[str, Any]] = (), thinking: bool = False) -> None:
        self._form, self._tools, self._thinking = form, tools, thinking
        self._held = ""
        self._closing = False
        self._read = _Read()
        self._reasoning = _Field()
        self._object: CallObject | None = None
        self._steps = self._whole()
        next(self._steps)

    def feed(self, piece: str) -> list[Delta]:
        """Read on.

        Raises:
            BadRow: ``bad tool call``: what was read so far can become no call that is well formed.
        """
        self._held += piece
        return list(self._drain())

    def close(self, *, cut: bool = False) -> list[Delta]:
        """The text has ended.

        Args:
            cut: it was cut off, so that a call may be incomplete; it is then left out of the message.

        Raises:
            BadRow: ``bad tool call``: one is not complete, and nothing was cut off.
        """
        self._closing = True
        deltas = list(self._drain())
        if self.unfinished and not cut:
            self._bad(f"the call that begins {self._shown()} is not closed")
        return deltas

    @property
    def unfinished(self) -> bool:
        """Whether a call was begun and is not complete."""
        return bool(self._read.calls) and not self._read.calls[-1].closed

    @property
    def message(self) -> Message:
        """The message so far; a call that is not complete is left out.

        Raises:
            BadRow: a text cannot be written: it holds half a surrogate pair.
        """
        calls = [
            {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
            for call in self._read.calls
            if call.closed
        ]
        row = {
            "role": "assistant",
            "content": "".join(self._read.text),
            "tool_calls": calls or None,
            "reasoning": "".join(self._read.reasoning) or None,
        }
        [message] = parse_conversation({"messages": [row]}).messages
        return message

    def _drain(self) -> Iterator[Delta]:
        """Let the steps work until they wait for more text."""
        while (delta := next(self._steps, None)) is not None:
            yield delta

    # The steps are one generator: it yields deltas, and None where it needs more text. ``_held`` is what no step has
    # used yet; a step that waits must be resumed with more of it, or with ``_closing`` set.

    def _whole(self) -> Iterator[Delta | None]:
        yield None
        yield from self._thoughts()
        if self._form is None:
            while True:
                yield from self._text(len(self._held))
                if self._closing:
                    return
                yield None
        yield from self._text_and_calls(self._form)

    def _thoughts(self) -> Iterator[Delta | None]:
        while not self._closing and THINK.startswith(self._held.lstrip()[: len(THINK)]) and THINK not in self._held:
            yield None
        if self._held.lstrip().startswith(THINK):
            self._held = self._held.lstrip().removeprefix(THINK)
        elif not self._thinking:
            return
        while THOUGHT not in self._held and not self._closing:
            yield from self._thought(len(self._held) - _overlap(self._held, THOUGHT))
            yield None
        yield from self._thought(self._held.index(THOUGHT) if THOUGHT in self._held else len(self._held))
        self._held = self._held.removeprefix(THOUGHT).lstrip("\n")
        while not self._held and not self._closing:
            yield None
            self._held = self._held.lstrip("\n")

    def _thought(self, end: int) -> Iterator[Delta]:
        piece = self._reasoning.add(self._held[:end])
        self._held = self._held[end:]
        if piece:
            self._read.reasoning.append(piece)
            yield Delta("reasoning", piece)

    def _text(self, end: int) -> Iterator[Delta]:
        piece, self._held = self._held[:end], self._held[end:]
        if piece:
            self._read.text.append(piece)
            yield Delta("text", piece)

    def _text_and_calls(self, form: Form) -> Iterator[Delta | None]:
        if not form.opener:
            # Nothing but its first character tells such a call from text, and only at the beginning.
            while not self._held.strip() and not self._closing:
                yield None
            if self._held.lstrip().startswith(form.first):
                yield from self._calls(form, None)
        while True:
            found = [(self._held.index(opener), opener) for opener in form.openers if opener in self._held]
            if found:
                start, opener = min(found)
                yield from self._text(len(self._held[:start].rstrip()))
                self._held = self._held.lstrip()
                yield from self._calls(form, opener)
            elif self._closing:
                yield from self._text(len(self._held))
                return
            else:
                overlap = max((_overlap(self._held, opener) for opener in form.openers), default=0)
                yield from self._text(len(self._held[: len(self._held) - overlap].rstrip()))
                yield None

    def _calls(self, form: Form, opener: str | None) -> Iterator[Delta | None]:
        """Calls, one after another, and the white space behind them."""
        while True:
            self._held = self._held.removeprefix(opener or "")
            if form.kind == "array":
                yield from self._array(form)
            else:
                yield from self._one(form)
                yield from self._closer(form)
            yield from self._space()
            if form.opener:
                while len(self._held) < len(form.opener) and form.opener.startswith(self._held) and not self._closing:
                    yield None
                if not self._held.startswith(form.opener):
                    return
            elif not self._held:
                return
            else:
                # Bare calls: semicolons between them, and nothing else behind them.
                self._held = self._held.removeprefix(";")
                yield from self._space()
                if not self._held.startswith(form.first):
                    self._bad(f"text stands behind a call: {self._held[:100]!r}")

    def _array(self, form: Form) -> Iterator[Delta | None]:
        self._read.calls.append(_Call())
        yield from self._expect("[")
        while True:
            yield from self._one(form, begun=True)
            self._read.calls[-1].closed = False  # until the list is
            yield from self._space(wait=True)
            if not self._held.startswith(","):
                break
            self._held = self._held[1:]
            self._read.calls[-1].closed = True
            self._read.calls.append(_Call())
        yield from self._expect("]")
        yield from self._closer(form)

    def _one(self, form: Form, *, begun: bool = False) -> Iterator[Delta | None]:
        """One call, without what closes it."""
        if not begun:
            self._read.calls.append(_Call())
        call, number = self._read.calls[-1], len(self._read.calls) - 1
        if form.kind == "xml":
            yield from self._until("</function>")
            end = self._held.index("</function>") + len("</function>")
            call.name, call.arguments = read_xml(self._held[:end], self._tools)
            self._held = self._held[end:]
            yield Delta("name", call.name, number)
            yield Delta("arguments", call.arguments, number)
            call.closed = True
            return
        if form.kind == "named":
            yield from self._until(form.middle)
            name, self._held = self._held.split(form.middle, 1)
            if form.id_mark and form.id_mark in name:
                name, _, identity = name.partition(form.id_mark)
                call.id = identity.strip()
            call.name = name.strip()
            if not call.name:
                self._bad(f"a call has no name before {form.middle!r}")
            yield Delta("name", call.name, number)
        yield from self._expect("{", consume=False)
        self._object = scan = CallObject(None if form.kind == "named" else form.name_key, form.arguments_key)
        while True:
            self._held = self._held[scan.feed(self._held) :]
            if call.name is None and scan.name is not None:
                call.name = scan.name
                yield Delta("name", call.name, number)
            if call.name is not None and (piece := scan.fragment()):
                call.arguments += piece
                yield Delta("arguments", piece, number)
            if scan.done or self._closing:
                break
            yield None
        if not scan.done:
            return
        content = load_object(scan.raw, "the call")
        if form.kind != "named":
            yield from self._check(form, call, number, content)
        call.closed = True

    def _check(self, form: Form, call: _Call, number: int, content: dict[str, Any]) -> Iterator[Delta]:
        """Whether an object is a call; its arguments, where they could not be handed on before."""
        known = {form.name_key, form.arguments_key, *form.more_keys, "type", "id"}
        arguments = content.get(form.arguments_key)
        if isinstance(arguments, str):
            load_object(arguments, "the arguments")
            call.arguments = arguments
            yield Delta("arguments", arguments, number)
        if not isinstance(call.name, str) or not call.arguments or (strange := content.keys() - known):
            wanted = f"a name under {form.name_key!r} and an object of arguments under {form.arguments_key!r}"
            more = f", and no {', '.join(sorted(strange))}" if call.name and call.arguments else ""
            self._bad(f"{json.dumps(content, ensure_ascii=False)[:200]} is no call: it takes {wanted}{more}")
        if content.get("id") is not None:
            call.id = str(content["id"])

    def _closer(self, form: Form) -> Iterator[Delta | None]:
        """What closes a call."""
        call = self._read.calls[-1]
        if not form.closer:
            call.closed = call.closed or form.kind == "array"
            return
        call.closed = False
        yield from self._expect(form.closer)
        call.closed = True

    def _expect(self, text: str, *, consume: bool = True) -> Iterator[Delta | None]:
        """White space and then this text, or the end of what there is."""
        yield from self._space(wait=True)
        while len(self._held) < len(text) and text.startswith(self._held) and not self._closing:
            yield None
        if self._held.startswith(text):
            self._held = self._held[len(text) :] if consume else self._held
        elif not (self._closing and text.startswith(self._held)):
            self._bad(f"{text!r} is wanted where {self._held[:100]!r} stands, in the call that begins {self._shown()}")
        else:
            yield from self._end()

    def _until(self, text: str) -> Iterator[Delta | None]:
        """Wait for this text."""
        while text not in self._held:
            if self._closing:
                yield from self._end()
            yield None

    def _space(self, *, wait: bool = False) -> Iterator[Delta | None]:
        """Drop white space; wait for something behind it."""
        self._held = self._held.lstrip()
        while not self._held and not self._closing:
            yield None
            self._held = self._held.lstrip()
        if wait and not self._held:
            yield from self._end()

    def _end(self) -> Iterator[Delta | None]:
        """The text ended inside a call: nothing more comes."""
        while True:
            yield None

    def _shown(self) -> str:
        call = self._read.calls[-1] if self._read.calls else _Call()
        raw = self._object.raw if self._object is not None else self._held
        return repr((raw or call.name or self._held)[:200])

    def _bad(self, detail: str) -> None:
        raise BadRow("bad tool call", detail)


def read_message(
    text: str,
    form: Form | None,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    thinking: bool = False,
    cut: bool = False,
) -> Message:
    """The message that a model's whole text is; see :class:`Reader`.

    Args:
        text: what the model wrote.
        form: how calls are written; None where no tools are on offer.
        tools: on offer.
        thinking: whether the prompt has opened the reasoning.
        cut: whether the text was cut off; a call that this left incomplete is left out.

    Raises:
        BadRow: ``bad tool call``: one is not complete, or not well formed.
    """
    reader = Reader(form, tools=tools, thinking=thinking)
    reader.feed(text)
    reader.close(cut=cut)
    return reader.message


def _overlap(text: str, marker: str) -> int:
    """How many characters at the end of the text begin the marker."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)

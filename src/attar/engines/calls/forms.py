"""How a model's template writes calls of tools: found by having it render one, never by the model's name."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from attar.data.types import Conversation, Message, ToolCall
from attar.errors import CapabilityError, DataError
from attar.tokens import knows_tools
from attar.tokens.controls import coder
from attar.tokens.turns import Turns

__all__ = ["Form", "form_of"]

# Names that stand in no template; the id is what Mistral's wants, nine letters and digits.
_NAMES = ("probe_weather", "probe_clock")
_KEY, _VALUE = "probe_place", "Oslo"
_IDS = ("a1b2c3d4e", "f5g6h7j8k")
_PYTHON = "<|python_tag|>"
_LAYOUTS = ((", ", ": "), (",", ":"))


@dataclass(frozen=True)
class Form:
    """How calls stand in a model's text.

    ``object``: opener, a JSON object with name and arguments, closer. ``array``: opener, a list of such objects,
    closer. ``named``: opener, the name, ``middle``, the arguments as JSON, closer. ``xml``: opener,
    ``<function=NAME>`` with its parameters between tags, closer.
    """

    kind: Literal["object", "array", "named", "xml"]
    opener: str
    """without white space at its ends; empty where a call is the JSON itself, at the beginning of the answer"""
    closer: str
    """the same; empty where nothing closes a call"""
    opened: str = ""
    """white space behind the opener, as the template writes it"""
    closing: str = ""
    """white space before the closer"""
    between: str | None = None
    """what stands between two calls; None where the template writes one at most"""
    name_key: str = "name"
    arguments_key: str = "arguments"
    more_keys: tuple[str, ...] = ()
    """of what else the template writes into a call"""
    middle: str = ""
    """between name and arguments"""
    id_mark: str = ""
    """before the call's id, which stands between name and middle"""
    layout: tuple[str, str] | None = _LAYOUTS[0]
    """what JSON has between items and behind keys; None where the template breaks lines"""
    alternative: str = ""
    """a second opener that the model may write"""
    example: str = ""
    """a call, as the template writes it"""

    @property
    def first(self) -> str:
        """The first character of what stands behind the opener."""
        return "[" if self.kind == "array" else "{"

    @property
    def openers(self) -> tuple[str, ...]:
        """What opens a call wherever it stands."""
        return tuple(opener for opener in (self.opener, self.alternative) if opener)

    @property
    def marks(self) -> tuple[str, ...]:
        """What must be left in a model's text when control tokens are taken out of it."""
        return tuple(mark for mark in (self.opener, self.closer, self.middle, self.id_mark, self.alternative) if mark)


def form_of(tokenizer: Any) -> Form:
    """How the tokenizer's template writes calls.

    Raises:
        CapabilityError: the template writes them in a form that is not known here, or shows no tools.
        ModelError: the tokenizer has no chat template, or is not a fast one.
    """
    if not knows_tools(tokenizer):
        raise CapabilityError(
            "the chat template does not show the model its tools, so it can neither be asked for calls nor read; give "
            "the tokenizer one that does: attar.tokens.with_tools(tokenizer)"
        )
    answer = _rendered(tokenizer, 1)
    if isinstance(answer, DataError):
        raise CapabilityError(f"the chat template writes no call that can be told from the rest: {answer}") from answer
    form = _named_xml(answer) or _json(answer)
    special = coder(tokenizer, template := tokenizer.get_chat_template(None, list(_tools()))).special
    if form is None or any(token in mark and token != mark for token in special for mark in form.marks):
        raise CapabilityError(
            f"the chat template writes a call as {answer!r}, a form that is not known here (known are JSON objects "
            "and lists of them, a name with JSON arguments, and <function=NAME>); use another template, or serve the "
            "model (vLLM, llama.cpp) and name it as openai:NAME with its base_url"
        )
    form = replace(form, example=answer, between=_between(tokenizer, form))
    return replace(form, alternative=_PYTHON) if not form.opener and _PYTHON in template else form


def _tools() -> tuple[dict[str, Any], ...]:
    parameters = {"type": "object", "properties": {_KEY: {"type": "string"}}, "required": [_KEY]}
    return tuple(
        {"type": "function", "function": {"name": name, "description": "Probe.", "parameters": parameters}}
        for name in _NAMES
    )


def _rendered(tokenizer: Any, calls: int) -> str | DataError:
    """What the assistant writes for calls, its end taken off; or why it is not to be had."""
    made = tuple(
        ToolCall(identity, name, {_KEY: _VALUE}) for identity, name in zip(_IDS[:calls], _NAMES[:calls], strict=True)
    )
    asked = Message("user", "What is the weather?")
    conversation = Conversation((asked, Message("assistant", "", made)), _tools())
    turns = Turns(tokenizer, conversation, {})
    try:
        turn = turns.turn(1)
    except DataError as error:
        return error
    text = turn.text[turn.start : turn.end]
    end = max(start for start, stop in turns.coder.occurrences(text) if stop == len(text))
    # What a template opens and closes for a reasoning that is not there.
    return text[:end].rpartition("</think>")[2].strip()


def _json(answer: str) -> Form | None:
    """The form of an answer that holds a call, or its arguments, as JSON."""
    for start in (match.start() for match in re.finditer(r"[\[{]", answer)):
        try:
            value, end = json.JSONDecoder().raw_decode(answer, start)
        except ValueError:
            continue
        before, after = answer[:start], answer[end:]
        common: dict[str, Any] = {
            "closer": after.strip(),
            "closing": after[: len(after) - len(after.lstrip())],
            "layout": next((s for s in _LAYOUTS if answer[start:end] == _dumped(value, s)), None),
        }
        if value == {_KEY: _VALUE}:
            return _named(before, common)
        items = value if isinstance(value, list) else [value]
        if len(items) != 1 or not isinstance(items[0], dict):
            continue
        keys = {json.dumps(item): key for key, item in items[0].items()}
        name, arguments = keys.get(json.dumps(_NAMES[0])), keys.get(json.dumps({_KEY: _VALUE}))
        if name is None or arguments is None:
            continue
        if list(items[0]).index(name) > list(items[0]).index(arguments):
            common["layout"] = None  # the grammar writes names first
        more = tuple(key for key in items[0] if key not in (name, arguments))
        return Form(
            kind="array" if isinstance(value, list) else "object",
            opener=before.strip(),
            opened=before[len(before.rstrip()) :],
            name_key=name,
            arguments_key=arguments,
            more_keys=more,
            **common,
        )
    return None


def _dumped(value: Any, layout: tuple[str, str]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=layout)


def _named(before: str, common: dict[str, Any]) -> Form | None:
    """Name and arguments apart: the name stands somewhere before the arguments' JSON."""
    opener, found, middle = before.partition(_NAMES[0])
    mark, identified, rest = middle.partition(_IDS[0])
    if not found or not middle or '"' in middle or "{" in middle:
        return None
    id_mark, middle = (mark, rest) if identified else ("", middle)
    if not opener.strip() or not middle:
        return None
    return Form(
        kind="named",
        opener=opener.strip(),
        opened=opener[len(opener.rstrip()) :],
        middle=middle,
        id_mark=id_mark,
        **common,
    )


def _named_xml(answer: str) -> Form | None:
    body = rf"<function={_NAMES[0]}>\s*<parameter={_KEY}>\n{_VALUE}\n</parameter>\s*</function>"
    found = re.search(body, answer)
    if found is None:
        return None
    before, after = answer[: found.start()], answer[found.end() :]
    if not before.strip() or not after.strip():
        return None
    return Form(
        kind="xml",
        opener=before.strip(),
        opened=before[len(before.rstrip()) :],
        closer=after.strip(),
        closing=after[: len(after) - len(after.lstrip())],
    )


def _between(tokenizer: Any, form: Form) -> str | None:
    """What stands between two calls; None where the template writes only one."""
    answer = _rendered(tokenizer, 2)
    if isinstance(answer, DataError) or not all(name in answer for name in _NAMES):
        return None
    if form.kind == "array":
        return ", "
    head = answer[: answer.index(_NAMES[1])]
    before = head[: head.rindex(form.opener or form.first)]
    if _NAMES[0] not in before:
        return None  # one opener for both: no form that is known here
    return before[len(before.rstrip(" \n\t;")) :]

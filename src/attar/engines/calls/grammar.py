"""What a model may write, as a grammar: an answer that fits a schema, calls that must be made, calls that may be.

The grammars are in the Lark dialect of llguidance, which holds schemas inside (``%json``).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from attar.data.schemas import check_tools
from attar.engines.calls.forms import Form
from attar.engines.calls.reader import THINK, THOUGHT
from attar.engines.calls.schemas import LAYOUT, check_schema, close_objects
from attar.errors import CapabilityError, DataError

__all__ = ["Thinking", "grammar_of"]

Thinking = Literal["opened", "allowed", "never"]
"""whether the prompt has opened a reasoning, or the answer may begin with one"""

# A regex terminal over all text; a control token of the tokenizer is never part of it.
_ANY = "(?s:.*)"
# What a parameter may say in angle brackets beside what is checked in JSON.
_PLAIN = {"type", "description", "title", "default", "examples"}
_ROOT = _PLAIN | {"properties", "required", "additionalProperties", "$schema", "$defs", "definitions", "$id"}
_BOOLEANS = '("True" | "False" | "true" | "false")'


def grammar_of(
    *,
    form: Form | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    choice: str | None = None,
    schema: Any = None,
    thinking: Thinking = "never",
    apart: Mapping[str, int] | None = None,
    words: Collection[str] = (),
) -> str:
    """The grammar of an answer.

    Args:
        form: of calls; needed with tools.
        tools: on offer, as OpenAI schemas.
        choice: None and ``auto``: text or calls; ``required``: one call or more; else the name of the tool that is
            called, once.
        schema: that the text must fit, where the answer is no call.
        thinking: what may come before. Text that is free may always begin with a reasoning.
        apart: the tokens that stand in no text of the grammar unless they are named: what each spells -> its id.
        words: those of them that the model may write as text.

    Raises:
        DataError: a tool or a schema cannot be held to.
        CapabilityError: the form cannot be held to.
        MissingExtra: the grammar library is not installed.
    """
    marks = (THINK, THOUGHT, *(form.marks if form is not None else ()))
    rules = _Rules(apart or {}, {word for word in words if word not in marks})
    free = "text" if tools and choice in (None, "auto") and schema is None else None
    body = None
    if schema is not None and choice in (None, "auto", "none"):
        check_schema(schema, "schema")
        body = rules.json(close_objects(schema), LAYOUT)
    if tools:
        check_tools(tools, "the request")
        assert form is not None
        calls = rules.calls(form, tools, choice)
        if free:
            body = rules.text_or(calls, form)
        elif body is None:
            body = calls
        elif form.opener:
            body = f"{body} | {calls}"
        else:
            raise CapabilityError(
                "the chat template writes calls as bare JSON, which cannot be told from an answer that fits a schema; "
                "ask with tools or with a schema"
            )
    rules.lines.insert(0, f"start: {rules.thought('allowed' if free and thinking == 'never' else thinking)} body")
    rules.lines.insert(1, f"body: {body}")
    return "\n".join(["%llguidance {}", *rules.lines, ""])


class _Rules:
    """The rules of a grammar, as they are needed."""

    def __init__(self, apart: Mapping[str, int], words: Collection[str]) -> None:
        self._apart = apart
        numbers = ",".join(str(apart[word]) for word in sorted(words))
        self._words = f"<[{numbers}]>" if words else None
        self.lines: list[str] = []

    def sequence(self, *texts: str) -> str:
        """Texts, one after another: those that spell control tokens as these, all others joined."""
        parts: list[str] = []
        plain = ""
        for text in texts:
            number = self._apart.get(text)
            if number is None:
                plain += text
                continue
            parts += [*([json.dumps(plain)] if plain else []), f"<[{number}]>"]
            plain = ""
        return " ".join([*parts, *([json.dumps(plain)] if plain else [])])

    def rule(self, body: str, kind: str = "r", options: str = "") -> str:
        """The name of a new rule; of a terminal, where ``kind`` is in capitals."""
        name = f"{kind}{len(self.lines)}"
        self.lines.append(f"{name}{options}: {body}")
        return name

    def json(self, schema: Any, layout: tuple[str, str]) -> str:
        """A value that fits a schema, in one line."""
        options = {
            "item_separator": layout[0],
            "key_separator": layout[1],
            "whitespace_flexible": False,
            # An escaped half of a surrogate pair could be written, and read by nobody; characters stand as they are.
            "json_allowed_escapes": 'nrbtf\\"',
        }
        inner = {"allOf": [schema]} if not isinstance(schema, dict) else schema
        return self.rule(f"%json {json.dumps({'x-guidance': options, **inner})}")

    def identity(self) -> str:
        """A call's id, as Mistral's are: nine letters and digits."""
        return self.rule("/[a-zA-Z0-9]{9}/", "T")

    def thought(self, thinking: Thinking) -> str:
        """What may come before the answer."""
        if thinking == "never":
            return ""
        inside = self.rule(f"/{_ANY}/ & ~/{_holding(THOUGHT)}/", "T")
        if THOUGHT in self._apart:
            end = f"{inside} {self._more(inside)} {self.sequence(THOUGHT)}"
        else:
            end = f"{self._before(inside)} {self.rule(f'/{_ANY}{_escaped(THOUGHT)}/', options='[lazy]')}"
        end += " " + self.rule(r"/\n{0,2}/", "T")
        if thinking == "opened":
            return end
        begun = self.rule(r"/[ \n]*/", "T")
        return f"({begun} {self.sequence(THINK)} {end})?"

    def text_or(self, calls: str, form: Form) -> str:
        """Free text with calls behind it, if there are any."""
        # What the reader takes for a reasoning or for an opener is no free text, even where it is spelled in letters.
        barred = " & ".join(f"~/{pattern}/" for pattern in [_beginning(THINK), *map(_holding, form.openers)])
        plain = self.rule(f"/{_ANY}/ & {barred}", "T")
        if not form.opener:
            # Bare JSON is a call at the beginning only.
            text = self.rule(rf"/\s*([^\s{_escaped(form.first)}]{_ANY})?/ & {barred}", "T")
            text = f"{text} {self._more(plain)}"
            opened = f" | {text} {self.sequence(form.alternative)} {calls}" if form.alternative in self._apart else ""
            return f"{calls} | {text}{opened}"
        text = f"{plain} {self._more(plain)}"
        if form.opener in self._apart:
            return f"{text} | {text} {calls}"
        # The opener ends the text the first time that it stands in it; the calls go on behind it.
        begun = self.rule(f"/{_ANY}/ & ~/{_beginning(THINK)}/", "T")
        head = self.rule(f"{begun} {json.dumps(form.opener)}", options="[lazy]")
        rest = self.calls(form, self._tools, self._choice, behind_opener=True)
        return f"{text} | {self._before(plain)} {head} {rest}"

    def _more(self, text: str) -> str:
        """Tokens that stand apart but may be written, with text behind each."""
        return "" if self._words is None else f"({self._words} {text})*"

    def _before(self, text: str) -> str:
        """The same, with text before each."""
        return "" if self._words is None else f"({text} {self._words})*"

    def calls(
        self, form: Form, tools: Sequence[Mapping[str, Any]], choice: str | None, *, behind_opener: bool = False
    ) -> str:
        """Calls of the tools, or one of the tool that is named."""
        self._tools, self._choice = tools, choice
        named = choice not in (None, "auto", "none", "required")
        offered = [tool["function"] for tool in tools if not named or tool["function"]["name"] == choice]
        if not offered:
            names = ", ".join(tool["function"]["name"] for tool in tools)
            raise DataError(f"tool_choice names {choice!r}, and on offer are {names}; name one of them")
        if form.layout is None:
            raise CapabilityError(
                f"the chat template writes a call as {form.example!r}: its JSON is broken into lines or puts the name "
                "last, which is not held to here; take a template that writes it in one line, its name first"
            )
        one = self.rule(" | ".join(self._call(form, function) for function in offered))
        many = form.between is not None and not named
        opener = () if behind_opener else (form.opener, form.opened)
        if form.kind == "array":
            more = f"({json.dumps(form.layout[0])} {one})*" if many else ""
            opening = self.sequence(*opener, *((form.opened,) if behind_opener else ()), "[")
            return f"{opening} {one} {more} {self.sequence(']', form.closing, form.closer)}"
        whole = self.rule(f"{self.sequence(form.opener, form.opened)} {one}") if form.opener else one
        more = f"({self.sequence(form.between or '')} {whole})*" if many else ""
        first = f"{self.sequence(form.opened)} {one}" if behind_opener else whole
        return self.rule(f"{first} {more}")

    def _call(self, form: Form, function: Mapping[str, Any]) -> str:
        """One call of one tool, behind its opener; with its closer, where calls have one each."""
        name, where = function["name"], f"the schema of tool {function['name']!r}"
        assert form.layout is not None
        parameters = close_objects({"type": "object", **function["parameters"]})
        check_schema(parameters, where)
        if form.kind == "xml":
            return self._xml(form, name, parameters, where)
        arguments = self.json(parameters, form.layout)
        if form.kind == "named":
            identity = f"{self.sequence(form.id_mark)} {self.identity()}" if form.id_mark else ""
            return f"{self.sequence(name)} {identity} {self.sequence(form.middle)} {arguments} " + self.sequence(
                form.closing, form.closer
            )
        item, key = form.layout
        if unknown := set(form.more_keys) - {"id", "type"}:
            raise CapabilityError(
                f"the chat template writes {', '.join(sorted(unknown))} into a call ({form.example!r}), which is not "
                "known here; take a template that writes names, arguments and ids"
            )
        quoted = json.dumps(name, ensure_ascii=False)
        head = f'{{"{form.name_key}"{key}{quoted}{item}"{form.arguments_key}"{key}'
        if "type" in form.more_keys:
            head = f'{{"type"{key}"function"{item}{head[1:]}'
        tail = "}"
        identity = ""
        if "id" in form.more_keys:
            before, behind = json.dumps(f'{item}"id"{key}"'), json.dumps('"')
            identity = f"{before} {self.identity()} {behind}"
        closer = (form.closing, form.closer) if form.kind == "object" else ()
        return f"{self.sequence(head)} {arguments} {identity} {self.sequence(tail, *closer)}"

    def _xml(self, form: Form, name: str, parameters: dict[str, Any], where: str) -> str:
        """A call with its parameters as text between tags."""
        if unknown := parameters.keys() - _ROOT:
            raise DataError(f"{where} cannot be held to where parameters stand between tags: {', '.join(unknown)}")
        required = parameters.get("required", ())
        shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
        body = [self.sequence(f"<function={name}>\n")]
        for key, schema in parameters.get("properties", {}).items():
            opening = json.dumps(f"<parameter={key}>\n")
            if schema.get("type") == "string":
                value = self._plain_text(schema, f"{where}, property {key!r}")
            else:
                inner = _BOOLEANS if schema.get("type") == "boolean" else self.json({**schema, **shared}, LAYOUT)
                value = f'{inner} "\\n</parameter>\\n"'
            body.append(f"{opening} {value}" if key in required else f"({opening} {value})?")
        return " ".join([*body, self.sequence("</function>", form.closing, form.closer)])

    def _plain_text(self, schema: dict[str, Any], where: str) -> str:
        if unknown := schema.keys() - _PLAIN - {"enum"}:
            raise DataError(f"{where} cannot be held to where it stands as plain text: {', '.join(sorted(unknown))}")
        if "enum" in schema:
            return "(" + " | ".join(json.dumps(f"{word}\n</parameter>\n") for word in schema["enum"]) + ")"
        return self.rule(rf"/{_ANY}\n<\/parameter>\n/", options="[lazy]")


def _escaped(text: str) -> str:
    """The text in a regex between slashes."""
    return "".join(f"\\{character}" if character in r"\/[](){}.*+?^$|" else character for character in text)


def _beginning(text: str) -> str:
    return rf"\s*{_escaped(text)}{_ANY}"


def _holding(text: str) -> str:
    return f"{_ANY}{_escaped(text)}{_ANY}"

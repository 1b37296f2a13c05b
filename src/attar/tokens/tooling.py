"""A chat template that knows tools, for models whose own does not.

It is written from the turn markers that the model's template shows, and is compared with that template on plain talk.
Calls are in the form of Hermes and Qwen: JSON within ``<tool_call>``, results within ``<tool_response>``, tools within
``<tools>`` in the system's turn; reasoning stands within ``<think>``, in all turns, so that an episode only ever grows.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jinja2

from attar.errors import ModelError

__all__ = ["ToolReady", "knows_tools", "with_tools"]

_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)
# Texts that no template writes, looks into or trims.
_USER, _ANSWER, _AGAIN, _SYSTEM = "\ue100\ue101", "\ue102\ue103", "\ue104\ue105", "\ue106\ue107"
_TOOL = {
    "type": "function",
    "function": {
        "name": "\ue108",
        "description": "\ue109",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}

_TEMPLATE = """\
{%- set ns = namespace(system=<default>, instructions='', results=false) -%}
{%- if messages and messages[0].role in ['system', 'developer'] -%}
    {%- set ns.system = messages[0].content<trim> -%}
{%- endif -%}
{%- if tools -%}
    {%- set ns.instructions = <before_tools> -%}
    {%- for tool in tools -%}
        {%- set ns.instructions = ns.instructions + '\\n' + (tool | tojson) -%}
    {%- endfor -%}
    {%- set ns.instructions = ns.instructions + <after_tools> -%}
{%- endif -%}
<system_turn>
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {{- '\\n' if ns.results else <user> + ns.instructions -}}
        {%- set ns.results = true -%}
        {{- '<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
            {{- <user_end> -}}
            {%- set ns.results = false -%}
        {%- endif -%}
    {%- elif message.role == 'user' -%}
        {{- <user> + ns.instructions + message.content<trim> + <user_end> -}}
    {%- elif message.role == 'assistant' -%}
        {%- set content = (message.content or '')<trim> -%}
        {{- <assistant> -}}
        {%- set reasoning = (message.reasoning_content or '') | trim -%}
        {{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' if reasoning else '' -}}
        {{- content -}}
        {%- for call in message.tool_calls or [] -%}
            {{- '\\n' if content or not loop.first else '' -}}
            {{- '<tool_call>\\n{"name": ' + call.function.name | tojson + ', "arguments": ' -}}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson -}}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- <assistant_end> -}}
    {%- elif not loop.first -%}
        <later_system>
    {%- endif -%}
    {%- if message.role in ['user', 'tool'] -%}{%- set ns.instructions = '' -%}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- <assistant> -}}{%- endif -%}
"""
# The system's turn where the model has one, and where its text stands at the beginning of the first question.
_OWN_TURN = """\
{%- if ns.system or ns.instructions or (messages and messages[0].role in ['system', 'developer']) -%}
    {{- <system> + ns.system + ('\\n\\n' if ns.system and ns.instructions else '') + ns.instructions + <system_end> -}}
{%- else -%}
    {{- <opening> -}}
{%- endif -%}
{%- set ns.instructions = '' -%}"""
_IN_QUESTION = """\
{{- <opening> -}}
{%- set ns.instructions = ns.instructions + <joint> if tools else '' -%}
{%- set ns.instructions = (ns.system + <joint> if ns.system else '') + ns.instructions -%}"""

_BEFORE_TOOLS = "You can call these tools. Each line is one of them, its arguments as a JSON schema:\n<tools>"
_AFTER_TOOLS = (
    "\n</tools>\nTo call a tool, write:\n<tool_call>\n"
    '{"name": "the name of the tool", "arguments": {"an argument": "its value"}}\n</tool_call>'
)


class ToolReady(NamedTuple):
    """A tokenizer whose chat template writes tools."""

    tokenizer: Any
    supplied: bool
    """whether the template is attar's; else it is the model's own, and the tokenizer the one that was given"""


@dataclass(frozen=True)
class _Markers:
    """What a template writes around texts."""

    opening: str
    """before the first turn, if no system text is given"""
    default: str
    """system text where none is given"""
    system: str | None
    """the opening, and what comes before a system text; None where there is no turn for it"""
    system_end: str
    joint: str
    """between a system text and the question that it stands in"""
    later_system: str | None
    """before a system text that is not the first message"""
    user: str
    user_end: str
    assistant: str
    assistant_end: str
    trims: bool


_known: WeakKeyDictionary[Any, tuple[Any, bool]] = WeakKeyDictionary()


def knows_tools(tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether the chat template writes the tools that it is given, or refuses them in words of its own.

    Args:
        tokenizer: with a chat template.
        template_kwargs: further variables of the template.
    """
    variables = dict(template_kwargs or {})
    state = copy.deepcopy((tokenizer.chat_template, variables))
    known = _known.get(tokenizer)
    if known is None or known[0] != state:
        talk = [{"role": "user", "content": _USER}]
        try:
            answer = _render(tokenizer, talk, variables) != _render(tokenizer, talk, variables, tools=[_TOOL])
        except _REFUSALS:
            answer = True
        known = _known[tokenizer] = (state, answer)
    return known[1]


def with_tools(tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> ToolReady:
    """The tokenizer, with a chat template that writes tools: the model's own if it does, else one made from it.

    The template is part of the tokenizer, so whatever is saved or exported with the student has it too. On
    conversations without tools it writes what the model's own does, except that a system text goes to the beginning of
    the first question where the model has no turn for one.

    Args:
        tokenizer: a tokenizer with a chat template; it is not changed.
        template_kwargs: further variables of the template.

    Raises:
        ModelError: the template has no turn markers that can be told from its texts.
    """
    variables = dict(template_kwargs or {})
    if not tokenizer.chat_template:
        raise ModelError("the tokenizer has no chat template to make one with tools from; set tokenizer.chat_template")
    if knows_tools(tokenizer, variables):
        return ToolReady(tokenizer, supplied=False)
    ready = copy.deepcopy(tokenizer)
    ready.chat_template = _written(_markers(tokenizer, variables))
    _compare(tokenizer, ready, variables)
    return ToolReady(ready, supplied=True)


def _render(tokenizer: Any, talk: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(list(talk), tokenize=False, **options, **variables))


def _talk(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


_SHORT = _talk(("user", _USER))
_LONG = _talk(("user", _USER), ("assistant", _ANSWER), ("user", _AGAIN))


def _markers(tokenizer: Any, variables: Mapping[str, Any]) -> _Markers:
    """Read off what a template writes around the texts of some talks."""

    def rendered(talk: list[dict[str, str]], prompt: bool = False) -> str | None:
        try:
            text = _render(tokenizer, talk, variables, add_generation_prompt=prompt)
        except _REFUSALS:
            return None
        return text if all(message["content"] in text for message in talk) else None

    question, asked = rendered(_SHORT), rendered(_SHORT, prompt=True)
    answered, long = rendered(_LONG[:2]), rendered(_LONG)
    if question is None or asked is None or answered is None or long is None:
        raise _unreadable("it does not write a question, its answer and another question")
    head, user_end = question.split(_USER)
    assistant = _between(answered, _USER, _ANSWER).removeprefix(user_end)
    if asked != question and asked.startswith(question):
        assistant = asked.removeprefix(question)
    assistant_end = answered.split(_ANSWER)[1]
    user = _between(long, _ANSWER, _AGAIN).removeprefix(assistant_end)
    if not user or not head.endswith(user):
        raise _unreadable(f"the first question follows {head!r} and the second {user!r}")
    opening, default, before, system_end, joint = head.removesuffix(user), "", None, "", "\n\n"
    framed = rendered(_talk(("system", _SYSTEM), ("user", _USER)))
    if framed is not None:
        first, behind = framed.split(_SYSTEM)[0], _between(framed, _SYSTEM, _USER)
        if behind.endswith(user):
            before, system_end = first, behind.removesuffix(user)
            if opening.startswith(first) and opening.endswith(system_end) and system_end:
                default = opening.removeprefix(first).removesuffix(system_end)
        else:
            joint = behind
    spaced = rendered(_talk(("user", f" {_USER} ")))
    later = rendered([*_LONG[:2], *_talk(("system", _SYSTEM), ("user", _AGAIN))])
    return _Markers(
        opening=opening,
        default=default,
        system=before,
        system_end=system_end,
        joint=joint,
        later_system=None
        if later is None or before is None
        else _between(later, _ANSWER, _SYSTEM).removeprefix(assistant_end),
        user=user,
        user_end=user_end,
        assistant=assistant,
        assistant_end=assistant_end,
        trims=spaced is None,
    )


def _between(text: str, one: str, other: str) -> str:
    return text.split(one)[1].split(other)[0]


def _written(markers: _Markers) -> str:
    """The template with the markers in it."""
    later = "{{- raise_exception('A system message stands first') -}}"
    if markers.later_system is not None:
        later = "{{- <later> + message.content<trim> + <system_end> -}}"
    template = _TEMPLATE.replace("<system_turn>", _IN_QUESTION if markers.system is None else _OWN_TURN)
    template = template.replace("<later_system>", later).replace("<trim>", " | trim" if markers.trims else "")
    texts = {
        "before_tools": _BEFORE_TOOLS,
        "after_tools": _AFTER_TOOLS,
        "default": markers.default,
        "opening": markers.opening,
        "system": markers.system or "",
        "system_end": markers.system_end,
        "joint": markers.joint,
        "later": markers.later_system or "",
        "user": markers.user,
        "user_end": markers.user_end,
        "assistant": markers.assistant,
        "assistant_end": markers.assistant_end,
    }
    # In one pass, as a marker may itself look like a place in the template.
    return re.sub(f"<({'|'.join(texts)})>", lambda match: _literal(texts[match.group(1)]), template)


def _literal(text: str) -> str:
    """A Jinja string."""
    return json.dumps(text, ensure_ascii=False)


def _compare(own: Any, ready: Any, variables: Mapping[str, Any]) -> None:
    """Raise unless both templates write the same for talks without tools, where the own one writes them at all."""
    users, system = ("user", " what? "), ("system", "be kind")
    answers = _talk(users, ("assistant", "this\n"), ("user", "and?"), ("assistant", " that"))
    for talk in (answers[:1], answers[:2], answers, [*_talk(system), *answers], [*answers, *_talk(system, users)]):
        for prompt in (False, True):
            try:
                wanted = _render(own, talk, variables, add_generation_prompt=prompt)
                found = _render(ready, talk, variables, add_generation_prompt=prompt)
            except _REFUSALS:
                # The own one has roles that it refuses; ours a later system message, where there is no turn for it.
                continue
            # Some write no generation prompt, or another end after the last turn when there is one.
            if found != wanted and not (prompt and found.startswith(wanted)):
                raise _unreadable(f"for the roles {[m['role'] for m in talk]} it writes {wanted!r}, not {found!r}")


def _unreadable(why: str) -> ModelError:
    return ModelError(
        f"no template with tools can be made from the model's chat template: {why}; give the tokenizer a chat template "
        "that writes tools, or take another student"
    )

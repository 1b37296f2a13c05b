"""Tools for a model whose chat template knows none: a template that shows them, in the manner of Hermes.

Before the model's own template sees the messages, tools become words of the system's message, calls become
``<tool_call>`` JSON in the assistant's text, and results stand in the user's turn. Without tools, calls or results a
conversation is rendered as ever. The form is that of Hermes 2 Pro (NousResearch/Hermes-Function-Calling) and Qwen.
"""

from __future__ import annotations

import copy
from typing import Any

import jinja2

from attar.errors import ModelError

__all__ = ["hermes_template", "with_hermes"]

_MARK = "{#- attar: tools -#}"
# Jinja in llama.cpp knows no do-statement and no dict(); lists are joined, and messages written out.
_PRELUDE = (
    _MARK
    + """
{%- set attar = namespace(messages=[], used=tools is defined and tools, answers='', head='') -%}
{%- for m in messages -%}
  {%- if m.role == 'tool' or m.tool_calls -%}{%- set attar.used = true -%}{%- endif -%}
{%- endfor -%}
{%- if attar.used -%}
  {%- if tools is defined and tools -%}
    {%- set attar.head = '# Tools\\n\\nYou may call these functions:\\n<tools>' -%}
    {%- for tool in tools -%}{%- set attar.head = attar.head + '\\n' + (tool | tojson) -%}{%- endfor -%}
    {%- set attar.head = attar.head + '\\n</tools>\\n\\nTo call one, write its name and arguments as JSON:\\n'
      + '<tool_call>\\n{"name": "...", "arguments": {...}}\\n</tool_call>' -%}
  {%- endif -%}
  {%- for m in messages -%}
    {%- if m.role == 'tool' -%}
      {%- set attar.answers = attar.answers + ('\\n' if attar.answers else '')
        + '<tool_response>\\n' + m.content + '\\n</tool_response>' -%}
      {%- if loop.last or loop.nextitem.role != 'tool' -%}
        {%- set attar.messages = attar.messages + [{'role': 'user', 'content': attar.answers}] -%}
        {%- set attar.answers = '' -%}
      {%- endif -%}
    {%- elif m.tool_calls -%}
      {%- set call = namespace(text=m.content or '') -%}
      {%- for c in m.tool_calls -%}
        {%- set call.text = call.text + ('\\n' if call.text else '') + '<tool_call>\\n{"name": '
          + (c.function.name | tojson) + ', "arguments": '
          + (c.function.arguments if c.function.arguments is string else c.function.arguments | tojson)
          + '}\\n</tool_call>' -%}
      {%- endfor -%}
      {%- if m.reasoning_content -%}
        {%- set attar.messages = attar.messages
          + [{'role': m.role, 'content': call.text, 'reasoning_content': m.reasoning_content}] -%}
      {%- else -%}
        {%- set attar.messages = attar.messages + [{'role': m.role, 'content': call.text}] -%}
      {%- endif -%}
    {%- elif attar.head and loop.first and m.role in ROLES -%}
      {%- set attar.messages = attar.messages
        + [{'role': m.role, 'content': m.content + '\\n\\n' + attar.head}] -%}
      {%- set attar.head = '' -%}
    {%- else -%}
      {%- set attar.messages = attar.messages + [m] -%}
    {%- endif -%}
  {%- endfor -%}
  {%- if attar.head -%}
    {%- set attar.messages = [{'role': 'system', 'content': attar.head}] + attar.messages -%}
  {%- endif -%}
  {%- set messages = attar.messages -%}
{%- endif -%}
"""
)
_SYSTEM = "['system', 'developer']"
# A template without a system's turn: the tools stand behind the first question.
_USER = "['user', 'system', 'developer']"


def hermes_template(tokenizer: Any) -> str:
    """The tokenizer's chat template, with tools.

    Raises:
        ModelError: the tokenizer has no chat template.
    """
    try:
        own: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise ModelError(
            "the tokenizer has no chat template; take the instruction-tuned model's tokenizer, or set "
            "tokenizer.chat_template"
        ) from error
    if own.startswith(_MARK):
        return own
    return _PRELUDE.replace("ROLES", _SYSTEM if _has_system(tokenizer) else _USER) + own


def with_hermes(tokenizer: Any) -> Any:
    """A copy of the tokenizer that has this template; save it with the student, so that it is served as trained."""
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = hermes_template(tokenizer)
    return copied


def _has_system(tokenizer: Any) -> bool:
    """Whether the template writes a system's text where it stands."""
    messages = [{"role": "system", "content": "probe-of-system"}, {"role": "user", "content": "hi"}]
    try:
        return "probe-of-system" in tokenizer.apply_chat_template(messages, tokenize=False)
    except jinja2.TemplateError:
        return False

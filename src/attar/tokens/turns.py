"""Render a conversation with a model's chat template, and find what the assistant produced in it.

Nothing is known about the template. What it writes for the messages before an answer, with its generation prompt, is
what the model is given when it is asked; so this must be how the text with the answer begins, and what follows, up to
the end-of-turn token, is what the model has to produce. Where that does not hold and the answer cannot be put behind
what the model is given, an error says what differs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2

from attar.data.types import Conversation, Message
from attar.errors import DataError, ModelError
from attar.tokens.controls import Coder, Marks, coder, strings
from attar.tokens.tooling import knows_tools

__all__ = ["Parts", "Turn", "Turns"]

_GENERATION = re.compile(r"{%[-+]?\s*generation\b")
# Private-use characters for marks and for a probe's content.
_PRIVATE = range(0xE000, 0xF8FF)
# What a template raises, on purpose or by adding what cannot be added.
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)


@dataclass(frozen=True)
class Turn:
    """An assistant's message as the template renders it at its moment, when it is the last one."""

    index: int
    """of the message"""
    text: str
    """what the model is given when it is asked for this message, and the message"""
    start: int
    """where in the text begins what the assistant produced"""
    end: int
    """behind the end-of-turn token"""
    quoted: frozenset[int]
    """where in the text control strings start that came from content"""


class Parts(NamedTuple):
    """Where in a turn's text its parts begin: first the reasoning, then these."""

    text: int
    call: int
    end: int
    """the end-of-turn token"""


class Turns:
    """The turns of one conversation.

    Args:
        tokenizer: with a chat template.
        conversation: what is rendered.
        template_kwargs: further variables of the template, as the student's server will give them.

    Raises:
        ModelError: the tokenizer has no chat template, or one that leaves out the tools that the conversation has, or
            is not a fast one.
    """

    def __init__(self, tokenizer: Any, conversation: Conversation, template_kwargs: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._name = f"conversation {conversation.id}"
        self._tools = list(conversation.tools) or None
        self._variables = dict(template_kwargs)
        try:
            self._template: str = tokenizer.get_chat_template(None, self._tools)
        except ValueError as error:
            raise ModelError(
                "the tokenizer has no chat template; take the instruction-tuned model's tokenizer, or set "
                "tokenizer.chat_template"
            ) from error
        self.coder: Coder = coder(tokenizer, self._template)
        if self._tools and not knows_tools(tokenizer, self._variables):
            raise ModelError(
                f"{self._name} has {len(self._tools)} tools, and the chat template leaves them out, so a student would "
                "learn to call what it does not see; give it a template that writes them: "
                "attar.tokens.with_tools(tokenizer)"
            )
        self._messages = self._with_arguments(conversation.messages)

    def turn(self, index: int) -> Turn:
        """The assistant's message ``messages[index]``.

        Raises:
            DataError: the template refuses the messages, or what the assistant produced cannot be told from what the
                template wrote.
        """
        where = f"{self._name}, messages[{index}]"
        if index == 0:
            raise DataError(
                f"{where} is an assistant's and nothing comes before it, so there is no prompt that it answers; set "
                "train: false on it, or put a user's message before it"
            )
        text = self._render(self._messages[: index + 1], where)
        quoted = self._quoted(self._messages[: index + 1], text, where)
        prompt, start = self._start(self._messages[: index + 1], text, where)
        end = self._end(index, text, start, quoted, where)
        self._check_calls(index, text[start:end], where)
        self._check_markers(index, text, start, end, where)
        if text.startswith(prompt):
            return Turn(index, text, start, end, quoted)
        before = self._quoted(self._messages[:index], prompt, where, prompt=True)
        shift = len(prompt) - start
        quoted = before | {place + shift for place in quoted if place >= start}
        return Turn(index, prompt + text[start:], len(prompt), end + shift, quoted)

    def parts(self, turn: Turn) -> Parts:
        """Where the parts of an answer begin, by what changes in the text when the message's content does.

        Markup counts to the part before it if that is reasoning or text, else to the part behind it. What a template
        takes for reasoning within the content is text here: reasoning is what stands in its own field.

        Raises:
            DataError: the template refuses the message with other content.
        """
        where = f"{self._name}, messages[{turn.index}]"
        before, message = self._messages[: turn.index], self._messages[turn.index]
        calls, content = message.get("tool_calls"), message["content"]
        stop = next(s for s, e in self.coder.occurrences(turn.text) if e == turn.end)
        used = set(turn.text).union(self._template, *strings(before))
        probe = next(chr(i) for i in _PRIVATE if chr(i) not in used)
        changed = [*before, {**message, "content": probe}]
        probed = self._render(changed, where)
        written = probe in probed
        if calls and not written:
            # The template leaves the text beside calls out; so where would it stand if there were no calls?
            plain = {field: value for field, value in message.items() if field != "tool_calls"}
            changed = [*before, {**plain, "content": probe}]
            probed = self._render(changed, where)
        own, other = turn.text[turn.start :], probed[self._start(changed, probed, where)[1] :]
        begin = min(turn.start + _shared(own, other), stop)
        reasoning = (message.get("reasoning_content") or "").strip()
        text = begin if reasoning and reasoning in turn.text[turn.start : begin] else turn.start
        if not calls:
            return Parts(text, stop, stop)
        if not content.strip() or not written:
            return Parts(text, text, stop)
        behind = _shared(own[::-1], other[::-1])
        return Parts(text, max(text, len(turn.text) - behind), stop)

    def asked(self) -> tuple[str, frozenset[int]]:
        """What the model is given when it is asked for the next message, and where control strings are content in it.

        Raises:
            DataError: the template refuses the messages.
        """
        text = self._render(self._messages, self._name, prompt=True)
        quoted = self._quoted(self._messages, text, self._name, prompt=True)
        if text == self._render(self._messages, self._name):
            text += self._header(self._messages, text, self._name)
        return text, quoted

    def _with_arguments(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages as a template wants them, the arguments of tool calls as objects or, if need be, as JSON.

        transformers hands out objects, and most templates write them as JSON; some add the string as it comes.
        """
        calls = [call for message in messages for call in message.tool_calls]
        objects = [_message(message, as_json=False) for message in messages]
        if not calls:
            return objects
        try:
            text = self._render(objects, self._name)
        except DataError:
            as_json = [_message(message, as_json=True) for message in messages]
            try:
                self._render(as_json, self._name)
            except DataError:
                return objects  # not for the arguments' sake: the first turn that cannot be rendered says why
            return as_json
        if any(call.arguments and repr(call.arguments) in text for call in calls):  # Python's spelling, not JSON's
            return [_message(message, as_json=True) for message in messages]
        return objects

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        where: str,
        *,
        prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tools=self._tools if tools is None else tools,
                add_generation_prompt=prompt,
                tokenize=False,
                **self._variables,
            )
        except _REFUSALS as error:
            raise DataError(
                f"{where}: the chat template refuses the roles {[m['role'] for m in messages]}: {error}; write the "
                "messages as the template wants them (some have no system role: put its text before the user's), or "
                "leave the conversation out"
            ) from error
        return text

    def _quoted(
        self, messages: Sequence[Mapping[str, Any]], text: str, where: str, *, prompt: bool = False
    ) -> frozenset[int]:
        """Where control strings start in the text that were in the content, not in the template."""
        given = [*strings(messages), *strings(self._tools)]
        spelled = sorted({m.group() for string in given for m in self.coder.any_control.finditer(string)})
        if not spelled:
            return frozenset()
        used = set(text).union(*given, self._template)
        before, after = [chr(i) for i in _PRIVATE if chr(i) not in used][:2]

        def rendered(manner: str) -> tuple[str, frozenset[int], int]:
            """The text without marks, where marked strings start in it, and how many there were in the content."""
            marks = Marks(before, after, manner)
            marked = marks.messages(messages, self.coder)
            tools = None if self._tools is None else marks.value(self._tools, self.coder.any_control)
            given = sum(len(marks.find(string, self.coder)[1]) for string in strings([marked, tools]))
            return *marks.find(self._render(marked, where, prompt=prompt, tools=tools), self.coder), given

        def own(text: str, quoted: frozenset[int]) -> list[str]:
            return [text[s:e] for s, e in self.coder.occurrences(text) if s not in quoted]

        for manner in Marks.MANNERS:
            try:
                unmarked, quoted, given_marked = rendered(manner)
                if unmarked != text:
                    continue
                # Either every marked string is found again; or, where the template leaves some out, what is not marked
                # is what the template writes for content that spells nothing.
                if len(quoted) == given_marked or own(text, quoted) == own(*rendered("instead")[:2]):
                    return quoted
            except DataError:
                continue
        raise DataError(
            f"{where}: the content spells {', '.join(spelled)}, and the chat template renders it in another way when "
            "that is marked as text, so it cannot be told from the template's own; leave the conversation out, or put "
            "reasoning into reasoning_content and calls into tool_calls"
        )

    def _start(self, messages: list[dict[str, Any]], text: str, where: str) -> tuple[str, int]:
        """What the model is given when it is asked for the last message, and where in the text its answer begins.

        Some templates write what came before in another way once an answer follows (Hermes: the end of the last tool's
        result). There the answer is behind as many headers as what the model is given has.
        """
        before = messages[:-1]
        prompt = self._render(before, where, prompt=True)
        bare = self._render(before, where)
        if text.startswith(prompt) and prompt == bare:
            prompt += self._header(before, prompt, where)
        if text.startswith(prompt):
            return prompt, len(prompt)
        header = prompt.removeprefix(bare) if prompt.startswith(bare) else ""
        if (control := self.coder.any_control.search(header)) is not None:

            def headers(text: str, quoted: frozenset[int]) -> list[int]:
                found = re.finditer(re.escape(header), text)
                return [match.end() for match in found if match.start() + control.start() not in quoted]

            asked = headers(prompt, self._quoted(before, prompt, where, prompt=True))
            answered = headers(text, self._quoted(messages, text, where))
            if len(asked) <= len(answered):
                return prompt, answered[len(asked) - 1]
        same = _shared(prompt, text)
        raise DataError(
            f"{where}: asked for this answer, the model is given ...{prompt[max(0, same - 30) :]!r}, but with the "
            f"answer the chat template writes ...{text[max(0, same - 30) : same + 50]!r}; it would be trained on "
            "another prompt than it is asked with. Give the message the reasoning that the template expects, set "
            "the template's variables as the server does, or take another chat template"
        )

    def _header(self, before: list[dict[str, Any]], prompt: str, where: str) -> str:
        """What a template without generation prompt writes before any answer, to say whose it is."""
        used = set(prompt).union(*strings(before), self._template)
        probe = next(chr(i) for i in _PRIVATE if chr(i) not in used)
        text = self._render([*before, {"role": "assistant", "content": probe}], where)
        if not text.startswith(prompt) or probe not in text:
            raise DataError(
                f"{where}: the chat template has no generation prompt, and rewrites what was before when an answer "
                f"follows: {prompt[-50:]!r} becomes {text[len(prompt) - 50 :]!r}; take a template that has one"
            )
        header = text[len(prompt) : text.index(probe)]
        return header if header.strip() else ""

    def _end(self, index: int, text: str, start: int, quoted: frozenset[int], where: str) -> int:
        """Behind the end-of-turn token, the last control token that the template writes after the answer.

        A template may write more when no answer is wanted next (Phi-3: the end of the text), which the model does not
        produce; so only what stands there in both cases counts, if that holds an end at all.
        """
        try:
            asked = self._render(self._messages[: index + 1], where, prompt=True)
        except DataError:
            asked = text  # a template may refuse to ask for an answer to an answer
        spans = [(s, e) for s, e in self.coder.occurrences(text) if s >= start]
        shared = len(text) if asked.startswith(text) else _shared(text, asked)
        shared = next((s for s, e in spans if s < shared < e), shared)
        for limit in dict.fromkeys((shared, len(text))):
            ends = [e for s, e in spans if e <= limit and s not in quoted]
            if ends and not text[ends[-1] : limit].strip():
                return ends[-1]
        raise DataError(
            f"{where}: the chat template writes no end-of-turn token after the answer: it ends with {text[-50:]!r}, "
            "so a student would never learn to stop; take a template that writes one, such as the EOS token"
        )

    def _check_calls(self, index: int, produced: str, where: str) -> None:
        """Refuse a template that leaves calls out: the answer would be learned without them."""
        for call in self._messages[index].get("tool_calls") or ():
            name = call["function"]["name"]
            if name not in produced and json.dumps(name)[1:-1] not in produced:
                raise DataError(
                    f"{where}: the message calls {name!r}, and the chat template writes {produced[:60]!r} for it; give "
                    "the tokenizer a template that writes calls: attar.tokens.with_tools(tokenizer)"
                )

    def _check_markers(self, index: int, text: str, start: int, end: int, where: str) -> None:
        """Compare with the template's own ``{% generation %}`` markers, where it has them.

        They may leave out the end-of-turn token, and white space at either end.
        """
        if _GENERATION.search(self._template) is None:
            return
        from transformers.utils.chat_template_utils import render_jinja_template  # late: heavy, and few need it

        rendered, spans = render_jinja_template(
            conversations=[self._messages[: index + 1]],
            tools=self._tools,
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=False,
            **{**self._tokenizer.special_tokens_map, **self._variables},
        )
        own = [(s, e) for s, e in spans[0] if e > start]
        outside = "".join(text[s : min(e, start)] + text[max(s, end) : e] for s, e in own)
        position, unmarked = start, ""
        for s, e in own:
            unmarked += text[position:s]
            position = max(position, e)
        unmarked += text[position:end]
        last = next(s for s, e in self.coder.occurrences(text) if e == end)
        unmarked = unmarked.strip().removesuffix(text[last:end])
        if rendered[0] != text or outside.strip() or unmarked.strip():
            marked = " and ".join(repr(text[s:e][:60]) for s, e in own) or "nothing"
            raise DataError(
                f"{where}: the chat template's {{% generation %}} markers enclose {marked}, but after the prompt the "
                f"assistant produces {text[start:end][:60]!r}; mend the markers, or take them out of the template"
            )


def _shared(one: str, other: str) -> int:
    """How many characters two strings begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _message(message: Message, *, as_json: bool) -> dict[str, Any]:
    """A message as transformers hands it to a template."""
    row = message.wire
    row.pop("train", None)
    if message.tool_calls and not as_json:
        row["tool_calls"] = [
            {**call, "function": {"name": own.name, "arguments": own.arguments}}
            for own, call in zip(message.tool_calls, row["tool_calls"], strict=True)
        ]
    return row

"""Prompts of labelling questions -> token ids.

A user's words never become control tokens: the stretches of a prompt that are not trusted are encoded as plain text,
even where they spell ``<|im_end|>``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.sandbox

from attar.data.types import Part, Prompt
from attar.errors import RecipeError

__all__ = ["encode_plain", "encode_prompt", "prompt_text", "render_prompt"]

# Private-use characters that fence what a user wrote while a template is rendered.
_OPEN, _CLOSE = "\ue000", "\ue001"
_FENCES = re.compile(f"{_OPEN}(.*?){_CLOSE}", re.DOTALL)


@lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    return environment.from_string(template)


def _fenced(text: str) -> str:
    return _OPEN + text.replace(_OPEN, "").replace(_CLOSE, "") + _CLOSE


def render_prompt(
    template: str,
    text: str,
    examples: Sequence[tuple[str, str]],
    words: Mapping[str, str],
) -> Prompt:
    """Render a prompt template.

    Args:
        template: Jinja; sees ``text``, ``examples`` (each with ``text``, ``label`` and ``word``), ``labels`` and
            ``words`` (label -> word).
        text: the request; never trusted.
        examples: pairs of request and label.
        words: what stands for each label, in the order of the labels.

    Raises:
        RecipeError: the template does not compile, names something unknown, or never shows the request.
    """
    try:
        rendered = _compiled(template).render(
            text=_fenced(text),
            examples=[{"text": _fenced(t), "label": label, "word": words[label]} for t, label in examples],
            labels=list(words),
            words=dict(words),
        )
    except jinja2.TemplateError as error:
        raise RecipeError(f"teacher.prompts: the template does not render: {error}") from error
    parts: list[Part] = []
    end = 0
    for match in _FENCES.finditer(rendered):
        if match.start() > end:
            parts.append(Part(rendered[end : match.start()], trusted=True))
        parts.append(Part(match.group(1), trusted=False))
        end = match.end()
    if len(parts) == 0 or _fenced(text) not in rendered:
        raise RecipeError("teacher.prompts: the template never shows the request; put {{ text }} in it")
    if end < len(rendered):
        parts.append(Part(rendered[end:], trusted=True))
    return tuple(parts)


def prompt_text(prompt: Prompt) -> str:
    """The prompt as one string, for people and for engines that take text."""
    return "".join(part.text for part in prompt)


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text in which nothing is a control token."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return ids


def _opening(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer itself puts before any text (a BOS token, usually)."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("", add_special_tokens=True).input_ids[:1] == [bos] else []


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: control tokens are read in its trusted parts only.

    Adjacent plain stretches are encoded together, as the whole text would be, so the ids equal the tokenizer's own
    wherever no untrusted part spells a control token.
    """
    controls = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    pattern = re.compile("|".join(re.escape(c) for c in sorted(controls, key=len, reverse=True))) if controls else None
    opening = _opening(tokenizer)
    ids = list(opening)
    plain: list[str] = []
    matched = False

    def flush() -> None:
        if plain:
            ids.extend(encode_plain(tokenizer, "".join(plain)))
            plain.clear()

    for text, trusted in prompt:
        end = 0
        for match in pattern.finditer(text) if pattern and trusted else ():
            plain.append(text[end : match.start()])
            flush()
            # A template that writes the BOS token itself gets one, not two.
            if not (ids == opening == [controls[match.group()]] and not matched):
                ids.append(controls[match.group()])
            matched = True
            end = match.end()
        plain.append(text[end:])
    flush()
    return ids

"""The token ids of the continuations that prompts are scored with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attar.data.types import Prompt
from attar.errors import RunError
from attar.tokens import encode_plain, prompt_text

__all__ = ["encode_continuations"]


def encode_continuations(tokenizer: Any, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[list[int]]:
    """Each continuation's ids, encoded on its own, after one space unless the prompts end in white space.

    Raises:
        RunError: some prompts end in white space and some do not, or a continuation has no tokens.
    """
    spaced = {not prompt_text(prompt)[-1:].isspace() for prompt in prompts}
    if len(spaced) > 1:
        raise RunError("prompts of one call must all end in white space or all not; score them in two calls")
    lead = " " if spaced == {True} else ""
    branches = [encode_plain(tokenizer, lead + continuation) for continuation in continuations]
    for continuation, branch in zip(continuations, branches, strict=True):
        if not branch:
            raise RunError(f"the continuation {continuation!r} has no tokens")
    return branches

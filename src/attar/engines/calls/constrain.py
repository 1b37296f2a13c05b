"""Hold a model in this process to a grammar: which tokens may come next.

The library is llguidance; ``docs/tool-calls.md`` says why.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attar.errors import CapabilityError, DataError, RunError, require

__all__ = ["Constraints", "Matcher"]


class Matcher:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def mask(self, logits: Tensor) -> Tensor:
        """The logits [vocabulary] with minus infinity for each token that may not come next.

        Raises:
            RunError: none may, or the grammar is too complex.
        """
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        allowed = torch.from_numpy(bits[: len(logits)].view(np.bool_))
        if self._matcher.is_error() or not allowed.any():
            problem = " ".join(self._matcher.get_error().split())[:300] or "no token of the tokenizer fits"
            raise RunError(f"the answer cannot be held to its grammar any further: {problem}; simplify the schema")
        return logits.masked_fill(~allowed, -torch.inf)

    def take(self, token: int) -> None:
        """The token that was chosen.

        Raises:
            RunError: it may not come.
        """
        if not self._matcher.consume_token(token):
            raise RunError(f"token {token} does not fit the grammar: {self._matcher.get_error()[:300]}")

    @property
    def over(self) -> bool:
        """Whether the answer is complete, and nothing but its end can follow."""
        return bool(self._matcher.is_stopped())


class Constraints:
    """Grammars for the answers of one model.

    Args:
        tokenizer: the model's, a fast one.
        ends: tokens that end an answer.
        vocabulary: number of its logits; None for the tokenizer's.

    Raises:
        MissingExtra: llguidance is not installed.
        CapabilityError: the tokenizer is none that llguidance knows, or nothing ends an answer.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int], vocabulary: int | None) -> None:
        self._library = require("llguidance", "grammar")
        if not ends:
            raise CapabilityError(
                "no token ends the model's answers, so none can be held to a grammar; set eos_token in its tokenizer"
            )
        try:
            self._tokenizer = require("llguidance.hf", "grammar").from_tokenizer(
                tokenizer, n_vocab=vocabulary, eos_token=sorted(ends)
            )
        except (ValueError, RuntimeError) as error:
            raise CapabilityError(
                f"answers of this tokenizer ({type(tokenizer).__name__}) cannot be held to a grammar: {error}; take a "
                "byte-level BPE or SentencePiece tokenizer with byte fallback"
            ) from error
        added = tokenizer.added_tokens_decoder.items()
        apart = [(token.content, number, token.special) for number, token in added if self._is_apart(number)]
        self.apart = {content: number for content, number, _ in apart}
        """tokens that stand in no text of a grammar unless they are named: what each spells -> its id"""
        self.words = frozenset(content for content, _, special in apart if not special)
        """those of them that are no special tokens, and may stand in a model's text"""

    def _is_apart(self, token: int) -> bool:
        return bool(self._tokenizer.is_special_token(token))

    def matcher(self, grammar: str) -> Matcher:
        """A grammar at its beginning.

        Raises:
            DataError: it cannot be used.
        """
        made = self._library.LLMatcher(self._tokenizer, self._library.LLMatcher.grammar_from_lark(grammar), log_level=0)
        if made.is_error():
            raise DataError(f"the answer cannot be held to its grammar: {' '.join(made.get_error().split())[:300]}")
        return Matcher(made)

"""A public fake: an engine that answers by a function. Label it as scripted wherever its answers appear."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from attar.data.types import Prompt
from attar.engines.base import Capability, Completion, Scores
from attar.tokens import prompt_text

__all__ = ["ScriptedEngine"]


class ScriptedEngine:
    """Scores a continuation by a function of (request, continuation), for tests without a model.

    Args:
        log_prob: (text of the last untrusted part, continuation) -> log-probability.
    """

    def __init__(self, log_prob: Callable[[str, str], float]) -> None:
        self._log_prob = log_prob

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Scores only."""
        return frozenset({"scores"})

    @property
    def parameters(self) -> None:
        """A script has none."""
        return None

    def complete(self, prompts: Sequence[Prompt], *, max_tokens: int) -> list[Completion]:
        """Refuse: a script of scores has no text of its own."""
        raise ValueError("a scripted engine scores; it writes no text")

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> Scores:
        """Score each continuation by the function."""
        requests = [next(part.text for part in reversed(prompt) if not part.trusted) for prompt in prompts]
        log_probs = np.array([[self._log_prob(r, c) for c in continuations] for r in requests], dtype=np.float32)
        return Scores(
            log_probs.reshape(len(requests), len(continuations)),
            np.ones(len(continuations), dtype=np.int64),
            np.array([len(prompt_text(prompt).split()) for prompt in prompts]),
        )

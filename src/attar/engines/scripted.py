"""A public fake: an engine that answers by a function. Label it as scripted wherever its answers appear."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from attar.data.types import Message, Prompt
from attar.engines.base import Answer, Capability, ChatRequest, Completion, Failure, Scores
from attar.tokens import prompt_text

__all__ = ["ScriptedChat", "ScriptedEngine"]


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


class ScriptedChat:
    """Continues conversations by a function, in the order of the requests. Its answers name the model ``scripted``.

    Args:
        answer: request -> the answer's text, its message, or what became of the request.
    """

    scripted = True

    def __init__(self, answer: Callable[[ChatRequest], str | Message | Answer | Failure]) -> None:
        self._answer = answer

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Text only."""
        return frozenset({"text"})

    def chat(self, requests: Iterable[ChatRequest | None]) -> Iterator[tuple[int, Answer | Failure]]:
        """Answer each request; tokens are words, and cost nothing."""
        for number, request in enumerate(filter(None, requests)):
            said = self._answer(request)
            if isinstance(said, str):
                said = Message("assistant", said)
            if isinstance(said, Message):
                asked = sum(len(message.content.split()) for message in request.messages)
                said = Answer(
                    message=said,
                    finish_reason="tool_calls" if said.tool_calls else "stop",
                    prompt_tokens=asked,
                    completion_tokens=len(said.content.split()),
                    cached_tokens=0,
                    model="scripted",
                    usd=0.0,
                )
            yield number, said

"""A label from a teacher behind an API: what it says of the words that stand for labels.

Two ways, and the recipe says which. Without ``teacher.samples``, the log-probabilities of the first token that the
teacher would write, from ``top_logprobs``: for words of one token each, at a server that gives them. With
``teacher.samples: n``, the teacher answers n times, held to the words by a JSON schema, and the answers are votes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from attar.data.types import Message, Prompt
from attar.engines.api import ApiEngine
from attar.engines.base import Answer, Capability, ChatRequest, Completion, Failure, Scores, TokenLogprobs
from attar.errors import CapabilityError, RunError
from attar.tokens import prompt_text

__all__ = ["LabelEngine"]

# As many as OpenAI gives at a position.
_TOP = 20
# Mean probability of tokens that only begin a word, above which the words are no single tokens.
_MOST_BEGUN = 0.05
# Mean probability of all words together, below which the prompt does not ask for a label.
_LEAST_SAID = 0.10
# Tokens that a JSON object around a word takes, generously.
_AROUND = 32
_EDGES = " \t\r\n.,:;!\"'`*"


class LabelEngine:
    """Scores words after prompts, each prompt as one user's message.

    Args:
        engine: whom to ask.
        samples: answers to each prompt that count as votes; None for log-probabilities of the first token.
        constrained: hold the votes to the words by a JSON schema; else the answer's text has to be a word.
        max_tokens: of an answer; None for what the words need.
    """

    def __init__(self, engine: ApiEngine, *, samples: int | None, constrained: bool, max_tokens: int | None) -> None:
        if samples is None and "top_logprobs" not in engine.capabilities:
            raise CapabilityError(
                f"{engine.server.protocol}:{engine.server.model} has no top_logprobs to read labels from; set "
                "teacher.samples: 8 to ask for each label eight times and count the answers"
            )
        self.engine = engine
        self.unreadable = 0
        """answers that were no word, and did not vote"""
        self._samples, self._constrained, self._max_tokens = samples, constrained, max_tokens

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Text, and scores of the words of labels."""
        return frozenset({"text", "scores"})

    @property
    def parameters(self) -> None:
        """Providers do not say."""
        return None

    def complete(self, prompts: Sequence[Prompt], *, max_tokens: int) -> list[Completion]:
        """What the teacher writes after each prompt, as its server samples by default."""
        answers = self._ask([ChatRequest((_message(prompt),), max_tokens) for prompt in prompts])
        return [
            Completion(
                answer.message.content,
                "length" if answer.finish_reason == "length" else "stop",
                answer.prompt_tokens,
                answer.completion_tokens,
            )
            for answer in answers
        ]

    def requests(self, prompts: Sequence[Prompt], words: Sequence[str]) -> list[ChatRequest]:
        """What :meth:`score` asks: one request a prompt, or its samples one after another."""
        if self._samples is None:
            limit = self._max_tokens or 1
            return [ChatRequest((_message(p),), limit, temperature=0.0, top_logprobs=_TOP) for p in prompts]
        schema = {
            "type": "object",
            "properties": {"label": {"type": "string", "enum": list(words)}},
            "required": ["label"],
            "additionalProperties": False,
        }
        limit = self._max_tokens or _AROUND + max(len(word.encode()) for word in words)
        asked = [ChatRequest((_message(p),), limit, schema=schema if self._constrained else None) for p in prompts]
        return [replace(request, sample=k) for request in asked for k in range(self._samples)]

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> Scores:
        """Log-probabilities of words after each prompt.

        By votes c of n answers over K words it is log((c + 1/K) / (n + 1)). By ``top_logprobs`` a word that is not
        among the listed tokens gets what is left of the probability, or that of the last one listed, if that is less:
        it has no more.

        Raises:
            CapabilityError: the words are not one token each, or the server has no ``top_logprobs``.
            RunError: an answer cannot be had, or is no word.
        """
        names = {word.strip().casefold(): number for number, word in enumerate(continuations)}
        if len(names) < len(continuations):
            raise RunError("two words differ only in case or space, and cannot be told apart in an answer")
        by = self._by_log_probs if self._samples is None else self._by_votes
        table, tokens = by(prompts, list(continuations), names)
        return Scores(table.astype(np.float32), np.ones(len(continuations), dtype=np.int64), tokens)

    def _by_log_probs(
        self, prompts: Sequence[Prompt], words: list[str], names: dict[str, int]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        answers = self._ask(self.requests(prompts, words))
        table = np.empty((len(prompts), len(words)))
        begun = said = 0.0
        for row, answer in enumerate(answers):
            if not answer.top_logprobs:
                raise RunError(
                    f"the teacher wrote nothing after {_shown(prompts[row])}; its prompt must ask for a label"
                )
            table[row], started, matched = _first_token(answer.top_logprobs[0], names)
            begun, said = begun + started, said + matched
        if begun / len(answers) > _MOST_BEGUN:
            raise CapabilityError(
                f"{begun / len(answers):.0%} of the teacher's first token is on tokens that only begin a label's word: "
                "the words are of several tokens; set teacher.samples: 8 to ask for whole labels, or give each label a "
                "word of one token in teacher.label_words"
            )
        if said / len(answers) < _LEAST_SAID:
            first = Counter(answer.top_logprobs[0].token for answer in answers if answer.top_logprobs).most_common(3)
            raise RunError(
                f"the teacher puts {said / len(answers):.1%} of its first token on the labels' words; it begins with "
                f"{', '.join(repr(token) for token, _ in first)}: its prompt must ask for the word alone"
            )
        return table, np.array([answer.prompt_tokens for answer in answers], dtype=np.int64)

    def _by_votes(
        self, prompts: Sequence[Prompt], words: list[str], names: dict[str, int]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        samples = self._samples or 1
        answers = self._ask(self.requests(prompts, words))
        counts = np.zeros((len(prompts), len(words)))
        tokens = np.zeros(len(prompts), dtype=np.int64)
        for number, answer in enumerate(answers):
            row = number // samples
            tokens[row] += answer.prompt_tokens
            vote = names.get(self._vote(answer).strip(_EDGES).casefold())
            if vote is None:
                self.unreadable += 1
            else:
                counts[row, vote] += 1
        silent = np.flatnonzero(counts.sum(1) == 0)
        if silent.size:
            said = answers[int(silent[0]) * samples]
            raise RunError(
                f"none of {samples} answers to {_shown(prompts[int(silent[0])])} is a label's word (one is "
                f"{said.message.content[:80]!r}, ended by {said.finish_reason}); its prompt must ask for one of "
                f"{', '.join(words)}"
            )
        return np.log((counts + 1 / len(words)) / (counts.sum(1, keepdims=True) + 1)), tokens

    def _vote(self, answer: Answer) -> str:
        if not self._constrained:
            return answer.message.content
        try:
            return str(json.loads(answer.message.content)["label"])
        except (ValueError, KeyError, TypeError):
            return ""

    def _ask(self, requests: Sequence[ChatRequest]) -> list[Answer]:
        """The answers, in order.

        Raises:
            RunError: one cannot be had.
        """
        answers: list[Answer | None] = [None] * len(requests)
        for index, outcome in self.engine.chat(requests):
            if isinstance(outcome, Failure):
                raise RunError(
                    f"the teacher gave no answer to {requests[index].messages[-1].content[-200:]!r} ({outcome.reason}: "
                    f"{outcome.detail}); leave that request out of the data, or ask another teacher. What was answered "
                    "is kept"
                )
            answers[index] = outcome
        return list(_all(answers))


def _message(prompt: Prompt) -> Message:
    return Message("user", prompt_text(prompt))


def _first_token(record: TokenLogprobs, names: dict[str, int]) -> tuple[npt.NDArray[np.float64], float, float]:
    """Log-probabilities [words]; the probability of tokens that only begin a word, and of the words."""
    listed = record.top or ((record.token, record.log_prob),)
    found = np.zeros(len(names))
    begun = 0.0
    for token, log_prob in listed:
        text, probability = token.strip().casefold(), float(np.exp(log_prob))
        if text in names:
            found[names[text]] += probability
        elif text and any(name.startswith(text) for name in names):
            begun += probability
    total = float(np.exp([log_prob for _, log_prob in listed]).sum())
    left = min(max(1.0 - total, 1e-9), float(np.exp(min(log_prob for _, log_prob in listed))))
    return np.log(np.where(found > 0, found, left)), begun, float(found.sum())


def _shown(prompt: Prompt) -> str:
    return repr(prompt_text(prompt)[-80:])


def _all(answers: Sequence[Answer | None]) -> Iterator[Answer]:
    for index, answer in enumerate(answers):
        if answer is None:
            raise RunError(f"request {index} has no answer")
        yield answer

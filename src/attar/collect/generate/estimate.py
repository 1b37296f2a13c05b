"""What a start would take, before anything is sent: calls, tokens and dollars, at least and at most."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attar.collect.generate.judge import judging
from attar.collect.generate.settings import answering, fingerprint, same_model, seeded, settings
from attar.collect.generate.sources import SOURCES, TRIES, Question
from attar.collect.generate.store import Store
from attar.data.types import Message
from attar.engines.base import ChatEngine, ChatRequest
from attar.engines.load import load_chat_teacher
from attar.recipe import Recipe
from attar.recipe.generate import Seeds

__all__ = ["Planned", "Range", "plan"]

_BLOCK = 256
# Of English text in common tokenizers, at most; and what a template may add to a prompt.
_BYTES_A_TOKEN, _ADDED_TOKENS = 6, 512


@dataclass(frozen=True)
class Range:
    """What one kind of request would take, each (at least, at most)."""

    calls: tuple[int, int]
    prompt_tokens: tuple[int, int]
    completion_tokens: tuple[int, int]
    usd: tuple[float, float] | None
    """None where no price is known; zero for a model in this process"""


@dataclass(frozen=True)
class Planned:
    """What a start would take."""

    prompts: Range
    """having the teacher write prompts"""
    answers: Range
    judge: Range | None
    kept: int
    """answers that are kept already"""
    target: int | None
    judge_is_teacher: bool

    @property
    def usd(self) -> tuple[float, float] | None:
        """All of it; None where a price is not known."""
        parts = [part.usd for part in (self.prompts, self.answers, self.judge) if part is not None]
        known = [usd for usd in parts if usd is not None]
        return (sum(u[0] for u in known), sum(u[1] for u in known)) if len(known) == len(parts) else None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"usd": self.usd}


def plan(recipe: Recipe) -> Planned:
    """What :func:`generate` would take now; asks nothing, and loads no model.

    At the least, every answer is kept, is one token long, and a token is six bytes. At the most, every prompt is asked,
    every answer is as long as ``max_tokens`` allows, and a token is one byte, which is what a budget reserves.

    Raises:
        AttarError: as :func:`generate` does of the recipe and the source; the key of a server must be set.
    """
    part = settings(recipe)
    store = Store(recipe.folder / "raw", fingerprint(recipe), read_only=True)
    remaining = None if part.target is None else max(0, part.target - store.accepted - store.spare)
    teacher = None if seeded(recipe.teacher.model) else load_chat_teacher(recipe)
    judge: ChatEngine | None = None
    if part.judge is not None and not seeded(part.judge.engine.model):
        judge = load_chat_teacher(recipe.model_copy(update={"teacher": part.judge.engine}))
    writer = _Placeholders(store, _Sum(teacher))
    answers, verdicts = _Sum(teacher), _Sum(judge)
    least: tuple[_Total, _Total, _Total] | None = None
    if remaining == 0:
        return _planned(recipe, store, (_Total(), _Total(), _Total()), (_Total(), _Total(), _Total()))
    longest = Message("assistant", "x" * (recipe.teacher.max_tokens or 0))
    source = SOURCES[part.source.kind](part.source, part.system, writer, Counter(), recipe.run.seed)
    for task in source:
        for sample in range(part.samples):
            if store.asked(task.id, sample):
                continue
            answers.add(answering(recipe, task, sample))
            if part.judge is not None:
                verdicts.add(judging(part.judge, task.example(longest)))
            if remaining is not None and answers.requests == remaining:
                least = (writer.sum.total(), answers.total(), verdicts.total())
    most = (writer.sum.total(), answers.total(), verdicts.total())
    # All prompts are asked where there is no target, and where they are fewer than it; a judge may see no answer.
    least = least or (most[0], most[1], _Total())
    if isinstance(part.source, Seeds):
        most = (most[0].times(TRIES), *most[1:])
    return _planned(recipe, store, least, most)


@dataclass(frozen=True)
class _Total:
    calls: int = 0
    prompt_tokens: tuple[int, int] = (0, 0)
    completion_tokens: tuple[int, int] = (0, 0)
    usd: tuple[float, float] | None = (0.0, 0.0)

    def plus(self, other: _Total) -> _Total:
        return _Total(
            self.calls + other.calls,
            _both(self.prompt_tokens, other.prompt_tokens),
            _both(self.completion_tokens, other.completion_tokens),
            None if self.usd is None or other.usd is None else _both(self.usd, other.usd),
        )

    def times(self, n: int) -> _Total:
        total = _Total()
        for _ in range(n):
            total = total.plus(self)
        return total


def _both(one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[Any, Any]:
    return one[0] + other[0], one[1] + other[1]


def _planned(
    recipe: Recipe, store: Store, least: tuple[_Total, _Total, _Total], most: tuple[_Total, _Total, _Total]
) -> Planned:
    prompts, answers, judge = (
        Range(
            (low.calls, high.calls),
            (low.prompt_tokens[0], high.prompt_tokens[1]),
            (low.completion_tokens[0], high.completion_tokens[1]),
            None if low.usd is None or high.usd is None else (low.usd[0], high.usd[1]),
        )
        for low, high in zip(least, most, strict=True)
    )
    part = settings(recipe)
    return Planned(
        prompts, answers, judge if part.judge is not None else None, store.accepted, part.target, same_model(recipe)
    )


class _Sum:
    """Adds requests up, by the engine's own estimate where it has one."""

    def __init__(self, engine: ChatEngine | None) -> None:
        self._estimate = getattr(engine, "estimate", None)
        self._block: list[ChatRequest] = []
        self._so_far = _Total()
        self.requests = 0

    def add(self, request: ChatRequest) -> None:
        """Take a request in."""
        self.requests += 1
        self._block.append(request)
        if len(self._block) >= _BLOCK:
            self.total()

    def total(self) -> _Total:
        """What all requests so far would take."""
        block, self._block = self._block, []
        if block:
            self._so_far = self._so_far.plus(self._of(block))
        return self._so_far

    def _of(self, block: Sequence[ChatRequest]) -> _Total:
        if self._estimate is not None:
            found = self._estimate(block)
            return _Total(found.calls, found.prompt_tokens, found.completion_tokens, found.usd)
        sizes = [sum(len(message.content.encode()) for message in request.messages) for request in block]
        return _Total(
            len(block),
            (sum(sizes) // _BYTES_A_TOKEN, sum(sizes) + _ADDED_TOKENS * len(block)),
            (len(block), sum(request.max_tokens for request in block)),
        )


class _Placeholders:
    """Stands for the teacher: a prompt that it has not written yet is as long as it may be."""

    def __init__(self, store: Store, total: _Sum) -> None:
        self._store, self.sum = store, total

    def write(self, questions: Sequence[Question]) -> list[str | None]:
        """What is stored, else a text that is unlike all others."""
        texts: list[str | None] = []
        for question in questions:
            known, text = self._store.prompt(question.key)
            if not known:
                self.sum.add(question.request)
                rng = random.Random(question.key)
                size = question.request.max_tokens
                text = " ".join(f"{rng.getrandbits(44):011x}" for _ in range(size // 12 + 1))[: max(size, 12)]
            texts.append(text)
        return texts

    def drop(self, question: Question, reason: str) -> None:
        """A stored text that is none: nothing to do."""
        del question, reason

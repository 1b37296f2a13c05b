"""Where prompts come from: a file, documents, a handful of seeds. Each kind gives them one by one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from attar.collect.generate.passages import passages, read_documents
from attar.collect.generate.similar import Unlike
from attar.collect.generate.tasks import Task, parse_prompt, with_system
from attar.data.conversations import BadRow
from attar.data.files import read_rows
from attar.data.types import Message
from attar.engines.base import ChatRequest
from attar.errors import DataError
from attar.recipe.generate import Documents, Prompts, Seeds, Writing
from attar.workspace import digest

__all__ = ["SOURCES", "TRIES", "Question", "Writer"]

TRIES = 4
"""requests made for each prompt that seeds are to grow, at most"""
# Passages that are asked about at once: few at first, so that answers come soon.
_FIRST_WAVE, _LARGEST_WAVE = 4, 64
# Of the eight prompts shown, six are the user's and two were grown (Self-Instruct, section 2.2).
_SEEDS_SHOWN, _GROWN_SHOWN = 6, 2
_NO_ANSWER = "NOT IN THE PASSAGE"


@dataclass(frozen=True)
class Question:
    """A request to write a prompt."""

    key: str
    """the same in every run, and no other request's"""
    request: ChatRequest


class Writer(Protocol):
    """Has the teacher write prompts, and remembers them."""

    def write(self, questions: Sequence[Question]) -> list[str | None]:
        """The text that each was answered with; None where it was not, which is counted."""

    def drop(self, question: Question, reason: str) -> None:
        """Count a text that is no new prompt."""


def prompts(source: Prompts, system: str | None, writer: Writer, skipped: Counter[str], seed: int) -> Iterator[Task]:
    """The user's own, each once.

    Raises:
        DataError: the file cannot be read, or a row cannot be used and the policy is to stop.
    """
    del writer, seed
    if not source.file.is_file():
        raise DataError(f"collect.generate.source.file: {source.file} is no file")
    seen: set[str] = set()
    for number, row in read_rows(source.file, "collect.generate.source.file"):
        try:
            if isinstance(row, DataError):
                raise BadRow("malformed", str(row))
            task = parse_prompt(row, system)
        except BadRow as bad:
            if source.on_bad_line == "stop":
                raise DataError(
                    f"collect.generate.source.file: {source.file.name} line {number}: {bad}; mend it, or set "
                    f"collect.generate.source.on_bad_line: skip ({bad.reason})"
                ) from bad
            skipped[bad.reason] += 1
            continue
        if task.id in seen:
            skipped["duplicate"] += 1
            continue
        seen.add(task.id)
        yield task
    if not seen:
        raise DataError(f"collect.generate.source.file: {source.file} holds no usable prompt ({dict(skipped)} skipped)")


def documents(
    source: Documents, system: str | None, writer: Writer, skipped: Counter[str], seed: int
) -> Iterator[Task]:
    """A question about each passage, to be answered from it.

    Raises:
        DataError: there is no text, or it is no UTF-8.
    """
    del skipped, seed
    pieces = (
        (name, number, passage)
        for name, text in read_documents(source.path)
        for number, passage in enumerate(passages(text, source.passage_characters))
    )
    size = _FIRST_WAVE
    while wave := list(islice(pieces, size)):
        size = min(2 * size, _LARGEST_WAVE)
        asked = [(*piece, attempt) for piece in wave for attempt in range(source.questions)]
        questions = [
            Question(f"{name}/{digest(passage)[:16]}/{attempt}", _request(source, _ask_about(source, passage), attempt))
            for name, _, passage, attempt in asked
        ]
        unlike: dict[tuple[str, int], Unlike] = {}
        for (name, number, passage, _), question, text in zip(asked, questions, writer.write(questions), strict=True):
            if text is None:
                continue
            if unlike.setdefault((name, number), Unlike(source.similarity)).add(text) is not None:
                writer.drop(question, "near duplicate")
                continue
            before = with_system(system)
            plain = (*before, Message("user", text))
            grounded = (*before, Message("user", _answer_from(passage, text)))
            yield Task(
                grounded,
                group=name,
                row={"question": text, "passage": passage, "document": name},
                meta={"document": name, "passage": number},
                taught=None if source.passage_in_example else plain,
                no_answer=_NO_ANSWER,
            )


def seeds(source: Seeds, system: str | None, writer: Writer, skipped: Counter[str], seed: int) -> Iterator[Task]:
    """The seeds themselves, then new prompts, in rounds (Self-Instruct; Wang et al., 2022, section 2.2).

    What a round is shown was decided before it began, and its prompts are taken in the order of its requests; so the
    same answers give the same prompts, whatever the order of their completion.
    """
    unlike = Unlike(source.similarity)
    for own in source.prompts:
        if unlike.add(own) is not None:
            skipped["near duplicate"] += 1
            continue
        yield Task((*with_system(system), Message("user", own)), row={"prompt": own}, meta={"grown": False})
    grown: list[str] = []
    asked = 0
    while len(grown) < source.grow and asked < TRIES * source.grow:
        size = min(source.per_round, source.grow - len(grown), TRIES * source.grow - asked)
        numbers = range(asked, asked + size)
        asked += size
        shown = list(grown)
        chosen = [_Chosen.by_chance(source, shown, random.Random(f"{seed}/{number}")) for number in numbers]
        questions = [
            Question(f"grown/{number}", _request(source, _grow(source, choice), number))
            for number, choice in zip(numbers, chosen, strict=True)
        ]
        for question, choice, text in zip(questions, chosen, writer.write(questions), strict=True):
            if text is None:
                continue
            if unlike.add(text) is not None:
                writer.drop(question, "near duplicate")
                continue
            grown.append(text)
            yield Task(
                (*with_system(system), Message("user", text)),
                row={"prompt": text},
                meta={"grown": True} | {key: value for key, value in choice.given.items() if value is not None},
            )


@dataclass(frozen=True)
class _Chosen:
    """What one request to grow a prompt is about."""

    shown: tuple[str, ...]
    given: Mapping[str, str | None]

    @classmethod
    def by_chance(cls, source: Seeds, grown: Sequence[str], rng: random.Random) -> _Chosen:
        theirs = rng.sample(grown, min(_GROWN_SHOWN, len(grown)))
        own = rng.sample(source.prompts, min(_SEEDS_SHOWN + _GROWN_SHOWN - len(theirs), len(source.prompts)))
        shown = [*own, *theirs]
        rng.shuffle(shown)
        persona = rng.choice(source.personas) if source.personas else None
        difficulty = rng.choice(source.difficulties) if source.difficulties else None
        return cls(tuple(shown), {"persona": persona, "difficulty": difficulty})


def _request(source: Writing, text: str, sample: int) -> ChatRequest:
    return ChatRequest(
        (Message("user", text),),
        max_tokens=source.max_tokens,
        temperature=source.temperature,
        sample=sample,
    )


def _grow(source: Seeds, choice: _Chosen) -> str:
    listed = "\n\n".join(f"Prompt {number}:\n{text}" for number, text in enumerate(choice.shown, start=1))
    lines = [
        "These are prompts that people gave to an assistant:",
        listed,
        "Write one more prompt that fits among these. It must differ from each of them in what it asks, not in wording "
        "alone, and hold everything that is needed to answer it.",
    ]
    if choice.given["persona"] is not None:
        lines.append(f"It is written by: {choice.given['persona']}")
    if choice.given["difficulty"] is not None:
        lines.append(f"How hard it is: {choice.given['difficulty']}")
    if source.instructions is not None:
        lines.append(source.instructions)
    lines.append("Write the prompt alone: no number, no heading, no answer.")
    return "\n\n".join(lines)


def _ask_about(source: Documents, passage: str) -> str:
    lines = [
        f"Passage:\n{passage}",
        "Write one question that a reader could ask and that this passage answers. The question must make sense to "
        "someone who does not see the passage, so name what it is about.",
    ]
    if source.instructions is not None:
        lines.append(source.instructions)
    lines.append("Write the question alone.")
    return "\n\n".join(lines)


def _answer_from(passage: str, question: str) -> str:
    return (
        f"Passage:\n{passage}\n\nAnswer the question from this passage alone. If the passage does not hold the answer, "
        f"write exactly: {_NO_ANSWER}\n\nQuestion: {question}"
    )


Reader = Callable[[Any, str | None, Writer, "Counter[str]", int], Iterator[Task]]
SOURCES: dict[str, Reader] = {"prompts": prompts, "documents": documents, "seeds": seeds}
"""kind of source -> a function of (its part of the recipe, system prompt, writer, counts of what it skips, seed)"""

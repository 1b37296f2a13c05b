"""The held-out conversations of a chat task as token ids, and the turns in them that are answered freely."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer

from attar.data.conversations import read_conversations
from attar.data.types import Conversation
from attar.engines.load import teacher_tokenizer
from attar.errors import DataError, RunError
from attar.recipe import ChatRecipe
from attar.tokens import TokenizedExample, encode_conversation
from attar.workspace import Run

__all__ = ["Cases", "Reading", "Turn", "answer_bytes", "read_cases"]

KEPT_FILE = "kept.json"
"""in an export folder whose vocabulary was trimmed: the teacher's id of each of the student's"""


@dataclass(frozen=True)
class Turn:
    """An assistant's turn: what it is asked with, and what the data answers."""

    prompt: list[int]
    reference: list[int]
    """the end-of-turn token included"""


@dataclass(frozen=True, eq=False)
class Reading:
    """The conversations as one tokenizer reads them."""

    tokenizer: Any
    examples: list[list[TokenizedExample]]
    """of each conversation, at least one"""
    turns: list[Turn]
    """that are answered freely, the same ones in every reading"""

    @property
    def tokens(self) -> int:
        """Of all examples."""
        return sum(len(example) for examples in self.examples for example in examples)


@dataclass(frozen=True, eq=False)
class Cases:
    """What every arm is asked."""

    teacher: Reading
    student: Reading
    """of base, control and student; the teacher's own where they share a vocabulary"""
    kept: list[int] | None
    """the teacher's id of each of the student's tokens; None where they are the same"""
    owner: npt.NDArray[np.int64]
    """[turns], the number of the conversation that each is from"""
    counts: Counter[str]
    """of the teacher's reading, as ``encode_conversation`` counts; ``left out``: conversations with nothing to learn"""

    @property
    def size(self) -> int:
        """Number of conversations."""
        return len(self.teacher.examples)


def read_cases(recipe: ChatRecipe, run: Run, folders: Sequence[Path]) -> Cases:
    """Read ``data/test.jsonl`` with the teacher's tokenizer and the students'.

    Args:
        recipe: the teacher, the longest conversation, and how many turns are answered freely.
        run: the data.
        folders: of all exported students.

    Raises:
        DataError: no conversation has anything to answer.
        RunError: the students do not share one vocabulary, or it is not the teacher's.
    """
    conversations, _ = read_conversations(run.path("data", "test.jsonl"), key="data/test.jsonl", on_bad_line="stop")
    counts: Counter[str] = Counter()
    limit = recipe.curate.max_tokens
    teacher = teacher_tokenizer(recipe)
    theirs = [encode_conversation(teacher, c, max_tokens=limit, counts=counts) for c in conversations]
    kept = _kept(folders)
    student, own = teacher, theirs
    if kept is not None:
        student = AutoTokenizer.from_pretrained(folders[0])
        own = [encode_conversation(student, c, max_tokens=limit) for c in conversations]
    else:
        for folder in folders:
            _check_same(folder, conversations, theirs, limit)
    usable = [i for i in range(len(conversations)) if theirs[i] and own[i]]
    counts["left out"] = len(conversations) - len(usable)
    if not usable:
        raise DataError(
            f"data/test.jsonl: none of its {len(conversations)} conversations has an answer within curate.max_tokens "
            f"({limit}); raise it"
        )
    theirs, own = [theirs[i] for i in usable], [own[i] for i in usable]
    turns, turns_own = [_turns(e, limit) for e in theirs], [_turns(e, limit) for e in own]
    chosen = _choose([min(map(len, pair)) for pair in zip(turns, turns_own, strict=True)], recipe)
    if not chosen:
        raise DataError(
            f"data/test.jsonl: every answer in it is cut off at curate.max_tokens ({limit}), so that none can be "
            "compared; raise it"
        )
    reading = Reading(teacher, theirs, [turns[case][turn] for case, turn in chosen])
    return Cases(
        teacher=reading,
        student=reading if kept is None else Reading(student, own, [turns_own[case][turn] for case, turn in chosen]),
        kept=kept,
        owner=np.array([case for case, _ in chosen], dtype=np.int64),
        counts=counts,
    )


def answer_bytes(tokenizer: Any, example: TokenizedExample) -> int:
    """Bytes of the text of the supervised tokens in UTF-8; special tokens have none."""

    def until(end: int) -> int:
        text: str = tokenizer.decode(
            example.ids[:end].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return len(text.encode())

    return sum(until(end) - until(start) for start, end in _runs(example))


def _kept(folders: Sequence[Path]) -> list[int] | None:
    found = {f.read_text("utf-8") if (f := folder / KEPT_FILE).is_file() else None for folder in folders}
    if len(found) > 1:
        raise RunError(
            f"{KEPT_FILE} differs between {', '.join(map(str, folders))}, so their tokens are not the same; delete the "
            "export folder and run again"
        )
    text = found.pop()
    kept: list[int] | None = None if text is None else json.loads(text)
    return kept


def _check_same(
    folder: Path, conversations: Sequence[Conversation], wanted: list[list[TokenizedExample]], limit: int
) -> None:
    """Without a map of ids, the students' must be the teacher's."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for conversation, examples in zip(conversations, wanted, strict=True):
        own = encode_conversation(tokenizer, conversation, max_tokens=limit)
        if [e.ids.tolist() for e in own] != [e.ids.tolist() for e in examples]:
            raise RunError(
                f"the tokenizer in {folder} reads conversation {conversation.id} as other tokens than the teacher's, "
                f"and there is no {KEPT_FILE} that says which are which; give the student the teacher's tokenizer"
            )


def _runs(example: TokenizedExample) -> list[tuple[int, int]]:
    """Stretches of supervised tokens: [start, end)."""
    edges = np.flatnonzero(np.diff(example.supervised.astype(np.int8), prepend=0, append=0))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _turns(examples: Sequence[TokenizedExample], limit: int) -> list[Turn]:
    """The turns of a conversation. One that ends at the limit may have been cut off there and is left out."""
    turns = []
    for example in examples:
        ids = example.ids.tolist()
        turns += [Turn(ids[:start], ids[start:end]) for start, end in _runs(example) if end < limit]
    return turns


def _choose(available: Sequence[int], recipe: ChatRecipe) -> list[tuple[int, int]]:
    """Conversation and turn of those that are answered: one of each conversation, then a second, ...; by the seed."""
    rng = random.Random(recipe.run.seed)
    order = [(case, rng.sample(range(turns), turns)) for case, turns in enumerate(available)]
    rng.shuffle(order)
    rounds = range(max(available))
    drawn = [(case, turns[number]) for number in rounds for case, turns in order if number < len(turns)]
    return sorted(drawn[: recipe.evaluate.answers])

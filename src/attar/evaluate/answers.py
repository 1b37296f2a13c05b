"""What an arm writes freely, greedily, in held-out turns: asked through the engine that serves it, and compared."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from attar.engines.base import Written
from attar.evaluate.cases import Cases, Reading
from attar.evaluate.speed import Subject

__all__ = [
    "GGUF_FILE",
    "Answers",
    "Served",
    "Writer",
    "compare",
    "open_subject",
    "open_writer",
    "plain_text",
    "subject_arguments",
]

Floats = npt.NDArray[np.float64]
GGUF_FILE = "model.gguf"


class Writer(Protocol):
    """An engine that continues token ids."""

    @property
    def parameters(self) -> int | None:
        """Number of parameters."""

    def write(self, ids: Sequence[int], max_tokens: int, *, measured: bool = False) -> Written:
        """Continue token ids greedily; ``measured``: exactly so many, past any end, from an empty cache."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """How an arm is served: plain data, so that it can be handed to another process."""

    engine: Literal["llama.cpp", "transformers", "server"]
    model: str
    """a GGUF file, what ``load_local`` takes, or a server's name for it"""
    tokenizer: str
    """a folder"""
    dtype: str
    """of ``transformers``"""
    device: Literal["auto", "cpu", "cuda", "mps"]
    threads: int | None
    context_tokens: int
    """of ``llama.cpp``: the longest prompt with its answer"""
    teacher: dict[str, Any] | None = None
    """of ``server``: the recipe's teacher, as plain data"""


def open_writer(how: Served) -> Writer:
    """Load an arm's engine.

    Raises:
        ModelError: it cannot be loaded.
        MissingExtra: ``xllamacpp``, or ``openai``, is not installed.
        Stopped: the server does not answer.
    """
    if how.engine == "server":
        from transformers import AutoTokenizer

        from attar.engines.served import load_served
        from attar.recipe.chat import ChatTeacher
        from attar.signals.served import vocabulary_size

        teacher = ChatTeacher.model_validate(how.teacher)
        return load_served(teacher, vocabulary_size(AutoTokenizer.from_pretrained(how.tokenizer)))
    if how.engine == "llama.cpp":
        from transformers import AutoTokenizer

        from attar.engines.gguf import load_gguf

        return load_gguf(
            how.model,
            tokenizer=AutoTokenizer.from_pretrained(how.tokenizer),
            context_tokens=how.context_tokens,
            threads=how.threads or os.cpu_count(),
        )
    from attar.engines.local import load_local, resolve_device

    return load_local(how.model, dtype=how.dtype, device=resolve_device(how.device))


class _Subject:
    def __init__(self, writer: Writer, tokens: int) -> None:
        self._writer, self._tokens = writer, tokens
        self.parameters = writer.parameters

    def answer(self, requests: Sequence[list[int]]) -> list[float]:
        return [written.first_token_ms for written in map(self._write, requests)]

    def _write(self, ids: list[int]) -> Written:
        return self._writer.write(ids, self._tokens, measured=True)


class _ServedSubject(_Subject):
    """Several requests at once are what a server is for."""

    def __init__(self, writer: Any, tokens: int) -> None:
        super().__init__(writer, tokens)
        self._each = writer.each

    def answer(self, requests: Sequence[list[int]]) -> list[float]:
        return [written.first_token_ms for written in self._each(self._write, requests)]


def open_subject(arguments: dict[str, Any]) -> Subject:
    """What ``attar.evaluate.speed`` measures: ``served`` as a dict, and ``tokens``, how many each request is answered
    with. All arms write as many, past any end, so that a model that says less is not taken for a faster one.
    """
    import torch

    how = Served(**arguments["served"])
    torch.set_num_threads(how.threads or os.cpu_count() or 1)
    kind = _ServedSubject if how.engine == "server" else _Subject
    return kind(open_writer(how), arguments["tokens"])


def subject_arguments(how: Served, tokens: int) -> dict[str, Any]:
    """What ``open_subject`` takes."""
    return {"served": asdict(how), "tokens": tokens}


@dataclass(frozen=True, eq=False)
class Answers:
    """How an arm's answers compare, by conversation; turns of one conversation are averaged."""

    greedy_exact: Floats
    """[seeds, conversations asked]: the teacher's greedy answer, token for token"""
    greedy_prefix: Floats
    """[seeds, conversations asked]: the tokens that both begin with, as a share of the longer answer"""
    exact_match: Floats | None
    """[seeds, conversations with a short reference]: the reference, white space aside; None where none is short"""


def compare(
    cases: Cases, reading: Reading, answers: Sequence[list[list[int]]], teacher: list[list[int]], max_tokens: int
) -> Answers:
    """Compare an arm's answers with the teacher's and with the references.

    Only a reference of at most ``max_tokens`` tokens, its end included, can be matched; longer ones are left out.

    Args:
        cases: whose turns they are.
        reading: the arm's.
        answers: of each seed, ids of the arm's tokenizer.
        teacher: ids of the teacher's.
        max_tokens: the longest answer that was allowed.
    """
    kept = None if reading is cases.teacher else cases.kept
    exact, prefix, match = [], [], []
    short = np.array([len(turn.reference) <= max_tokens for turn in cases.teacher.turns])
    for of_seed in answers:
        same = [ids if kept is None else [kept[i] for i in ids] for ids in of_seed]
        exact.append([float(mine == theirs) for mine, theirs in zip(same, teacher, strict=True)])
        prefix.append([_shared(mine, theirs) for mine, theirs in zip(same, teacher, strict=True)])
        match.append(
            [
                float(plain_text(reading.tokenizer, ids) == plain_text(reading.tokenizer, turn.reference))
                for ids, turn in zip(of_seed, reading.turns, strict=True)
            ]
        )
    return Answers(
        greedy_exact=_by_conversation(exact, cases.owner),
        greedy_prefix=_by_conversation(prefix, cases.owner),
        exact_match=_by_conversation(np.array(match)[:, short], cases.owner[short]) if short.any() else None,
    )


def plain_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of an answer, without special tokens, runs of white space as one space."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return " ".join(text.split())


def _shared(one: Sequence[int], other: Sequence[int]) -> float:
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return same / max(len(one), len(other))


def _by_conversation(values: npt.ArrayLike, owner: npt.NDArray[np.int64]) -> Floats:
    """Means by owner, [seeds, owners], of values [seeds, turns]."""
    _, place = np.unique(owner, return_inverse=True)
    sums = np.stack([np.bincount(place, weights=row) for row in np.asarray(values, dtype=np.float64)])
    means: Floats = sums / np.bincount(place)
    return means

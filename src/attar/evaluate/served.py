"""How a served teacher reads the held-out conversations, and arms against what it shows: its k likeliest tokens.

Its own next-token accuracy and loss are exact, as its server says what it gives to the token that stands there. The
divergence of an arm from it is that of the coarsened distributions, the k tokens and one bucket of all others, which is
at most the full one (the data-processing inequality).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attar.engines.served import PromptTop, ServedTeacher, load_served
from attar.evaluate.cases import Reading, answer_bytes
from attar.evaluate.language import COLUMNS, Floats, States, finite
from attar.losses import Divergence, Head
from attar.losses.divergences import soften
from attar.losses.sparse import TopKTerm, sparse_divergence
from attar.progress import Step
from attar.recipe import ChatRecipe
from attar.signals.served import check_lengths, supervised_places, top_k_of, vocabulary_size
from attar.signals.sparse import logit_chunks
from attar.tokens import TokenizedExample
from attar.workspace import digest, write_atomic

__all__ = ["ServedReads", "read_served", "read_server", "shown_entries"]

_TOKENS, _CORRECT, _AGREED, _KL, _NLL, _BYTES, _OUTSIDE = range(len(COLUMNS))


def shown_entries(recipe: ChatRecipe) -> int:
    """How many tokens a served teacher is asked for at a position."""
    signals = recipe.distill.signals
    return signals.entries if signals.kind == "top_k" else ServedTeacher.limits.entries


class ServedReads:
    """What a served teacher says of examples, asked once and kept in a folder, so that every arm may read it.

    Args:
        recipe: names the teacher.
        tokenizer: its.
        folder: a file for each example.
    """

    def __init__(self, recipe: ChatRecipe, tokenizer: Any, folder: Path) -> None:
        self._recipe, self._folder = recipe, folder
        self.vocabulary = vocabulary_size(tokenizer)
        self._entries = shown_entries(recipe)

    def __call__(self, example: TokenizedExample) -> PromptTop:
        """At its supervised tokens."""
        with np.load(self._path(example), allow_pickle=False) as stored:
            return PromptTop(stored["ids"], stored["log_probs"], stored["own"], {})

    def prepare(self, reading: Reading) -> None:
        """Ask about all examples that there is nothing of.

        Raises:
            CapabilityError, ModelError, RunError, Stopped: see ``ServedTeacher.prompt_top``.
        """
        missing = [e for of_one in reading.examples for e in of_one if not self._path(e).exists()]
        if not missing:
            return
        engine = load_served(self._recipe.teacher, self.vocabulary)
        try:
            check_lengths(engine, missing)

            def ask(example: TokenizedExample) -> PromptTop:
                return engine.prompt_top(example.ids.tolist(), supervised_places(example), self._entries)

            for example, found in zip(missing, engine.each(ask, missing), strict=True):
                content = io.BytesIO()
                np.savez(content, ids=found.ids, log_probs=found.log_probs, own=found.own)
                write_atomic(self._path(example), content.getvalue())
        finally:
            engine.close()

    def _path(self, example: TokenizedExample) -> Path:
        name = digest([example.ids.tolist(), example.supervised.tolist(), self._entries])[:32]
        return self._folder / f"{name}.npz"


def read_server(reading: Reading, teacher: ServedReads, step: Step) -> Floats:
    """The teacher's own sums, [conversations, COLUMNS]."""
    teacher.prepare(reading)
    table = np.zeros((len(reading.examples), len(COLUMNS)))
    for row, examples in zip(table, reading.examples, strict=True):
        for example in examples:
            found, targets = teacher(example), example.ids[example.supervised]
            row[_TOKENS] += len(targets)
            row[_AGREED] += len(targets)
            row[_CORRECT] += int((found.ids[:, 0] == targets).sum())
            row[_NLL] -= found.own.sum()
            row[_BYTES] += answer_bytes(reading.tokenizer, example)
        step.advance()
    return finite(table)


@torch.inference_mode()
def read_served(reading: Reading, states: States, head: Head, teacher: ServedReads, step: Step) -> Floats:
    """The sums of an arm of the teacher's own vocabulary, [conversations, COLUMNS].

    Args:
        reading: the conversations, as teacher and arm read them.
        states: of the arm.
        head: of the arm.
        teacher: what it is compared with.
        step: advanced by conversations.

    Raises:
        RunError: a probability is not a number.
    """
    teacher.prepare(reading)
    table = np.zeros((len(reading.examples), len(COLUMNS)))
    for row, examples in zip(table, reading.examples, strict=True):
        for example in examples:
            signal = top_k_of(teacher(example), teacher.vocabulary)
            targets = torch.from_numpy(example.ids[example.supervised]).long()
            row[_TOKENS] += len(targets)
            row[_BYTES] += answer_bytes(reading.tokenizer, example)
            start = 0
            for chunk in logit_chunks(states(example), head):
                logits, rows = chunk.cpu(), slice(start, start + len(chunk))
                best = logits.argmax(-1)
                term = TopKTerm(
                    Divergence("forward_kl"), signal.ids[rows], signal.log_probs[rows], signal.log_tail[rows]
                )
                row[_CORRECT] += int((best == targets[rows]).sum())
                row[_AGREED] += int((best == signal.ids[rows, 0]).sum())
                # Rounding can leave about -1e-7 where the two agree.
                row[_KL] += float(sparse_divergence(logits, term).clamp(min=0).double().sum())
                row[_NLL] -= float(soften(logits).logs.gather(1, targets[rows, None]).double().sum())
                start += len(chunk)
        step.advance()
    return finite(table)

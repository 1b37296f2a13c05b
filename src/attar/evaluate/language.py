"""How a causal language model reads the held-out conversations: its distributions against the teacher's, its loss.

Everything stands at supervised tokens, and is summed by conversation: a conversation is the case that estimates
resample. Logits are built for one chunk of tokens at a time.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attar.engines.heads import check_head, head_of, hidden_states
from attar.engines.load import load_teacher
from attar.engines.local import LocalEngine, load_local, resolve_device
from attar.errors import CapabilityError, RunError
from attar.evaluate.cases import Reading, answer_bytes
from attar.evaluate.stats import Estimate, mean_estimate, paired_ratio
from attar.losses import Divergence, Head
from attar.losses.divergences import soften
from attar.progress import Step
from attar.recipe import ChatRecipe
from attar.signals.sparse import logit_chunks
from attar.tokens import TokenizedExample
from attar.workspace import digest, write_atomic

__all__ = ["COLUMNS", "States", "TeacherStates", "estimates", "finite", "load_student", "read", "shares", "states_of"]

Floats = npt.NDArray[np.float64]
States = Callable[[TokenizedExample], Tensor]
"""From an example to the states [supervised tokens, width] that predict its supervised tokens."""

COLUMNS = ("tokens", "correct", "agreed", "kl", "nll", "bytes", "outside")
"""Of a table, sums over a conversation's supervised tokens: how many there are; where the most likely token is the
reference's, and the teacher's; KL(teacher || arm) and the reference's negative log-likelihood, both in nats; bytes of
their text; the teacher's probability of tokens that the student's vocabulary does not have."""
_TOKENS, _CORRECT, _AGREED, _KL, _NLL, _BYTES, _OUTSIDE = range(len(COLUMNS))


def states_of(model: Any) -> States:
    """The states of a model at the input of its head."""

    def states(example: TokenizedExample) -> Tensor:
        ids = torch.from_numpy(example.ids).long()[None].to(model.device)
        # The state at i - 1 predicts token i.
        before = torch.from_numpy(np.flatnonzero(example.supervised) - 1).to(model.device)
        return hidden_states(model, input_ids=ids)[0, before]

    return states


def load_student(recipe: ChatRecipe, folder: Path) -> LocalEngine:
    """An exported student; its head is checked."""
    engine = load_local(f"hf:{folder}", device=resolve_device(recipe.run.device))
    check_head(engine.model, engine.tokenizer)
    return engine


class TeacherStates:
    """The teacher's states, computed once for each example and kept in a folder, so that every arm may read them.

    Args:
        recipe: names the teacher, which is loaded when something of it is wanted first.
        folder: a file for each example, float32, which holds float16 and bfloat16 as they are.
    """

    def __init__(self, recipe: ChatRecipe, folder: Path) -> None:
        self._recipe = recipe
        self._folder = folder

    @cached_property
    def _engine(self) -> LocalEngine:
        engine = load_teacher(self._recipe)
        if not isinstance(engine, LocalEngine):
            raise CapabilityError(
                f"teacher.model: {self._recipe.teacher.model} shows no states of its last layer, from which its "
                "distributions follow; use hf:FOLDER"
            )
        check_head(engine.model, engine.tokenizer)
        return engine

    @cached_property
    def head(self) -> Head:
        """What turns its states into logits."""
        return head_of(self._engine.model, self._engine.tokenizer)

    def __call__(self, example: TokenizedExample) -> Tensor:
        """The states [supervised tokens, width]."""
        path = self._folder / f"{digest([example.ids.tolist(), example.supervised.tolist()])[:32]}.npy"
        model = self._engine.model
        if not path.exists():
            content = io.BytesIO()
            np.save(content, states_of(model)(example).float().cpu().numpy(), allow_pickle=False)
            write_atomic(path, content.getvalue())
        return torch.from_numpy(np.load(path, allow_pickle=False)).to(model.device, model.dtype)


@torch.inference_mode()
def read(
    reading: Reading, states: States, head: Head, teacher: TeacherStates, kept: list[int] | None, step: Step
) -> Floats:
    """The sums of an arm, [conversations, COLUMNS].

    Where the vocabulary was trimmed, the teacher reads the arm's tokens under its own ids; the KL is from its
    distribution over the kept tokens, and what it gives to others is a column of its own. Its most likely token is one
    of its whole vocabulary.

    Args:
        reading: the conversations as the arm's tokenizer reads them.
        states: of the arm.
        head: of the arm.
        teacher: of the same vocabulary, or of more.
        kept: the teacher's id of each of the arm's tokens; None where they are the same.
        step: advanced by conversations.

    Raises:
        RunError: the vocabularies do not fit, or a probability is not a number.
    """
    device = head.weight.device
    theirs = teacher.head.size
    index = torch.arange(theirs, device=device) if kept is None else torch.tensor(kept, device=device)
    if len(index) != head.size:
        raise RunError(
            f"the teacher's vocabulary has {theirs} tokens, {len(index)} of them the student's, and the student's head "
            f"{head.size} rows; wanted as many: give it the teacher's tokenizer, or delete the export folder and run "
            "again"
        )
    own_id = torch.full((theirs,), -1, device=device)
    own_id[index] = torch.arange(len(index), device=device)
    their_id = index.cpu().numpy().astype(np.int32)
    table = np.zeros((len(reading.examples), len(COLUMNS)))
    for row, examples in zip(table, reading.examples, strict=True):
        for example in examples:
            row[_BYTES] += answer_bytes(reading.tokenizer, example)
            targets = torch.from_numpy(example.ids[example.supervised]).long().to(device)
            same = TokenizedExample(example.id, their_id[example.ids], example.supervised)
            pairs = zip(logit_chunks(states(example), head), logit_chunks(teacher(same), teacher.head), strict=True)
            start = 0
            for logits, wanted in pairs:
                row += _chunk(logits, wanted.to(device), targets[start : start + len(logits)], index, own_id)
                start += len(logits)
        step.advance()
    return finite(table)


def finite(table: Floats) -> Floats:
    """The table.

    Raises:
        RunError: a number in it is not finite.
    """
    if not np.isfinite(table).all():
        bad = int((~np.isfinite(table)).any(1).argmax())
        values = dict(zip(COLUMNS, table[bad].tolist(), strict=True))
        raise RunError(
            f"reading held-out conversation {bad} gave {values}, which is not finite; the model's weights are broken: "
            "lower train.learning_rate, or set train.precision: float32, and train again"
        )
    return table


def _chunk(logits: Tensor, wanted: Tensor, targets: Tensor, index: Tensor, own_id: Tensor) -> Floats:
    """The sums over some tokens, from logits [tokens, vocabulary] of the arm and [tokens, teacher's] of the teacher."""
    arm = soften(logits)
    best = logits.argmax(-1)
    agreed = best == own_id[wanted.argmax(-1)]
    outside = torch.zeros(len(logits), device=logits.device)
    if len(index) < wanted.shape[1]:
        outside = 1 - wanted.softmax(-1)[:, index].sum(-1)
        wanted = wanted[:, index]
    kl = Divergence("forward_kl").function.parts(soften(wanted), arm)[0].sum(-1)
    nll = -arm.logs.gather(1, targets[:, None])[:, 0]
    sums = torch.zeros(len(COLUMNS), dtype=torch.float64)
    sums[_TOKENS] = len(logits)
    sums[_CORRECT] = int((best == targets).sum())
    sums[_AGREED] = int(agreed.sum())
    # Rounding can leave about -1e-7 where the two agree.
    for column, values in ((_KL, kl.clamp(min=0)), (_NLL, nll), (_OUTSIDE, outside.clamp(min=0))):
        sums[column] = values.double().sum().cpu()
    return sums.numpy()


def shares(tables: Floats, column: str) -> Floats:
    """A column of tables [seeds, conversations, COLUMNS] as a share of each conversation's tokens."""
    share: Floats = tables[..., COLUMNS.index(column)] / tables[..., _TOKENS]
    return share


def estimates(tables: Floats, bootstrap: dict[str, Any]) -> dict[str, Estimate | None]:
    """What tables [seeds, conversations, COLUMNS] say, with intervals over conversations.

    Returns:
        ``kl_to_teacher``, nats a token, and ``bits_per_byte``, both of all tokens together; ``top1_agreement``, the
        mean over conversations. ``bits_per_byte`` counts what the end of an answer costs; it is None where the
        answers have no text.
    """
    tokens, text = tables[..., _TOKENS], tables[..., _BYTES]
    return {
        "kl_to_teacher": paired_ratio(tables[..., _KL], tokens, **bootstrap),
        "bits_per_byte": paired_ratio(tables[..., _NLL] / np.log(2), text, **bootstrap) if text.any() else None,
        "top1_agreement": mean_estimate(shares(tables, "agreed"), **bootstrap),
    }

"""Before a served teacher is asked about everything: that what it says is what it is taken for.

Where its weights are at hand, a few examples are scored both ways. Where they are not, what can be told from the
answers alone is checked: that the same ids give the same numbers twice, and that the server's ids mean the tokenizer's
tokens. (That a row's probabilities are in order of rank and sum to 1 at most, and that the server reads the very ids
that it is given, is checked of every answer.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch

from attar.engines.heads import check_head, head_of, hidden_states
from attar.engines.load import tokenizer_place
from attar.engines.local import load_local, resolve_device
from attar.engines.served import PromptTop, ServedTeacher
from attar.errors import CapabilityError, ModelError, RunError
from attar.recipe import ChatRecipe
from attar.signals.served import supervised_places
from attar.signals.sparse import logit_chunks
from attar.tokens import TokenizedExample

__all__ = ["check_parity", "describe", "parity_weights"]

_EXAMPLES = 4
# Entries of a smaller probability than this are not compared: they weigh little, and rounding moves them most.
_COMPARED = 1e-2
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# Largest difference in log-probability between server and weights, by the format that the weights compute in.
TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.25, torch.float16: 0.05}
# Largest difference between two answers about the same ids: batches of other shapes round otherwise.
TWICE = 0.1


def parity_weights(recipe: ChatRecipe) -> str | None:
    """Where the teacher's weights are, ``hf:FOLDER``; None where they are not, or are not to be used."""
    teacher = recipe.teacher
    if teacher.parity is not None:
        return None if teacher.parity == "internal" else teacher.parity
    folder = tokenizer_place(recipe)
    return teacher.tokenizer if any(next(folder.glob(pattern), None) for pattern in _WEIGHTS) else None


def check_parity(
    recipe: ChatRecipe, engine: ServedTeacher, tokenizer: Any, examples: Sequence[TokenizedExample], entries: int
) -> dict[str, Any]:
    """Compare what the server says of a few examples with the weights, or with itself.

    Args:
        recipe: says where the weights are.
        engine: the server.
        tokenizer: the teacher's.
        examples: a few are asked about, of all lengths but the greatest.
        entries: how many at a position.

    Returns:
        What was compared, over how many tokens, the largest difference in nats, and the tolerance.

    Raises:
        RunError: the numbers disagree; both are told.
        ModelError: the server's ids are not the tokenizer's tokens.
        CapabilityError: the weights do not fit into memory.
    """
    ordered = sorted(examples, key=len)
    few = [ordered[i] for i in sorted({len(ordered) * part // _EXAMPLES for part in range(_EXAMPLES)})]

    def asked(example: TokenizedExample) -> PromptTop:
        return engine.prompt_top(example.ids.tolist(), supervised_places(example), entries)

    first = list(engine.each(asked, few))
    _check_words(engine, tokenizer, first)
    weights = parity_weights(recipe)
    if weights is None:
        # One after the other, and the other way round: another batch than before.
        second = [asked(example) for example in reversed(few)][::-1]
        wanted, tolerance, what = [_by_id(again, of) for again, of in zip(second, first, strict=True)], TWICE, "itself"
    else:
        wanted, tolerance = _local(recipe, weights, tokenizer, few, first)
        what = weights
    worst = 0.0
    for example, found, other in zip(few, first, wanted, strict=True):
        worst = max(worst, _compare(engine, example, found, other, tolerance, what))
    return {
        "against": what,
        "tokens": sum(len(found.ids) for found in first),
        "largest_difference": round(worst, 6),
        "tolerance": tolerance,
    }


def describe(parity: dict[str, Any]) -> str:
    """What was compared, in words."""
    return (
        f"at {parity['tokens']} tokens the server and {parity['against']} are at most "
        f"{parity['largest_difference']:.2g} nats apart, {parity['tolerance']:g} allowed"
    )


def _compare(
    engine: ServedTeacher,
    example: TokenizedExample,
    found: PromptTop,
    wanted: npt.NDArray[np.float64],
    tolerance: float,
    what: str,
) -> float:
    """The largest difference among entries that count, of either side."""
    counts = (found.ids >= 0) & (np.maximum(found.log_probs, wanted) >= np.log(_COMPARED))
    with np.errstate(invalid="ignore"):
        apart = np.where(counts, np.abs(found.log_probs - wanted), 0.0)
    worst = float(apart.max(initial=0.0))
    if worst <= tolerance:
        return worst
    row, column = np.unravel_index(int(np.nan_to_num(apart, nan=np.inf).argmax()), apart.shape)
    place, token = supervised_places(example)[row], int(found.ids[row, column])
    if what == "itself":
        said = f"gives it {found.log_probs[row, column]:.4f} and, asked again, {wanted[row, column]:.4f}"
        cure = "its numbers cannot be kept as signals; look for what changes in the server"
    else:
        said = f"gives it {found.log_probs[row, column]:.4f} and {what} {wanted[row, column]:.4f}"
        cure = (
            "the server has other weights, or computes in a coarser format (start it with --dtype float32, or set "
            "teacher.dtype to its own), or reads other tokens"
        )
    raise RunError(
        f"parity: the log-probability of token {token} at position {place} of example {example.id}: {engine.name} "
        f"{said}; at most {tolerance:g} apart wanted: {cure}"
    )


def _by_id(again: PromptTop, of: PromptTop) -> npt.NDArray[np.float64]:
    """The log-probabilities of one answer in the order of another's ids; -inf for an id that it does not list."""
    same = again.ids[:, None, :] == of.ids[:, :, None]
    return np.where(same.any(-1), np.take_along_axis(again.log_probs, same.argmax(-1), 1), -np.inf)


def _check_words(engine: ServedTeacher, tokenizer: Any, answers: Sequence[PromptTop]) -> None:
    """The server's text of an id is the tokenizer's, but for halves of characters and white space at the ends."""
    words = {token: word for answer in answers for token, word in answer.words.items()}
    for token, theirs in sorted(words.items()):
        if token >= engine.vocabulary:
            continue
        ours = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = "\ufffd" not in theirs + ours and theirs.strip() and ours.strip()
        if whole and theirs.strip() != ours.strip():
            raise ModelError(
                f"token {token} is {theirs!r} for {engine.name} and {ours!r} for teacher.tokenizer; name the tokenizer "
                "of the model that is served"
            )


@torch.no_grad()
def _local(
    recipe: ChatRecipe, weights: str, tokenizer: Any, examples: Sequence[TokenizedExample], found: Sequence[PromptTop]
) -> tuple[list[npt.NDArray[np.float64]], float]:
    """Log-probabilities of the same entries from the weights; and the tolerance of their number format."""
    folder = Path(weights.removeprefix("hf:")).expanduser()
    stored = sum(path.stat().st_size for pattern in _WEIGHTS for path in folder.glob(pattern))
    free = psutil.virtual_memory().available
    if stored > free:
        raise CapabilityError(
            f"parity: {folder} holds {stored / 1e9:.1f} GB of weights, and {free / 1e9:.1f} GB of memory are free; set "
            "teacher.parity: internal, which compares the server with itself"
        )
    local = load_local(weights, dtype=recipe.teacher.dtype, device=resolve_device(recipe.run.device))
    check_head(local.model, tokenizer)
    head = head_of(local.model, tokenizer)
    tables = []
    for example, answer in zip(examples, found, strict=True):
        ids = torch.from_numpy(example.ids).long()[None].to(local.model.device)
        before = torch.tensor(supervised_places(example), device=local.model.device) - 1
        states = hidden_states(local.model, input_ids=ids)[0, before]
        logs = torch.cat([logits.double().log_softmax(-1).cpu() for logits in logit_chunks(states, head)])
        picked = logs.gather(1, torch.from_numpy(np.maximum(answer.ids, 0)))
        tables.append(picked.numpy())
    return tables, TOLERANCE[local.model.dtype]

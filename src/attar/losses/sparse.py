"""Divergences from sparse teacher signals: the k best entries and the mass of the rest, or an unbiased sample.

Both hold a teacher's distribution at the one temperature at which it was stored: the entries that are missing cannot
be softened again. The teacher's side is prepared once a call, as [n, k + 1] numbers; of the student's side a chunk
takes the distributions that terms share, and one [chunk, vocabulary] tensor, which leaves as the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attar.losses.divergences import divergence_and_gradient
from attar.losses.kinds import Distribution, Divergence
from attar.losses.terms import ChunkLoss, Softened, Term, at_least_float32

__all__ = ["ABSENT", "SampledTerm", "TopKTerm", "sparse_divergence"]

ABSENT = -1
"""The id of an entry that a row does not have: rows may be ragged."""

EXCESS = 1e-2
"""How far the logarithm of a row's sum may be from 0, as rounded log-probabilities may be."""

FAINT = 1e-30
"""Below this mass the sum of the rest's probabilities is no longer exact in float32; logarithms are."""


@dataclass(frozen=True, eq=False)
class TopKTerm:
    """The divergence of the coarsened distributions: the teacher's k best entries, and one bucket of all the rest.

    By the data-processing inequality it is at most the full divergence; it is a divergence itself: 0 where the two
    agree on the k entries and the bucket, never negative. A loss on the k entries alone is neither. Within the bucket
    the student is left as it is: what the bucket's mass lacks or has in excess is spread in proportion to its own
    probabilities. With all the vocabulary listed it is the dense divergence.

    Args:
        divergence: which; its temperature must be ``temperature``.
        ids: [n, k], long, in [0, vocabulary) and without repetition in a row, or -1 for no entry.
        log_probs: [n, k], nats, the teacher's log-probabilities, softened by ``temperature``; -inf for 0.
        log_tail: [n], nats, the logarithm of the mass of all other entries, -inf for 0; None for that of 1 - the sum
            of the probabilities. Rows are divided by their sum with it, within 1 % of 1, so that rounding does no harm.
        temperature: the one at which the signal was stored.
        weights: [n], at least 0 or bool; a token of weight 0 is ignored. None for 1 everywhere.
        denominator: above 0; None for the sum of the weights in this call.
        coefficient: finite and at least 0.

    Raises:
        ValueError: another temperature than the stored one, or shapes that do not fit.
    """

    divergence: Divergence
    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor | None = None
    temperature: float = 1.0
    weights: Tensor | None = None
    denominator: Tensor | float | None = None
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        _check_temperature("top-k", self.divergence, self.temperature)
        tail = self.ids.shape[:1] if self.log_tail is None else self.log_tail.shape
        if self.ids.dim() != 2 or self.log_probs.shape != self.ids.shape or tail != self.ids.shape[:1]:
            raise ValueError(
                f"ids has shape {tuple(self.ids.shape)}, log_probs {tuple(self.log_probs.shape)} and log_tail "
                f"{tuple(tail)}; wanted [n, k], [n, k] and [n]"
            )

    def prepare(self, tokens: int, vocabulary: int) -> tuple[Tensor | None, ChunkLoss]:
        """The teacher's k + 1 buckets, once for all chunks."""
        ids, present = _checked_ids(self.ids, self.weights, tokens, vocabulary)
        full = present.sum(dim=-1) == vocabulary
        buckets = _buckets(self.log_probs.detach(), self.log_tail, present, full)

        def chunk(student: Softened, rows: slice) -> tuple[Tensor, Tensor]:
            shared = student.at(self.divergence.temperature)
            teacher = buckets[rows].to(shared.logs.dtype)
            coarse, rest, mass = _coarsen(shared, ids[rows], present[rows])
            values, gradient = divergence_and_gradient(
                Distribution(coarse, coarse.exp()), Distribution(teacher, teacher.exp()), self.divergence
            )
            # The bucket's logit is the logsumexp of the rest's, whose gradient is the rest's own softmax.
            rest.mul_(gradient[:, -1:] / mass)
            # An absent entry's is 0.
            rest.scatter_add_(1, ids[rows], gradient[:, :-1])
            return values, rest

        return self.weights, chunk


@dataclass(frozen=True, eq=False)
class SampledTerm:
    """The forward KL from an unbiased sample of the teacher's distribution.

    With E[w] = p for the sparse vector w of a token's sample, sum w (-log q) - H(p) is an unbiased estimate of
    KL(p || q), and its gradient, q sum(w) - w, one of q - p (Anshumann et al. 2025, arXiv:2503.16870, whose sample is
    drawn with replacement). A value may be negative; its mean over draws is not. Other divergences are not linear in
    p, so a sample of p estimates them with a bias.

    Args:
        divergence: forward KL; its temperature must be ``temperature``.
        ids: [n, m], long, in [0, vocabulary), or -1 for no entry.
        entry_weights: [n, m], w: what stands for the probability, softened by ``temperature``, of the entry.
        entropy: [n], nats, H(p) of the teacher at ``temperature``. It moves the value only, not the gradient.
        temperature: the one at which the signal was stored.
        weights: [n], at least 0 or bool; a token of weight 0 is ignored. None for 1 everywhere.
        denominator: above 0; None for the sum of the weights in this call.
        coefficient: finite and at least 0.

    Raises:
        ValueError: another divergence than the forward KL, another temperature than the stored one, or shapes that do
            not fit.
    """

    divergence: Divergence
    ids: Tensor
    entry_weights: Tensor
    entropy: Tensor
    temperature: float = 1.0
    weights: Tensor | None = None
    denominator: Tensor | float | None = None
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        if self.divergence.kind != "forward_kl":
            raise ValueError(
                f"divergence is {self.divergence.kind}, and a sampled signal is an unbiased estimate of the forward KL "
                "only; wanted forward_kl, or a top-k signal"
            )
        _check_temperature("sampled", self.divergence, self.temperature)
        if (
            self.ids.dim() != 2
            or self.entry_weights.shape != self.ids.shape
            or self.entropy.shape != self.ids.shape[:1]
        ):
            raise ValueError(
                f"ids has shape {tuple(self.ids.shape)}, entry_weights {tuple(self.entry_weights.shape)} and entropy "
                f"{tuple(self.entropy.shape)}; wanted [n, m], [n, m] and [n]"
            )

    def prepare(self, tokens: int, vocabulary: int) -> tuple[Tensor | None, ChunkLoss]:
        """The value needs the student at the sampled ids only, the gradient a multiple of its probabilities."""
        ids, present = _checked_ids(self.ids, self.weights, tokens, vocabulary, unique=False)
        entries = self.entry_weights.detach().masked_fill(~present, 0.0)
        entropy = self.entropy.detach()
        temperature = self.divergence.temperature

        def chunk(student: Softened, rows: slice) -> tuple[Tensor, Tensor]:
            logs, probabilities = student.at(temperature)
            w = entries[rows].to(logs.dtype)
            # An entry without weight may be one that the student rules out: 0 * inf.
            cross = (w * logs.gather(1, ids[rows])).masked_fill_(w == 0, 0.0).sum(dim=-1)
            gradient = probabilities * (temperature * w.sum(dim=-1, keepdim=True))
            gradient.scatter_add_(1, ids[rows], w.mul(-temperature))
            return (cross + entropy[rows].to(logs.dtype)).mul_(-(temperature**2)), gradient

        return self.weights, chunk


def sparse_divergence(student_logits: Tensor, term: Term) -> Tensor:
    """The values of a term on logits that are there anyway, in place of hidden states and a head.

    Args:
        student_logits: [n, vocabulary], floating point.
        term: a ``TopKTerm`` or ``SampledTerm`` of the same n. Its denominator and coefficient are not used.

    Returns:
        [n], nats times T^2, times the term's weights; float64 where the logits are, else float32.

    Raises:
        ValueError: the shapes do not fit.
    """
    if student_logits.dim() != 2:
        raise ValueError(f"student_logits has shape {tuple(student_logits.shape)}; wanted [n, vocabulary]")
    weights, loss = term.prepare(*student_logits.shape)
    values: Tensor = _OnLogits.apply(student_logits, loss, None if weights is None else weights == 0)  # type: ignore[no-untyped-call]
    return values if weights is None else values * weights.to(values.dtype)


def _check_temperature(name: str, divergence: Divergence, stored: float) -> None:
    if divergence.temperature != stored:
        raise ValueError(
            f"the divergence's temperature is {divergence.temperature}, and the {name} signal was stored at {stored}; "
            "wanted the same: what it left out cannot be softened again. Score at the temperature of the loss"
        )


def _checked_ids(
    ids: Tensor, weights: Tensor | None, tokens: int, vocabulary: int, *, unique: bool = True
) -> tuple[Tensor, Tensor]:
    """Ids with 0 for entries that are not there or whose token is ignored, and which are there."""
    if len(ids) != tokens or (weights is not None and weights.shape != (tokens,)):
        given = None if weights is None else tuple(weights.shape)
        raise ValueError(
            f"ids has shape {tuple(ids.shape)} and weights {given}, and the student {tokens} tokens; wanted a row "
            "and a weight for each"
        )
    used = torch.ones_like(ids, dtype=torch.bool) if weights is None else (weights != 0)[:, None].expand_as(ids)
    wrong = used & ((ids < ABSENT) | (ids >= vocabulary))
    if bool(wrong.any()):
        raise ValueError(
            f"ids holds {int(ids[wrong][0])} and the vocabulary has {vocabulary} entries; wanted ids from 0 to "
            f"{vocabulary - 1}, or {ABSENT} for no entry"
        )
    present = used & (ids != ABSENT)
    ids = ids.masked_fill(~present, 0)
    if unique:
        ordered = ids.masked_fill(~present, ABSENT).sort(dim=-1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != ABSENT)
        if bool(twice.any()):
            raise ValueError(f"ids holds {int(ordered[:, 1:][twice][0])} twice in a row; wanted each entry once")
    return ids, present


def _buckets(log_probs: Tensor, log_tail: Tensor | None, present: Tensor, full: Tensor) -> Tensor:
    """The teacher's log-probabilities of entries and rest, [n, k + 1], each row of sum 1."""
    logs = log_probs.to(at_least_float32(log_probs.dtype)).masked_fill(~present, float("-inf"))
    if log_tail is None:
        # log(1 - sum), exact also where the sum is small; above 1 by rounding is 1.
        log_tail = torch.log(-torch.expm1(logs.logsumexp(dim=-1).clamp(max=0.0)))
    log_tail = log_tail.detach().to(logs.dtype).masked_fill(full, float("-inf"))
    logs = torch.cat([logs, log_tail[:, None]], dim=-1)
    total = logs.logsumexp(dim=-1, keepdim=True)
    wrong = (total.abs() > EXCESS) & present.any(dim=-1, keepdim=True)
    if bool(wrong.any()):
        raise ValueError(
            f"the teacher's probabilities of a row sum to {float(total[wrong][0].exp()):.4g}; wanted 1 with the rest's "
            "mass: log-probabilities of the whole softmax, not logits"
        )
    return logs - total


def _coarsen(student: Distribution, ids: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The student's log-probabilities of the listed entries and of the rest, [n, k + 1]; the rest's distribution, up
    to a factor, as a new tensor [n, vocabulary] that is 0 at the listed entries; and its sum [n, 1], which is not 0.
    """
    listed = student.logs.gather(1, ids).masked_fill_(~present, float("-inf"))
    # Added, not set: absent entries all point at entry 0, and must leave it alone.
    rest = student.probabilities.clone()
    rest.scatter_add_(1, ids, -student.probabilities.gather(1, ids).masked_fill_(~present, 0.0))
    mass = rest.sum(dim=-1, keepdim=True)
    log_mass = mass.log()
    faint = mass[:, 0] < FAINT
    if bool(faint.any()):
        apart = torch.zeros_like(listed[faint]).masked_fill_(present[faint], float("-inf"))
        logs = student.logs[faint].scatter_add_(1, ids[faint], apart)
        log_mass[faint] = logs.logsumexp(dim=-1, keepdim=True)
        # -inf - -inf, where nothing is left, is no mass.
        rest[faint] = (logs - log_mass[faint]).exp_().nan_to_num_(nan=0.0)
        mass[faint] = 1.0
    return torch.cat([listed, log_mass], dim=-1), rest, mass


class _OnLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: ChunkLoss, ignored: Tensor | None) -> Tensor:
        values, gradient = loss(Softened(logits.to(at_least_float32(logits.dtype))), slice(None))
        if ignored is not None:
            values = values.masked_fill(ignored, 0.0)
            gradient.masked_fill_(ignored[:, None], 0.0)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * output[:, None]).to(ctx.dtype), None, None

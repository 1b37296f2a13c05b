"""What is kept of a teacher's distributions over a vocabulary: the k best entries, or an unbiased sample of all.

An unbiased sample instead of the best entries is the idea of Anshumann et al. 2025, arXiv:2503.16870 (sparse logit
sampling), who draw with replacement. Here each entry is drawn once at most, and the large ones are kept as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses.sparse import ABSENT
from attar.losses.terms import Head

__all__ = ["Sampled", "TopK", "example_random", "logit_chunks", "sampled", "sampled_fixed", "top_k"]

CHUNK_TOKENS = 64
"""Three float64 tensors [chunk, vocabulary] are alive at a time."""


class TopK(NamedTuple):
    """The k best entries of each token's distribution: what ``TopKTerm`` takes."""

    ids: Tensor
    """[n, k], long; -1 for no entry"""
    log_probs: Tensor
    """[n, k], nats, float32; -inf for no entry"""
    log_tail: Tensor
    """[n], nats, float32: of the mass of all other entries; -inf for 0"""


class Sampled(NamedTuple):
    """A sample of each token's distribution: what ``SampledTerm`` takes."""

    ids: Tensor
    """[n, m], long, without repetition in a row; -1 for no entry"""
    entry_weights: Tensor
    """[n, m], float64: an entry that is kept has its probability, all that are drawn have one and the same"""
    kept: Tensor
    """[n, m], bool"""
    entropy: Tensor
    """[n], nats, float64, of the whole distribution"""


def logit_chunks(hidden: Tensor, head: Head, chunk_tokens: int = CHUNK_TOKENS) -> Iterator[Tensor]:
    """The logits [chunk, vocabulary] of hidden states [n, width], one chunk of tokens after the other."""
    head.check("hidden", hidden)
    dtype = head.product_dtype(hidden)
    head = head.cast(dtype)
    for states in torch.split(hidden.detach(), chunk_tokens):
        yield head.logits(states.to(dtype))


def example_random(seed: int, example: str) -> np.random.Generator:
    """The random numbers of one example: the same whatever else is scored, and in whatever order."""
    key = hashlib.sha256(f"{seed}:{example}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(key, "big")))


@torch.no_grad()
def top_k(chunks: Iterable[Tensor], k: int, temperature: float = 1.0, at_least: float = 0.0) -> TopK:
    """The k best entries of each token, softened by a temperature.

    Args:
        chunks: logits or log-probabilities [chunk, vocabulary] of one token after the other, as ``logit_chunks`` has
            them; one tensor in a list will do.
        k: how many, from 1 to the vocabulary's size.
        temperature: above 0.
        at_least: entries of a smaller probability than this go to the tail, so that a token takes the more entries
            the less the teacher is sure of it.

    Raises:
        ValueError: a number out of its range, or no chunk.
    """
    if not 0 <= at_least < 1:
        raise ValueError(f"at_least is {at_least}; wanted a number of at least 0 and below 1")
    parts = []
    for logits in chunks:
        logs = _softened(logits, temperature)
        _check("k", k, logs)
        best = logs.topk(k, dim=-1)
        listed = best.values.exp() >= at_least
        width = int(listed.sum(dim=-1).max()) if len(logs) else 0
        # The rest's own logsumexp: 1 - sum would cancel.
        tail = logs.scatter_(1, best.indices, best.values.masked_fill(listed, float("-inf"))).logsumexp(dim=-1)
        ids, values = best.indices.masked_fill(~listed, ABSENT), best.values.masked_fill(~listed, float("-inf"))
        parts.append((ids[:, :width], values[:, :width].float(), tail.float()))
    return TopK(*_joined(parts, (ABSENT, float("-inf"))))


@torch.no_grad()
def sampled(
    chunks: Iterable[Tensor], threshold: float, random: np.random.Generator, temperature: float = 1.0
) -> Sampled:
    """A sample of each token's distribution, softened by a temperature, with E[weights] = p: threshold sampling.

    An entry of at least the threshold is kept, and its weight is its probability p; any other is drawn with probability
    p / threshold, and its weight is the threshold (the estimator of Horvitz & Thompson 1952). Of all ways to choose
    inclusion probabilities this leaves the least sum of variances for the number of entries that all tokens take
    together (Duffield, Lund & Thorup 2005): a token of which the teacher is sure takes a few, one of which it is not
    takes many, at most 1 / threshold + 1 on average. The draw is systematic (Madow 1949): one uniform number a token,
    then one entry every ``threshold`` of the mass that is not kept, so that none is drawn twice.

    Args:
        chunks: as for ``top_k``.
        threshold: above 0 and at most 1.
        random: of the example, see ``example_random``. It gives one number a token, whatever the chunks.
        temperature: above 0.

    Raises:
        ValueError: a number out of its range, or no chunk.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; wanted a number above 0 and at most 1")

    def choose(p: Tensor, offsets: Tensor) -> _Choice:
        kept = p >= threshold
        best = p.topk(int(kept.sum(dim=-1).max()) if len(p) else 0, dim=-1)
        mass = p.masked_fill(kept, 0.0).sum(dim=-1, keepdim=True)
        counts = torch.ceil(mass / threshold - offsets).clamp_(min=0.0).long()
        return _Choice(best.indices, best.values, best.values >= threshold, torch.full_like(mass, threshold), counts)

    return _sampled(chunks, choose, random, temperature)


@torch.no_grad()
def sampled_fixed(chunks: Iterable[Tensor], m: int, random: np.random.Generator, temperature: float = 1.0) -> Sampled:
    """A sample of exactly m entries of each token: ``sampled`` with each token's own threshold, 1 / c.

    c is what makes sum min(1, c p) = m. The weights of a token sum to 1.

    Args:
        chunks: as for ``top_k``.
        m: how many entries, from 1 to the vocabulary's size. Where fewer have a probability, all of them are kept,
            and others with weight 0.
        random: of the example.
        temperature: above 0.

    Raises:
        ValueError: a number out of its range, or no chunk.
    """

    def choose(p: Tensor, offsets: Tensor) -> _Choice:
        _check("m", m, p)
        best = p.topk(m, dim=-1)
        rest = p.scatter(1, best.indices, 0.0).sum(dim=-1, keepdim=True)
        # [n, m + 1]: the mass left when the h largest are kept, summed from the small end: 1 - sum would cancel
        left = torch.cat([best.values, rest], dim=-1).flip(-1).cumsum(-1).flip(-1)
        position = torch.arange(m, device=p.device)
        # With h kept, 1 / c = left[h] / (m - h); h is the smallest for which the next entry is below it.
        fits = best.values * (m - position) < left[:, :m]
        kept = torch.where(fits.any(-1), fits.int().argmax(-1), m)[:, None]
        share = left.gather(1, kept) / (m - kept).clamp(min=1)
        return _Choice(best.indices, best.values, position < kept, share, m - kept)

    return _sampled(chunks, choose, random, temperature)


class _Choice(NamedTuple):
    ids: Tensor  # [n, candidates], among them all that are kept
    probabilities: Tensor  # [n, candidates]
    kept: Tensor  # [n, candidates]
    share: Tensor  # [n, 1], the weight of a drawn entry
    counts: Tensor  # [n, 1], how many are drawn


def _sampled(
    chunks: Iterable[Tensor],
    choose: Callable[[Tensor, Tensor], _Choice],
    random: np.random.Generator,
    temperature: float,
) -> Sampled:
    parts = []
    for logits in chunks:
        logs = _softened(logits, temperature)
        probabilities = logs.exp()
        entropy = -logs.mul_(probabilities).masked_fill_(probabilities == 0, 0.0).sum(dim=-1)
        offsets = torch.from_numpy(random.random((len(logits), 1))).to(logits.device)
        chosen = choose(probabilities, offsets)
        parts.append((*_draw(probabilities, chosen, offsets), entropy))
    return Sampled(*_joined(parts, (ABSENT, 0.0, False)))


def _draw(p: Tensor, chosen: _Choice, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, weights and which are kept, [n, entries], the kept ones first; ``p`` is overwritten."""
    p.scatter_(1, chosen.ids, chosen.probabilities.masked_fill(chosen.kept, 0.0))
    cumulated = p.cumsum_(dim=-1)
    number = torch.arange(int(chosen.counts.max()) if len(p) else 0, device=p.device)
    # Rounding may put the last point at the end, where there is nothing.
    points = torch.minimum((offsets + number) * chosen.share, cumulated[:, -1:] * (1 - 1e-15))
    found = torch.searchsorted(cumulated, points, right=True).clamp_(max=p.shape[1] - 1)
    present = torch.cat([chosen.kept, number < chosen.counts], dim=-1)
    ids = torch.cat([chosen.ids, found], dim=-1).masked_fill_(~present, ABSENT)
    weights = torch.cat([chosen.probabilities, chosen.share.expand(found.shape)], dim=-1).masked_fill_(~present, 0.0)
    kept = torch.cat([chosen.kept, torch.zeros_like(found, dtype=torch.bool)], dim=-1)
    order = torch.argsort(present.int(), dim=-1, descending=True, stable=True)
    order = order[:, : int(present.sum(dim=-1).max()) if len(p) else 0]
    return ids.gather(1, order), weights.gather(1, order), kept.gather(1, order)


def _softened(logits: Tensor, temperature: float) -> Tensor:
    if logits.dim() != 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; wanted [n, vocabulary]")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; wanted a finite number above 0")
    logs = (logits.double() / temperature).log_softmax(dim=-1)
    if bool(logs.isnan().any()):
        raise ValueError("logits hold a NaN, or a row without any finite number; wanted the teacher's own logits")
    return logs


def _check(name: str, number: int, logits: Tensor) -> None:
    if not 1 <= number <= logits.shape[1]:
        raise ValueError(f"{name} is {number} and the vocabulary has {logits.shape[1]} entries; wanted 1 to that many")


def _joined(parts: Sequence[tuple[Tensor, ...]], padding: tuple[float, ...]) -> Iterator[Tensor]:
    """The parts' columns one below the other, the first ones padded to the widest."""
    if not parts:
        raise ValueError("chunks is empty; wanted at least one tensor of logits")
    width = max(part[0].shape[1] for part in parts)
    for number, column in enumerate(zip(*parts, strict=True)):
        if number < len(padding):
            column = tuple(F.pad(part, (0, width - part.shape[1]), value=padding[number]) for part in column)
        yield torch.cat(column)

"""Near duplicates: MinHash finds candidates, the sets of shingles themselves decide.

Two rows are near duplicates where the Jaccard similarity of their shingles (runs of words) reaches the threshold, of
what is said as a whole and of the answers alone: a long document in two prompts with different questions makes no
duplicate. MinHash (Broder, 1997) signatures are `rensa`'s; 16 bits are kept of each minimum (b-bit minwise hashing; Li
and König, 2010), so that a million rows take 128 MB. Rows that agree in a band of their signature are candidates
(Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import rensa
from numpy.typing import NDArray

from attar.collect.shingles import U32, U64, shingles

__all__ = ["HASHES", "Place", "candidates", "decide", "signatures", "similarities"]

HASHES = 64
_SEED = 42
# Share of the true pairs at the threshold that must share a band.
_FOUND = 0.995
# Standard deviation of an estimate from 64 minima is at most 0.0625; what is estimated further below is not read.
_SLACK = 0.2
# A row is compared with the first row of its bucket and with so many before it.
_BEFORE = 4
_BLOCK = 1 << 16


def signatures(hashes: U64, offsets: U64) -> NDArray[np.uint16]:
    """MinHash signatures [rows, HASHES] of sets of shingle hashes."""
    if len(offsets) < 2:
        return np.zeros((0, HASHES), np.uint16)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, HASHES, _SEED)
    return np.asarray(matrix.to_rows(), np.uint32).astype(np.uint16)


def _band(threshold: float) -> int:
    """Most minima a band such that pairs at the threshold share one with probability ``_FOUND``."""
    fitting = [rows for rows in range(1, 17) if 1 - (1 - threshold**rows) ** (HASHES // rows) >= _FOUND]
    return max(fitting, default=1)


def candidates(signature: NDArray[np.uint16], threshold: float) -> NDArray[np.int64]:
    """Pairs of rows that may be near duplicates: [pairs, 2], the earlier row first, sorted.

    Args:
        signature: [rows, HASHES].
        threshold: of the similarity.
    """
    size, rows = len(signature), _band(threshold)
    found = np.zeros(0, np.int64)
    for start in range(0, HASHES - rows + 1, rows):
        key = np.zeros(size, np.uint64)
        for column in range(start, start + rows):
            key = (key ^ signature[:, column]) * np.uint64(0x100000001B3)
            key ^= key >> np.uint64(29)
        order = np.argsort(key, kind="stable")
        ordered = key[order]
        first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if size else order[:0]
        leader = np.repeat(first, np.diff(np.append(first, size)))
        place = np.arange(size)
        pairs = []
        for earlier in [leader, *(place - back for back in range(1, _BEFORE + 1))]:
            fits = (earlier >= leader) & (earlier < place)
            pairs.append(order[earlier[fits]] * np.int64(size) + order[place[fits]])
        found = np.union1d(found, _likely(signature, np.unique(np.concatenate(pairs)), threshold))
    return np.stack(np.divmod(found, max(size, 1)), axis=1)


def _likely(signature: NDArray[np.uint16], codes: NDArray[np.int64], threshold: float) -> NDArray[np.int64]:
    """Pairs whose estimated similarity is not far below the threshold."""
    kept = []
    for start in range(0, len(codes), _BLOCK):
        block = codes[start : start + _BLOCK]
        left, right = np.divmod(block, len(signature))
        kept.append(block[(signature[left] == signature[right]).mean(axis=1) >= threshold - _SLACK])
    return np.concatenate(kept) if kept else codes


class Place(NamedTuple):
    """Where a row's words stand: those of the prompt first, then those of the answers."""

    file: int
    start: int
    length: int
    prompt: int


def _jaccard(left: U32, right: U32, length: int) -> float:
    def of(words: U32) -> U64:
        hashes, _ = shingles(words, np.zeros(1, np.int64), np.array([len(words)]), length)
        return np.unique(hashes)

    one, other = of(left), of(right)
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def similarities(read: Callable[[Place], U32], pairs: Iterable[tuple[Place, Place]], length: int) -> list[float]:
    """Jaccard similarity of each pair's shingles: the smaller one, of the whole and of the answers.

    Args:
        read: gives the words at a place.
        pairs: of rows.
        length: words of a shingle.
    """
    found = []
    for places in pairs:
        words = [read(place) for place in places]
        value = _jaccard(words[0], words[1], length)
        answers = [part[place.prompt :] for part, place in zip(words, places, strict=True)]
        if any(map(len, answers)):
            value = min(value, _jaccard(answers[0], answers[1], length))
        found.append(value)
    return found


def decide(
    pairs: NDArray[np.int64], similarity: NDArray[np.float64], threshold: float, fixed: int
) -> dict[int, tuple[int, float]]:
    """Drop every row that is near to an earlier one that stays.

    Args:
        pairs: [pairs, 2], the earlier row first, sorted.
        similarity: [pairs].
        threshold: from which a row is dropped.
        fixed: so many rows at the beginning are never dropped.

    Returns:
        Dropped row -> the row that it is near to, and how near.
    """
    dropped: dict[int, tuple[int, float]] = {}
    near = similarity >= threshold
    pairs, similarity = pairs[near], similarity[near]
    for at in np.lexsort((pairs[:, 0], pairs[:, 1])):
        earlier, later = map(int, pairs[at])
        if later >= fixed and later not in dropped and earlier not in dropped:
            dropped[later] = (earlier, float(similarity[at]))
    return dropped

"""Runs of words as 64-bit hashes, for many rows at once.

Arrays: ``words`` [words] uint32, the rows one behind the other; ``starts`` [rows] and ``counts`` [rows], where each row
begins in it and how many words it has.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["U32", "U64", "Vocabulary", "runs", "shingles"]

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]

_PRIME = np.uint64(0x9E3779B97F4A7C15)
# Words that are remembered; the rest are hashed again.
_REMEMBERED = 1_000_000


class Vocabulary(dict[str, int]):
    """Word -> CRC-32, remembered: a language repeats itself. The same in every process and every run."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _REMEMBERED:
            self.clear()
        value = self[word] = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        return value


def _mixed(values: U64) -> U64:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit of the input moves every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _rolled(words: U64, length: int) -> U64:
    """Hash of each run of ``length`` words: [words - length + 1]."""
    size = len(words) - length + 1
    if size <= 0:
        return np.zeros(0, np.uint64)
    value = words[:size].copy()
    for i in range(1, length):
        value *= _PRIME
        value += words[i : i + size]
    return _mixed(value)


def _each(starts: NDArray[Any], counts: NDArray[Any]) -> NDArray[np.int64]:
    """Positions of all members of all rows: [sum of counts]."""
    counts = counts.astype(np.int64)
    ends = np.cumsum(counts)
    inside = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)
    places: NDArray[np.int64] = np.repeat(starts.astype(np.int64), counts) + inside
    return places


def runs(words: U32, starts: NDArray[Any], counts: NDArray[Any], length: int) -> tuple[U64, NDArray[np.int64]]:
    """Every run of ``length`` words of each row, in order.

    Returns:
        Hashes, and the row that each stands in. A row with fewer words has none.
    """
    hashes = _rolled(words.astype(np.uint64) + np.uint64(1), length)
    number = np.maximum(counts.astype(np.int64) - length + 1, 0)
    return hashes[_each(starts, number)], np.repeat(np.arange(len(counts)), number)


def shingles(words: U32, starts: NDArray[Any], counts: NDArray[Any], length: int) -> tuple[U64, U64]:
    """Every run of ``length`` words of each row; a row with fewer words is one shingle of all that it has.

    Returns:
        Hashes, and offsets [rows + 1] of where each row's begin. A row without words has one like all such rows.
    """
    counts = counts.astype(np.int64)
    padded = np.maximum(counts, length)
    begin = np.cumsum(padded) - padded
    spread = np.zeros(int(padded.sum()), np.uint64)
    # No word is 0 here, so the padding is no word.
    spread[_each(begin, counts)] = words[_each(starts, counts)].astype(np.uint64) + np.uint64(1)
    number = padded - length + 1
    offsets = np.concatenate([[0], np.cumsum(number)]).astype(np.uint64)
    return _rolled(spread, length)[_each(begin, number)], offsets

"""Rows to be trained on that tell a test case: runs of words that both have.

The method is GPT-3's (Brown et al., 2020, appendix C): a run of 13 words that a test case has as well, unless it
stands in so many rows that it is a turn of phrase. Rows are dropped whole here, and system prompts and tools do not
count, as rows share them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attar.collect.shingles import U32, U64, runs

__all__ = ["TestRuns", "telling"]

# A bitmap of 2^22 answers most questions whether a run stands in a test case.
_BITS = 22


class TestRuns:
    """The runs of words of the test cases."""

    __test__ = False

    def __init__(self, words: U32, starts: NDArray[Any], counts: NDArray[Any], length: int) -> None:
        hashes, owners = runs(words, starts, counts, length)
        self.hashes, first = np.unique(hashes, return_index=True)
        self.owners = owners[first]
        """the first test case that has each run"""
        self.length = length
        self._seen = np.zeros(1 << _BITS, bool)
        self._seen[self._slot(self.hashes)] = True

    @staticmethod
    def _slot(hashes: U64) -> NDArray[np.int64]:
        slots: NDArray[np.int64] = (hashes >> np.uint64(64 - _BITS)).astype(np.int64)
        return slots

    def shared(self, words: U32, starts: NDArray[Any], counts: NDArray[Any]) -> NDArray[np.int64]:
        """Which rows have which of the runs: [matches, 2] of (row, run), sorted, each once."""
        hashes, rows = runs(words, starts, counts, self.length)
        maybe = self._seen[self._slot(hashes)]
        hashes, rows = hashes[maybe], rows[maybe]
        place = np.searchsorted(self.hashes, hashes)
        place[place == len(self.hashes)] = 0
        hit = self.hashes[place] == hashes if len(self.hashes) else np.zeros(len(hashes), bool)
        return np.unique(np.stack([rows[hit], place[hit]], axis=1), axis=0)


def telling(matches: NDArray[np.int64], counts: NDArray[np.int64], common: int) -> dict[int, int]:
    """Rows that have a run which few rows have: row -> the first such run.

    Args:
        matches: [matches, 2] of (row, run), sorted.
        counts: how many rows have each run.
        common: a run that more rows have tells nothing.
    """
    rare = matches[counts[matches[:, 1]] <= common]
    rows, first = np.unique(rare[:, 0], return_index=True)
    return dict(zip(rows.tolist(), rare[first, 1].tolist(), strict=True))

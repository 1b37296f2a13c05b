"""What is in memory of the rows of one of the user's files: numbers, and why rows were dropped."""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attar.collect.reading import ROWS, Batch

__all__ = ["Table"]

Indices = NDArray[np.int64]


@dataclass
class Table:
    """The rows of a file, or of a folder of files, that passed the first pass; about 200 bytes each."""

    key: str
    """the recipe's, without `data.`"""
    files: list[Path]
    spool: Path
    """what the first pass dropped, a JSON line each, in the files' order"""
    rows: NDArray[Any] = field(default_factory=lambda: np.zeros(0, ROWS))
    signatures: NDArray[np.uint16] = field(default_factory=lambda: np.zeros((0, 0), np.uint16))
    kept: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    units: list[slice] = field(default_factory=list)
    """rows of which words stand one behind the other"""
    counts: Counter[str] = field(default_factory=Counter)
    names: dict[int, str] = field(default_factory=dict)
    _drops: list[tuple[Indices, str, Callable[[int], str]]] = field(default_factory=list)

    def fill(self, batches: list[Batch]) -> None:
        """Take the rows of the first pass."""
        self.rows = np.concatenate([self.rows, *(batch.rows for batch in batches)])
        found = [batch.signatures for batch in batches if len(batch.rows)]
        if found:
            self.signatures = np.concatenate(found)
        self.kept = np.ones(len(self.rows), bool)
        end = 0
        for batch in batches:
            if len(batch.rows):
                self.units.append(slice(end, end + len(batch.rows)))
            end += len(batch.rows)

    @property
    def indices(self) -> Indices:
        """Of the rows that are still in."""
        return np.flatnonzero(self.kept)

    def drop(self, rows: Indices, reason: str, detail: Callable[[int], str]) -> None:
        """Drop rows that are still in.

        Args:
            rows: indices, each once.
            reason: what they are counted under.
            detail: of the n-th of them; asked when it is written.
        """
        if len(rows):
            self.kept[rows] = False
            self.counts[reason] += len(rows)
            self._drops.append((rows, reason, detail))

    def where(self, row: int) -> str:
        """File and line of a row."""
        return f"{self.files[int(self.rows['file'][row])].name} line {int(self.rows['line'][row])}"

    def id(self, row: int) -> str:
        """The id of a row's example."""
        return f"{int(self.rows['id'][row]):016x}"

    def dropped(self) -> Iterator[dict[str, Any]]:
        """Every row that was dropped, in the files' order."""
        for file, line, key, reason, detail in heapq.merge(self._early(), self._late(), key=lambda drop: drop[:2]):
            yield {
                "id": key,
                "reason": reason,
                "split": self.key,
                "file": self.files[file].name,
                "line": line,
                "detail": detail,
            }

    def _early(self) -> Iterator[tuple[int, int, str | None, str, str]]:
        if self.spool.exists():
            with self.spool.open(encoding="utf-8") as handle:
                for line in handle:
                    yield tuple(json.loads(line))

    def _late(self) -> Iterator[tuple[int, int, str | None, str, str]]:
        rows = np.concatenate([np.zeros(0, np.int64), *(drop[0] for drop in self._drops)]).astype(np.int64)
        step = np.repeat(np.arange(len(self._drops)), [len(drop[0]) for drop in self._drops])
        inside = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(drop[0])) for drop in self._drops)])
        for at in np.argsort(rows, kind="stable"):
            row = int(rows[at])
            _, reason, detail = self._drops[int(step[at])]
            place = int(self.rows["file"][row]), int(self.rows["line"][row])
            yield (*place, self.id(row), reason, detail(int(inside[at])))

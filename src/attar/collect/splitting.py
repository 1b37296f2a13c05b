"""Which rows are held out: by chance, by group, by time."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["hold_out", "sampled"]

Indices = NDArray[np.int64]


def _groups(rows: NDArray[Any]) -> tuple[NDArray[np.int64], int]:
    """Number of each row's group, in the order in which groups first appear; and how many there are."""
    keys = rows["group"].copy()
    alone = np.flatnonzero(keys == 0)
    # A row without a group is one; such small numbers are no hash.
    keys[alone] = alone.astype(np.uint64) + np.uint64(1)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return rank[inverse], len(first)


def hold_out(
    rows: NDArray[Any],
    sizes: Mapping[str, int],
    *,
    by: Literal["random", "group", "time"],
    seed: int,
    order: Literal["file", "shuffled"],
) -> dict[str, Indices]:
    """Hold groups out until each split has its size; the rest is ``train``.

    By time the newest groups are taken, ``test`` first, and a group is as old as its newest row: no row of train is
    newer than a group that is held out.

    Args:
        rows: of the table that is split; what counts are ``group`` and ``time``.
        sizes: rows of each split, in the order in which they are taken; the last group may pass it.
        by: what decides which groups.
        seed: of the shuffle.
        order: of each split's rows: that of the file, or that of the shuffled groups.

    Returns:
        Indices by split.
    """
    group, number = _groups(rows)
    if by == "time":
        newest = np.full(number, -np.inf)
        np.maximum.at(newest, group, rows["time"])
        sequence = np.argsort(newest, kind="stable").tolist()
        sizes = dict(sorted(sizes.items(), key=lambda item: ("test", "calibration", "val").index(item[0])))
    else:
        sequence = list(range(number))
        random.Random(seed).shuffle(sequence)
        if order == "file":
            # The first of the shuffled ones are held out there, the last where the order is that of the shuffle.
            sequence.reverse()
    sorted_rows = np.argsort(group, kind="stable")
    ends = np.cumsum(np.bincount(group, minlength=number))
    held: dict[str, Indices] = {}
    for name, size in sizes.items():
        taken: list[Indices] = []
        have = 0
        while sequence and have < size:
            last = sequence.pop()
            taken.append(sorted_rows[(ends[last - 1] if last else 0) : ends[last]])
            have += len(taken[-1])
        held[name] = np.concatenate(taken) if taken else np.zeros(0, np.int64)
    position = np.full(number, -1, np.int64)
    position[sequence] = np.arange(len(sequence))
    place = position[group]
    left = np.flatnonzero(place >= 0)
    held["train"] = left[np.argsort(place[left], kind="stable")]
    if order == "file" or by == "time":
        held = {name: np.sort(indices) for name, indices in held.items()}
    return held


def sampled(names: NDArray[np.uint64], ids: NDArray[np.uint64], most: int, seed: int) -> Indices:
    """Indices of rows beyond the cap of their name; those that stay are a sample that no order of the file sways.

    Args:
        names: [rows] of sources or labels; 0 has no cap.
        ids: [rows].
        most: rows of one name.
        seed: of the sample.
    """
    lot = ids ^ np.uint64(random.Random(seed).getrandbits(64))
    # One round of multiply and shift: ids are hashes already.
    lot = (lot * np.uint64(0x9E3779B97F4A7C15)) ^ (lot >> np.uint64(31))
    order = np.lexsort((lot, names))
    ordered = names[order]
    begins = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, bool)
    start = np.maximum.accumulate(np.where(begins, np.arange(len(ordered)), 0)) if len(ordered) else order
    over = (np.arange(len(ordered)) - start >= most) & (ordered != 0)
    return np.sort(order[over])

"""How far a model's confidence can be believed: reliability, calibration error, risk and coverage."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import numpy.typing as npt

from attar.evaluate.arrays import Array, binary, same_length, vector

__all__ = ["Bin", "CoveragePoint", "expected_calibration_error", "reliability", "risk_coverage"]

# A float32 softmax can overshoot 1 by this much; anything further out is no probability.
_SLACK = 1e-6


class Bin(TypedDict):
    """One bar of a reliability diagram: the cases whose confidence is in (lo, hi]."""

    lo: float
    hi: float
    n: int
    confidence: float | None
    accuracy: float | None


class CoveragePoint(TypedDict):
    """Accuracy on the share of the cases that the model is surest of."""

    coverage: float
    accuracy: float


def reliability(confidence: npt.ArrayLike, correct: npt.ArrayLike, bins: int = 10) -> list[Bin]:
    """Mean confidence and accuracy in bins of equal width.

    Bin m of M holds the cases with confidence in ((m - 1) / M, m / M] (Guo et al. 2017, "On Calibration of Modern
    Neural Networks", section 2); a confidence of 0 goes to the first.

    Args:
        confidence: [cases], in [0, 1].
        correct: [cases], bool or 0/1.
        bins: number of bins, at least 1.

    Returns:
        One entry per bin, lowest first. An empty bin has n 0 and None for confidence and accuracy.

    Raises:
        ValueError: the lengths differ, either is empty, confidence is outside [0, 1], correct is not 0/1, or bins is
            below 1.
    """
    sure, right = _confidence_pairs(confidence, correct)
    if bins < 1:
        raise ValueError(f"bins is {bins}; wanted at least 1")
    edges = np.arange(bins + 1) / bins
    which = np.maximum(np.searchsorted(edges, sure, side="left") - 1, 0)
    counts = np.bincount(which, minlength=bins)
    sure_sums = np.bincount(which, weights=sure, minlength=bins)
    right_sums = np.bincount(which, weights=right, minlength=bins)
    return [
        {
            "lo": float(edges[i]),
            "hi": float(edges[i + 1]),
            "n": int(counts[i]),
            "confidence": float(sure_sums[i] / counts[i]) if counts[i] else None,
            "accuracy": float(right_sums[i] / counts[i]) if counts[i] else None,
        }
        for i in range(bins)
    ]


def expected_calibration_error(confidence: npt.ArrayLike, correct: npt.ArrayLike, bins: int = 10) -> float:
    """Expected calibration error: |accuracy - confidence| of each bin, averaged with the bins' counts as weights.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.

    Args:
        confidence: [cases], in [0, 1].
        correct: [cases], bool or 0/1.
        bins: number of bins, at least 1.

    Returns:
        The error, in [0, 1]; 0 is calibrated.

    Raises:
        ValueError: as `reliability`.
    """
    table = reliability(confidence, correct, bins)
    gap = 0.0
    for row in table:
        if row["accuracy"] is not None and row["confidence"] is not None:
            gap += row["n"] * abs(row["accuracy"] - row["confidence"])
    return gap / sum(row["n"] for row in table)


def risk_coverage(confidence: npt.ArrayLike, correct: npt.ArrayLike, points: int = 20) -> list[CoveragePoint]:
    """Accuracy on the surest share of the cases, for growing shares.

    El-Yaniv and Wiener 2010, "On the Foundations of Noise-free Selective Classification"; the risk is 1 - accuracy.
    Cases of equal confidence that a share cuts through count with their group's accuracy. That is the expectation
    over a random order among them, and makes the curve independent of the order of the cases.

    Args:
        confidence: [cases]; any finite score of which more means surer.
        correct: [cases], bool or 0/1.
        points: shares wanted, at least 1: 1/points, 2/points, ... 1, each rounded up to whole cases.

    Returns:
        Shares in growing order, the last of coverage 1; fewer than `points` where shares round to the same cases.

    Raises:
        ValueError: the lengths differ, either is empty, confidence is not finite, correct is not 0/1, or points is
            below 1.
    """
    sure = vector("confidence", confidence)
    right = binary("correct", correct)
    same_length("confidence", sure, "correct", right)
    if points < 1:
        raise ValueError(f"points is {points}; wanted at least 1")
    _, group, sizes = np.unique(-sure, return_inverse=True, return_counts=True)
    expected = np.repeat(np.bincount(group, weights=right) / sizes, sizes)
    cases = len(sure)
    answered = sorted({-(-i * cases // points) for i in range(1, points + 1)})
    gained = np.cumsum(expected)
    return [{"coverage": k / cases, "accuracy": float(min(gained[k - 1] / k, 1.0))} for k in answered]


def _confidence_pairs(confidence: npt.ArrayLike, correct: npt.ArrayLike) -> tuple[Array, npt.NDArray[np.bool_]]:
    sure = vector("confidence", confidence)
    right = binary("correct", correct)
    same_length("confidence", sure, "correct", right)
    if sure.min() < -_SLACK or sure.max() > 1 + _SLACK:
        raise ValueError(f"confidence runs from {sure.min():g} to {sure.max():g}; wanted probabilities in [0, 1]")
    return np.clip(sure, 0.0, 1.0), right

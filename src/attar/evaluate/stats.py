"""Estimates with intervals: what an evaluation may claim from a finite number of cases.

Every interval here is over *cases*: it says how far the number would move if other cases of the same kind had been
drawn. Seeds are averaged within a case first, so that three seeds of one case do not pass for three cases.

The bootstrap is the percentile bootstrap (Efron 1979, "Bootstrap Methods: Another Look at the Jackknife"; Efron and
Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13). Two limits follow from it and are not hidden: it
cannot see variation that the cases at hand do not show (all cases equal gives an interval of width zero), and it is
somewhat too narrow below about 30 cases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, norm

from attar.errors import RunError
from attar.evaluate.arrays import Array, binary, matrix, paired_matrices, ratio_parts, same_length

__all__ = [
    "Estimate",
    "McNemar",
    "mcnemar",
    "mean_estimate",
    "paired_difference",
    "paired_ratio",
    "ratio_of_means",
    "ratio_of_medians",
    "retention",
    "wilson",
]

# Counts drawn at once: 4 MiB of int64, whatever the number of cases and of resamples.
_CHUNK = 1 << 19


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: the estimate from all cases.
        lo: lower end of the interval.
        hi: upper end of the interval.
    """

    value: float
    lo: float
    hi: float

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as `{"value": value, "ci": [lo, hi]}`."""
        return {"value": self.value, "ci": [self.lo, self.hi]}


@dataclass(frozen=True)
class McNemar:
    """Outcome of McNemar's test.

    Attributes:
        only_a: cases that a gets right and b wrong.
        only_b: cases that b gets right and a wrong.
        p_value: exact two-sided p-value; 1 where the two never differ.
    """

    only_a: int
    only_b: int
    p_value: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Estimate:
    """Proportion with Wilson's score interval.

    Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference". Unlike the normal
    approximation it stays inside [0, 1] and has a width at 0 and at n successes.

    Args:
        successes: how many of the trials succeeded.
        n: how many trials.
        confidence: two-sided coverage of the interval.

    Raises:
        ValueError: n is below 1, successes is outside [0, n], or confidence is outside (0, 1).
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes is {successes} and n is {n}; wanted n >= 1 and 0 <= successes <= n")
    _check_confidence(confidence)
    z = float(norm.ppf(0.5 + confidence / 2))
    p = successes / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    # At the ends the formula gives exactly 0 and 1, rounding does not.
    lo = 0.0 if successes == 0 else centre - half
    hi = 1.0 if successes == n else centre + half
    return Estimate(p, lo, hi)


def mean_estimate(
    scores: npt.ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Mean score, with an interval over cases.

    One seed of scores that are all 0 or 1 gets Wilson's interval. Everything else gets the percentile bootstrap of
    the per-case seed mean.

    Args:
        scores: [seeds, cases], finite.
        confidence: two-sided coverage of the interval.
        resamples: bootstrap resamples.
        seed: seed of the resampling.

    Raises:
        ValueError: scores is not two-dimensional, is empty, or has values that are not finite.
    """
    table = matrix("scores", scores)
    if table.shape[0] == 1 and bool(np.isin(table, (0.0, 1.0)).all()):
        return wilson(int(table.sum()), table.shape[1], confidence)
    value, draws = _case_bootstrap(table.mean(axis=0)[:, None], resamples, seed)
    return _percentile(float(value[0]), draws[:, 0], confidence)


def paired_difference(
    a: npt.ArrayLike, b: npt.ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Mean of a minus mean of b on the same cases, by paired bootstrap.

    A resample draws cases and takes both models' scores of each drawn case, so what makes a case hard for both
    cancels (Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation").

    Args:
        a: [seeds_a, cases], finite; averaged over seeds within each case.
        b: [seeds_b, cases], the same cases in the same order.
        confidence: two-sided coverage of the interval.
        resamples: bootstrap resamples.
        seed: seed of the resampling.

    Raises:
        ValueError: a and b differ in the number of cases, or either is empty, not two-dimensional or not finite.
    """
    left, right = paired_matrices("a", a, "b", b)
    value, draws = _case_bootstrap((left.mean(axis=0) - right.mean(axis=0))[:, None], resamples, seed)
    return _percentile(float(value[0]), draws[:, 0], confidence)


def retention(
    student: npt.ArrayLike,
    teacher: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Share of the teacher's mean score that the student keeps, by paired bootstrap of the ratio of means.

    A resample in which the teacher's mean is 0 has no ratio and is left out: the interval is conditional on the
    teacher scoring at all. With k cases on which the teacher scores, such resamples are a share of about exp(-k)
    (5% at k = 3, under 0.005% at k = 10), so the condition only matters where there is next to nothing to retain.

    Args:
        student: [seeds, cases], finite, at least 0; averaged over seeds within each case.
        teacher: [1 or seeds, cases], the same cases in the same order, at least 0.
        confidence: two-sided coverage of the interval.
        resamples: bootstrap resamples.
        seed: seed of the resampling.

    Raises:
        RunError: the teacher's mean is 0.
        ValueError: student and teacher differ in the number of cases, the teacher has neither 1 seed nor as many as
            the student, or either is empty, not two-dimensional, not finite or negative.
    """
    kept, whole = paired_matrices("student", student, "teacher", teacher)
    if whole.shape[0] not in (1, kept.shape[0]):
        raise ValueError(f"teacher has {whole.shape[0]} seeds and student {kept.shape[0]}; wanted 1 or as many")
    if kept.min() < 0 or whole.min() < 0:
        raise ValueError(
            f"the lowest score is {kept.min():g} for student and {whole.min():g} for teacher; a share of a mean "
            "needs scores of at least 0"
        )
    if not whole.any():
        raise RunError(
            f"the teacher's mean score over {whole.shape[1]} cases is 0, so there is nothing to retain; wanted a "
            "teacher that gets at least one case right: check its answers and the grader"
        )
    return paired_ratio(kept, whole, confidence=confidence, resamples=resamples, seed=seed)


def paired_ratio(
    numerator: npt.ArrayLike,
    denominator: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Sum over cases of numerator over sum of denominator, by paired bootstrap; for a mean per token or per byte.

    A resample whose denominator is 0 has no ratio and is left out.

    Args:
        numerator: [seeds, cases], finite; averaged over seeds within each case.
        denominator: [1 or more, cases], the same cases in the same order, at least 0 and not all 0.
        confidence: two-sided coverage of the interval.
        resamples: bootstrap resamples.
        seed: seed of the resampling.

    Raises:
        RunError: the denominator is 0 in all resamples.
        ValueError: they differ in the number of cases, either is empty, not two-dimensional or not finite, or the
            denominator is negative or 0 everywhere.
    """
    top, bottom = paired_matrices("numerator", numerator, "denominator", denominator)
    if bottom.min() < 0 or not bottom.any():
        raise ValueError(
            f"denominator runs from {bottom.min():g} to {bottom.max():g}; wanted at least 0, and not all 0"
        )
    value, draws = _case_bootstrap(np.stack([top.mean(axis=0), bottom.mean(axis=0)], axis=1), resamples, seed)
    usable = draws[draws[:, 1] > 0]
    if not len(usable):
        raise RunError(
            f"what is divided by is 0 in all {resamples} resamples; wanted more cases that it is above 0 on (for a "
            "retention: a teacher that scores on more)"
        )
    return _percentile(float(value[0] / value[1]), usable[:, 0] / usable[:, 1], confidence)


def mcnemar(a_correct: npt.ArrayLike, b_correct: npt.ArrayLike) -> McNemar:
    """McNemar's test, exact: do a and b err equally often on the same cases?

    McNemar 1947, "Note on the sampling error of the difference between correlated proportions or percentages". Only
    the cases on which exactly one is right count; under the null each goes either way with probability 1/2.

    Args:
        a_correct: [cases], bool or 0/1.
        b_correct: [cases], the same cases in the same order.

    Raises:
        ValueError: the lengths differ, or either is empty or not 0/1.
    """
    a = binary("a_correct", a_correct)
    b = binary("b_correct", b_correct)
    same_length("a_correct", a, "b_correct", b)
    only_a = int((a & ~b).sum())
    only_b = int((b & ~a).sum())
    p_value = float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
    return McNemar(only_a, only_b, p_value)


def ratio_of_medians(
    numerator: npt.ArrayLike,
    denominator: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Median of numerator over median of denominator, resampled independently; for a p50 speed-up.

    Args:
        numerator: [n], finite, for example the teacher's latencies in seconds.
        denominator: [m], finite and above 0, for example the student's latencies in the same unit.
        confidence: two-sided coverage of the interval.
        resamples: bootstrap resamples.
        seed: seed of the resampling.

    Raises:
        ValueError: either is empty, not one-dimensional or not finite, or denominator has values at or below 0.
    """
    top, bottom = ratio_parts(numerator, denominator)
    rng = _rng(resamples, seed)
    draws = _bootstrap_medians(top, resamples, rng) / _bootstrap_medians(bottom, resamples, rng)
    return _percentile(float(np.median(top) / np.median(bottom)), draws, confidence)


def ratio_of_means(
    numerator: npt.ArrayLike,
    denominator: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Mean of numerator over mean of denominator, resampled independently; for throughput rounds.

    Args:
        numerator: [n], finite, for example the student's requests per second in each round.
        denominator: [m], finite and above 0, for example the teacher's, in the same unit.
        confidence: two-sided coverage of the interval.
        resamples: bootstrap resamples.
        seed: seed of the resampling.

    Raises:
        ValueError: either is empty, not one-dimensional or not finite, or denominator has values at or below 0.
    """
    top, bottom = ratio_parts(numerator, denominator)
    # Two child streams, so that equal inputs are still resampled independently.
    first, second = np.random.SeedSequence(seed).spawn(2)
    top_value, top_draws = _case_bootstrap(top[:, None], resamples, first)
    bottom_value, bottom_draws = _case_bootstrap(bottom[:, None], resamples, second)
    return _percentile(float(top_value[0] / bottom_value[0]), top_draws[:, 0] / bottom_draws[:, 0], confidence)


def _case_bootstrap(rows: Array, resamples: int, seed: int | np.random.SeedSequence) -> tuple[Array, Array]:
    """Column means of the rows, and of each bootstrap resample of the rows.

    Equal rows are merged first: how often each *distinct* row is drawn is multinomial with their shares as
    probabilities, which is the same bootstrap, independent of the order of the cases, and for 0/1 scores needs a
    handful of counts per resample instead of one per case. Where nearly all rows differ, counting drawn cases gives
    the same counts about ten times sooner than numpy's multinomial, which draws one binomial per distinct row.

    Args:
        rows: [cases, columns].
        resamples: number of resamples.
        seed: seed of the resampling.

    Returns:
        Means [columns] and resampled means [resamples, columns].
    """
    rng = _rng(resamples, seed)
    cases = len(rows)
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    columns = np.ascontiguousarray(distinct.T)
    draws = np.empty((resamples, len(columns)))
    few = len(distinct) * 10 <= cases
    row_of_case = np.repeat(np.arange(len(distinct)), counts)
    for start, stop in _chunks(resamples, len(distinct) if few else cases):
        size = stop - start
        if few:
            drawn = rng.multinomial(cases, counts / cases, size=size)
        else:
            flat = row_of_case[rng.integers(0, cases, (size, cases))] + np.arange(size)[:, None] * len(distinct)
            drawn = np.bincount(flat.ravel(), minlength=size * len(distinct)).reshape(size, len(distinct))
        weights = drawn.astype(np.float64)
        for column, values in enumerate(columns):
            draws[start:stop, column] = weights @ values
    return (columns @ counts.astype(np.float64)) / cases, draws / cases


def _bootstrap_medians(values: Array, resamples: int, rng: np.random.Generator) -> Array:
    """Medians [resamples] of bootstrap resamples of values [n].

    A resample picks index floor(n * u) of the sorted values for n uniform u. The floor keeps order, so the middle
    value is the one at the middle order statistic of the u, which is Beta distributed: one or two draws per resample
    in place of n, exactly the same distribution.
    """
    ordered = np.sort(values)
    n = len(ordered)
    middle = (n + 1) // 2
    low = rng.beta(middle, n + 1 - middle, size=resamples)
    at_low = ordered[np.minimum((low * n).astype(np.int64), n - 1)]
    if n % 2:
        return at_low
    # The n - middle draws above `low` are uniform on (low, 1); the next order statistic is the least of them.
    high = low + (1 - low) * rng.beta(1, n - middle, size=resamples)
    at_high = ordered[np.minimum((high * n).astype(np.int64), n - 1)]
    return (at_low + at_high) / 2


def _chunks(total: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover 0..total in steps whose rows of `width` numbers fill at most one chunk."""
    step = max(1, _CHUNK // width)
    for start in range(0, total, step):
        yield start, min(start + step, total)


def _percentile(value: float, draws: Array, confidence: float) -> Estimate:
    _check_confidence(confidence)
    lo, hi = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(lo), float(hi))


def _rng(resamples: int, seed: int | np.random.SeedSequence) -> np.random.Generator:
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; wanted at least 1")
    return np.random.default_rng(seed)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; wanted a coverage between 0 and 1, such as 0.95")

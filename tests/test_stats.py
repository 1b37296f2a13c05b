import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, ks_2samp

from attar.errors import RunError
from attar.evaluate import stats
from attar.evaluate.stats import Estimate, McNemar

# The machine may be shared, and how long an example takes is not what is tested.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

# The simulated hit counts are held against binomial bounds that a correct implementation leaves with at most this
# probability for each side. The seeds are fixed, so a test that passes once passes always; the bound says how likely
# it is that a correct implementation would have been rejected when the seed was picked.
FALSE_ALARM = 1e-6


def within(hits: int, trials: int, low: float, high: float) -> bool:
    """Whether hits can come from a true coverage in [low, high]."""
    return binom.ppf(FALSE_ALARM, trials, low) <= hits <= binom.ppf(1 - FALSE_ALARM, trials, high)


def covers(estimate: Estimate, truth: float) -> bool:
    return estimate.lo <= truth <= estimate.hi


def test_estimate_to_json():
    estimate = Estimate(0.5, 0.25, 0.75)
    assert json.loads(json.dumps(estimate.to_json(), allow_nan=False)) == {"value": 0.5, "ci": [0.25, 0.75]}


def test_wilson_by_hand():
    # p = 0.8, z = 1.96, n = 10: centre (0.8 + 0.19207) / 1.38415, half 1.96 sqrt(0.016 + 0.009604) / 1.38415
    estimate = stats.wilson(8, 10)
    assert estimate.value == 0.8
    assert estimate.lo == pytest.approx(0.49016, abs=1e-5)
    assert estimate.hi == pytest.approx(0.94332, abs=1e-5)


@given(st.integers(1, 500), st.data())
def test_wilson_stays_inside_and_mirrors(n, data):
    k = data.draw(st.integers(0, n))
    estimate, mirror = stats.wilson(k, n), stats.wilson(n - k, n)
    assert 0 <= estimate.lo <= estimate.value <= estimate.hi <= 1
    assert estimate.lo < estimate.hi
    assert estimate.lo == pytest.approx(1 - mirror.hi, abs=1e-12)


@pytest.mark.parametrize(("n", "p"), [(20, 0.5), (100, 0.1), (100, 0.5), (100, 0.9), (1000, 0.97)])
def test_wilson_coverage(n, p):
    trials = 20_000
    intervals = [stats.wilson(k, n) for k in range(n + 1)]
    drawn = np.random.default_rng(1).binomial(n, p, size=trials)
    assert within(sum(covers(intervals[k], p) for k in drawn), trials, 0.935, 0.965)


def test_wilson_confidence_is_the_coverage():
    assert stats.wilson(50, 100, 0.8).lo > stats.wilson(50, 100, 0.95).lo
    intervals = [stats.wilson(k, 400, 0.8) for k in range(401)]
    drawn = np.random.default_rng(2).binomial(400, 0.3, size=20_000)
    assert within(sum(covers(intervals[k], 0.3) for k in drawn), 20_000, 0.78, 0.82)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses(k, n):
    with pytest.raises(ValueError, match=f"successes is {k} and n is {n}"):
        stats.wilson(k, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_confidence_must_be_a_coverage(confidence):
    with pytest.raises(ValueError, match="confidence is"):
        stats.wilson(1, 2, confidence)
    with pytest.raises(ValueError, match="confidence is"):
        stats.paired_difference([[1.0]], [[0.0]], confidence=confidence)


def test_mean_of_one_binary_seed_is_wilson():
    assert stats.mean_estimate([[1, 0, 1, 1]]) == stats.wilson(3, 4)
    assert stats.mean_estimate([[1, 0, 1, 1]], confidence=0.5) == stats.wilson(3, 4, 0.5)


def test_mean_of_graded_scores_is_bootstrapped():
    scores = np.random.default_rng(0).random((1, 400))
    estimate = stats.mean_estimate(scores)
    half = 1.96 * scores.std() / 20
    assert estimate.value == pytest.approx(scores.mean())
    assert estimate.lo == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert estimate.hi == pytest.approx(scores.mean() + half, abs=0.1 * half)


def test_seeds_of_a_case_are_no_further_cases():
    one = np.random.default_rng(0).integers(0, 2, (1, 200)).astype(float)
    three = stats.mean_estimate(np.repeat(one, 3, axis=0))
    wilson = stats.mean_estimate(one)
    assert three.value == pytest.approx(wilson.value)
    assert three.hi - three.lo == pytest.approx(wilson.hi - wilson.lo, rel=0.05)


def test_mean_coverage_with_seeds():
    rng = np.random.default_rng(3)
    trials, hits = 1000, 0
    for trial in range(trials):
        ease = rng.beta(6, 2, size=200)
        estimate = stats.mean_estimate(rng.random((3, 200)) < ease, resamples=1000, seed=trial)
        hits += covers(estimate, 0.75)
    assert within(hits, trials, 0.93, 0.965)


def test_paired_difference_coverage_and_pairing():
    rng = np.random.default_rng(4)
    trials, hits = 2000, 0
    widths, unpaired = [], []
    for trial in range(trials):
        # 0.9 and 0.7 right, and the second only where the first is: the pairing carries most of the information
        u = rng.random(200)
        a, b = (u < 0.9)[None].astype(float), (u < 0.7)[None].astype(float)
        estimate = stats.paired_difference(a, b, resamples=1000, seed=trial)
        hits += covers(estimate, 0.2)
        widths.append(estimate.hi - estimate.lo)
        unpaired.append(2 * 1.96 * math.sqrt((a.var() + b.var()) / 200))
    assert within(hits, trials, 0.93, 0.965)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * math.sqrt(0.2 * 0.8 / 200), rel=0.03)
    assert np.mean(widths) < 0.8 * np.mean(unpaired)


def test_paired_difference_of_continuous_scores_covers():
    rng = np.random.default_rng(5)
    trials, hits = 1000, 0
    for trial in range(trials):
        a = rng.normal(1.0, 1.0, (2, 100))
        hits += covers(
            stats.paired_difference(a, a[:1] - rng.exponential(0.5, (1, 100)), resamples=500, seed=trial), 0.5
        )
    assert within(hits, trials, 0.92, 0.965)


def test_paired_difference_by_hand():
    # two cases with differences 1 and 0: resampled means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4
    estimate = stats.paired_difference([[1, 1], [1, 0]], [[0, 0.5]])
    assert estimate == Estimate(0.5, 0.0, 1.0)
    assert stats.paired_difference([[1, 1]], [[0, 1]], confidence=0.4) == Estimate(0.5, 0.5, 0.5)


def test_paired_difference_is_antisymmetric_reproducible_and_free_of_order():
    rng = np.random.default_rng(6)
    a, b = rng.random((2, 50)), rng.random((3, 50))
    estimate = stats.paired_difference(a, b, seed=7)
    assert stats.paired_difference(a, b, seed=7) == estimate
    assert stats.paired_difference(a, b, seed=8) != estimate
    back = stats.paired_difference(b, a, seed=7)
    assert back.value == pytest.approx(-estimate.value)
    assert back.lo == pytest.approx(-estimate.hi, abs=0.01)
    order = rng.permutation(50)
    moved = stats.paired_difference(a[:, order], b[:, order], seed=7)
    assert [moved.value, moved.lo, moved.hi] == pytest.approx([estimate.value, estimate.lo, estimate.hi])


@pytest.mark.parametrize("levels", [2, 300])
def test_both_ways_of_counting_give_the_bootstrap(levels):
    # Against plain index resampling. The 99.9% two-sample bound on the KS distance is the false-alarm bound here.
    rng = np.random.default_rng(8)
    rows = rng.integers(0, levels, (300, 1)).astype(float)
    _, draws = stats._case_bootstrap(rows, 4000, 1)
    plain = rows[rng.integers(0, 300, (4000, 300)), 0].mean(axis=1)
    assert len(draws) == 4000
    # jitter by less than a step of the mean, as the KS test is for continuous values
    jitter = rng.uniform(-0.5, 0.5, (2, 4000)) / 300
    assert ks_2samp(draws[:, 0] + jitter[0], plain + jitter[1]).pvalue > 1e-3


def test_bootstrap_memory_is_bounded(monkeypatch):
    sizes = []
    chunks = stats._chunks

    def spy(total, width):
        for start, stop in chunks(total, width):
            sizes.append((stop - start) * width)
            yield start, stop

    monkeypatch.setattr(stats, "_chunks", spy)
    stats.paired_difference(np.random.default_rng(0).random((1, 10_000)), np.zeros((1, 10_000)), resamples=300)
    assert len(sizes) > 1
    assert max(sizes) <= stats._CHUNK


@given(st.integers(1, 1000), st.integers(1, 2 * stats._CHUNK))
def test_chunks_cover_every_resample_once(total, width):
    parts = list(stats._chunks(total, width))
    assert parts[0][0] == 0
    assert parts[-1][1] == total
    assert all(before[1] == after[0] for before, after in itertools.pairwise(parts))


@settings(max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30).filter(any), st.integers(1, 3))
def test_retention_of_an_equal_student_is_one(scores, seeds):
    teacher = np.array([scores], dtype=float) / 4
    estimate = stats.retention(np.repeat(teacher, seeds, axis=0), teacher, resamples=200)
    assert [estimate.value, estimate.lo, estimate.hi] == pytest.approx([1.0, 1.0, 1.0])


def test_retention_by_hand():
    # student means per case 1, 1/2, 0, 0; teacher 1, 1, 1, 0: 1.5 of 3
    estimate = stats.retention([[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 1, 1, 0]])
    assert estimate.value == pytest.approx(0.5)
    assert estimate.lo == 0.0
    assert estimate.hi == 1.0


def test_retention_coverage():
    rng = np.random.default_rng(9)
    trials, hits = 2000, 0
    for trial in range(trials):
        teacher = rng.random((1, 300)) < 0.8
        student = np.where(rng.random((1, 300)) < 0.85, teacher, rng.random((1, 300)) < 0.4)
        hits += covers(stats.retention(student, teacher, resamples=1000, seed=trial), (0.85 * 0.8 + 0.15 * 0.4) / 0.8)
    assert within(hits, trials, 0.93, 0.965)


def test_retention_leaves_out_resamples_without_a_teacher():
    # One of two cases is the teacher's: a quarter of the resamples has teacher mean 0. The others have ratio
    # (1 + other) / 1 or 1, never an infinity.
    estimate = stats.retention([[1, 1]], [[1, 0]])
    assert estimate == Estimate(2.0, 1.0, 2.0)


def test_retention_refuses_a_teacher_of_zero():
    with pytest.raises(RunError, match="teacher's mean score over 3 cases is 0"):
        stats.retention([[1, 0, 1]], [[0, 0, 0]])


def test_retention_refuses_where_no_resample_has_a_teacher():
    teacher = np.zeros((1, 50))
    teacher[0, 0] = 1
    empty = next(
        seed for seed in range(50) if not stats._case_bootstrap(np.stack([teacher[0]] * 2, 1), 1, seed)[1].any()
    )
    with pytest.raises(RunError, match="0 in all 1 resamples"):
        stats.retention(teacher, teacher, resamples=1, seed=empty)


def test_retention_refuses_other_seeds_and_negative_scores():
    with pytest.raises(ValueError, match="teacher has 2 seeds and student 3"):
        stats.retention(np.ones((3, 4)), np.ones((2, 4)))
    with pytest.raises(ValueError, match="-1 for student and 1 for teacher"):
        stats.retention([[-1.0, 1.0]], [[1.0, 1.0]])


@pytest.mark.parametrize("function", [stats.paired_difference, stats.retention])
def test_paired_functions_refuse_other_cases(function):
    with pytest.raises(ValueError, match=r"\(1, 3\) and \w+ \(1, 2\)"):
        function(np.ones((1, 3)), np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"\(1, 0\) and \w+ \(1, 0\)"):
        function(np.ones((1, 0)), np.ones((1, 0)))
    with pytest.raises(ValueError, match=r"shape \(3,\); wanted \[seeds, cases\]"):
        function(np.ones(3), np.ones((1, 3)))
    with pytest.raises(ValueError, match="1 values that are not finite"):
        function([[1.0, math.nan]], np.ones((1, 2)))


def test_mean_refuses():
    for scores in (np.ones((0, 3)), np.ones((2, 0)), np.ones(3)):
        with pytest.raises(ValueError, match="scores has shape"):
            stats.mean_estimate(scores)
    with pytest.raises(ValueError, match="resamples is 0"):
        stats.mean_estimate([[0.5]], resamples=0)


def test_mcnemar_by_hand():
    # 5 against 1: twice the chance of at most 1 of 6 heads, 2 * 7 / 64
    a = [1] * 5 + [0] + [1, 0]
    b = [0] * 5 + [1] + [1, 0]
    assert stats.mcnemar(a, b) == McNemar(5, 1, pytest.approx(14 / 64))
    assert stats.mcnemar(np.array(b, dtype=bool), np.array(a, dtype=bool)) == McNemar(1, 5, pytest.approx(14 / 64))


def test_mcnemar_against_the_binomial():
    a, b = np.random.default_rng(10).random((2, 300)) < np.array([[0.8], [0.7]])
    result = stats.mcnemar(a, b)
    fewer, n = min(result.only_a, result.only_b), result.only_a + result.only_b
    assert result.only_a == sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    assert result.p_value == pytest.approx(min(1.0, 2 * binom.cdf(fewer, n, 0.5)))


def test_mcnemar_without_a_difference():
    assert stats.mcnemar([True, False], [True, False]) == McNemar(0, 0, 1.0)


def test_mcnemar_refuses():
    with pytest.raises(ValueError, match="a_correct has 2 cases and b_correct 1"):
        stats.mcnemar([1, 0], [1])
    with pytest.raises(ValueError, match="a_correct has 0 cases and b_correct 0"):
        stats.mcnemar([], [])
    with pytest.raises(ValueError, match="b_correct has values other than 0 and 1"):
        stats.mcnemar([1, 0], [1, 0.5])


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 51, 100])
def test_bootstrap_medians_are_those_of_resamples(n):
    # KS on the drawn indices; the p-value bound is the false-alarm bound of each n.
    rng = np.random.default_rng(11)
    values = np.arange(n, dtype=float)
    fast = stats._bootstrap_medians(rng.permutation(values), 20_000, rng)
    plain = np.median(values[rng.integers(0, n, (20_000, n))], axis=1)
    jitter = rng.uniform(-0.25, 0.25, (2, 20_000))
    assert ks_2samp(fast + jitter[0], plain + jitter[1]).pvalue > 1e-3


def test_ratio_of_medians_value_and_coverage():
    assert stats.ratio_of_medians([4.0, 100.0, 2.0], [1.0, 3.0]).value == 2.0
    rng = np.random.default_rng(12)
    trials, hits = 2000, 0
    for trial in range(trials):
        slow, fast = 3 * rng.lognormal(size=80), rng.lognormal(size=101)
        hits += covers(stats.ratio_of_medians(slow, fast, resamples=1000, seed=trial), 3.0)
    assert within(hits, trials, 0.93, 0.975)


def test_ratio_of_means_value_and_coverage():
    assert stats.ratio_of_means([2.0, 4.0], [1.0, 1.0, 4.0]).value == pytest.approx(1.5)
    rng = np.random.default_rng(13)
    trials, hits = 1000, 0
    for trial in range(trials):
        top, bottom = rng.normal(30, 3, 60), rng.normal(10, 1, 80)
        hits += covers(stats.ratio_of_means(top, bottom, resamples=500, seed=trial), 3.0)
    assert within(hits, trials, 0.92, 0.965)


@pytest.mark.parametrize("function", [stats.ratio_of_means, stats.ratio_of_medians])
def test_ratio_resamples_equal_inputs_independently(function):
    values = np.random.default_rng(14).uniform(1, 2, 50)
    estimate = function(values, values)
    assert estimate.value == 1.0
    assert estimate.lo < 0.98
    assert estimate.hi > 1.02
    assert function(values, values) == estimate


@pytest.mark.parametrize("function", [stats.ratio_of_means, stats.ratio_of_medians])
def test_ratio_refuses(function):
    with pytest.raises(ValueError, match="numerator has 0 values and denominator 1"):
        function([], [1.0])
    with pytest.raises(ValueError, match="lowest value of denominator is 0"):
        function([1.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="denominator has shape"):
        function([1.0], [[1.0]])
    with pytest.raises(ValueError, match="numerator has 1 values that are not finite"):
        function([math.inf], [1.0])
    with pytest.raises(ValueError, match="resamples is 0"):
        function([1.0], [1.0], resamples=0)

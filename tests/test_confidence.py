import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attar.evaluate.confidence import expected_calibration_error, reliability, risk_coverage


def test_reliability_and_ece_by_hand():
    confidence = [0.0, 0.1, 0.3, 0.95, 0.85, 1.0]
    correct = [0, 1, 0, 1, 0, 1]
    table = reliability(confidence, correct, bins=5)
    assert [row["n"] for row in table] == [2, 1, 0, 0, 3]
    assert [(row["lo"], row["hi"]) for row in table] == [(0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1)]
    assert table[0]["confidence"] == pytest.approx(0.05)
    assert table[0]["accuracy"] == 0.5
    assert table[2] == {"lo": 0.4, "hi": 0.6, "n": 0, "confidence": None, "accuracy": None}
    assert table[4]["confidence"] == pytest.approx(2.8 / 3)
    assert table[4]["accuracy"] == pytest.approx(2 / 3)
    # (2 * 0.45 + 1 * 0.3 + 3 * 0.8 / 3) / 6
    assert expected_calibration_error(confidence, correct, bins=5) == pytest.approx(2.0 / 6)


def test_reliability_bins_are_closed_above():
    for m in range(1, 11):
        table = reliability([m / 10], [1], bins=10)
        assert [row["n"] for row in table].index(1) == m - 1


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50), st.integers(1, 20))
def test_reliability_keeps_every_case(cases, bins):
    confidence, correct = zip(*cases, strict=True)
    table = reliability(confidence, correct, bins)
    assert sum(row["n"] for row in table) == len(cases)
    assert sum(row["n"] * (row["accuracy"] or 0) for row in table) == pytest.approx(sum(correct))
    assert 0 <= expected_calibration_error(confidence, correct, bins) <= 1


def test_calibrated_confidence_has_little_error():
    rng = np.random.default_rng(15)
    confidence = rng.random(20_000)
    assert expected_calibration_error(confidence, rng.random(20_000) < confidence) < 0.02
    assert expected_calibration_error([1.0, 1.0, 0.0], [1, 1, 0]) == 0.0


def test_reliability_refuses():
    with pytest.raises(ValueError, match="confidence has 1 cases and correct 2"):
        reliability([0.5], [1, 0])
    with pytest.raises(ValueError, match="confidence has 0 cases and correct 0"):
        expected_calibration_error([], [])
    with pytest.raises(ValueError, match=r"confidence runs from 0.5 to 1.5"):
        reliability([0.5, 1.5], [1, 0])
    with pytest.raises(ValueError, match="bins is 0"):
        reliability([0.5], [1], bins=0)
    # what a float32 softmax can give
    assert reliability([1.0 + 1e-7], [1])[-1]["n"] == 1


def test_risk_coverage_by_hand():
    curve = risk_coverage([0.9, 0.2, 0.8, 0.4], [1, 0, 0, 1], points=4)
    assert curve == [
        {"coverage": 0.25, "accuracy": 1.0},
        {"coverage": 0.5, "accuracy": 0.5},
        {"coverage": 0.75, "accuracy": pytest.approx(2 / 3)},
        {"coverage": 1.0, "accuracy": 0.5},
    ]


def test_risk_coverage_rounds_up_to_whole_cases():
    assert [p["coverage"] for p in risk_coverage([3, 2, 1], [1, 1, 0], points=20)] == [
        1 / 3,
        2 / 3,
        1.0,
    ]
    curve = risk_coverage(range(10), [1] * 10, points=3)
    assert [p["coverage"] for p in curve] == [0.4, 0.7, 1.0]


def test_risk_coverage_counts_ties_with_their_expectation():
    # One sure and right, then three equally sure of which one is right: 1, (1 + 1/3)/2, (1 + 2/3)/3, 2/4
    curve = risk_coverage([0.9, 0.5, 0.5, 0.5], [1, 1, 0, 0], points=4)
    assert [p["accuracy"] for p in curve] == pytest.approx([1.0, 2 / 3, 5 / 9, 0.5])


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=30), st.randoms())
def test_risk_coverage_is_free_of_order(cases, random):
    curve = risk_coverage(*zip(*cases, strict=True))
    moved = list(cases)
    random.shuffle(moved)
    assert risk_coverage(*zip(*moved, strict=True)) == curve
    assert curve[-1]["coverage"] == 1.0
    assert curve[-1]["accuracy"] == pytest.approx(np.mean([right for _, right in cases]))
    assert all(0 <= point["accuracy"] <= 1 for point in curve)


def test_risk_coverage_refuses():
    with pytest.raises(ValueError, match="confidence has 1 cases and correct 2"):
        risk_coverage([0.5], [1, 0])
    with pytest.raises(ValueError, match="confidence has 0 cases and correct 0"):
        risk_coverage([], [])
    with pytest.raises(ValueError, match="points is 0"):
        risk_coverage([0.5], [1], points=0)

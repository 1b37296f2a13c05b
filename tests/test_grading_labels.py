import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_recall_fscore_support

from attar.grading.labels import accuracy_scores, confusions_added, macro_f1, per_class

# The machine may be shared, and how long an example takes is not what is tested.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

LABELS = ["a", "b", "c"]
GOLD = ["a", "a", "a", "b", "b", "c"]
PREDICTED = ["a", "a", "b", "b", "a", "b"]

pairs = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=30)


def test_accuracy_by_hand():
    scores = accuracy_scores(GOLD, PREDICTED)
    assert scores.dtype == np.float64
    assert scores.tolist() == [1, 1, 0, 1, 0, 0]


def test_per_class_by_hand():
    scores = per_class(GOLD, PREDICTED, LABELS)
    assert list(scores) == LABELS
    assert scores["a"] == {
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
        "n": 3,
    }
    assert scores["b"] == {"precision": pytest.approx(1 / 3), "recall": 0.5, "f1": pytest.approx(0.4), "n": 2}
    assert scores["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "n": 1}
    assert macro_f1(GOLD, PREDICTED, LABELS) == pytest.approx((2 / 3 + 0.4 + 0) / 3)


@given(pairs)
def test_scores_are_sklearns(cases):
    gold, predicted = map(list, zip(*cases, strict=True))
    precision, recall, f1, n = precision_recall_fscore_support(gold, predicted, labels=LABELS, zero_division=0.0)
    scores = per_class(gold, predicted, LABELS)
    assert [row["precision"] for row in scores.values()] == pytest.approx(precision)
    assert [row["recall"] for row in scores.values()] == pytest.approx(recall)
    assert [row["f1"] for row in scores.values()] == pytest.approx(f1)
    assert [row["n"] for row in scores.values()] == n.tolist()
    # sklearn's own label set is the labels that are gold or predicted somewhere
    assert macro_f1(gold, predicted, LABELS) == pytest.approx(
        f1_score(gold, predicted, average="macro", zero_division=0.0)
    )


def test_macro_f1_leaves_out_labels_that_never_occur():
    assert macro_f1(["a", "b"], ["a", "b"], LABELS) == 1.0
    # but not one that is only predicted: F1 of a 2/3, of b 1, of c 0
    assert macro_f1(["a", "a", "b"], ["a", "c", "b"], LABELS) == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_confusions_added_by_hand():
    gold = ["a"] * 5 + ["b"] * 4 + ["c"] * 2
    student = ["b", "b", "b", "c", "a", "a", "a", "b", "b", "a", "c"]
    teacher = ["b", "a", "a", "c", "a", "a", "a", "a", "b", "c", "c"]
    assert confusions_added(gold, student, teacher) == [
        {"gold": "a", "predicted": "b", "student": 3, "teacher": 1},
        {"gold": "c", "predicted": "a", "student": 1, "teacher": 0},
    ]


def test_confusions_added_breaks_ties_by_label():
    added = confusions_added(["c", "b", "a", "a"], ["a", "a", "c", "b"], ["c", "b", "a", "a"])
    assert [(row["gold"], row["predicted"]) for row in added] == [("a", "b"), ("a", "c"), ("b", "a"), ("c", "a")]


@given(pairs)
def test_an_equal_student_adds_no_confusion(cases):
    gold, predicted = zip(*cases, strict=True)
    assert confusions_added(gold, predicted, predicted) == []


@given(pairs)
def test_against_a_perfect_teacher_every_error_is_added(cases):
    gold, predicted = zip(*cases, strict=True)
    added = confusions_added(gold, predicted, gold)
    assert sum(row["student"] for row in added) == len(gold) - accuracy_scores(gold, predicted).sum()


@pytest.mark.parametrize("function", [macro_f1, per_class])
def test_labels_outside_the_set_are_refused(function):
    with pytest.raises(ValueError, match=r"predicted has \['x'\]; wanted labels out of \['a', 'b', 'c'\]"):
        function(["a", "b"], ["a", "x"], LABELS)
    with pytest.raises(ValueError, match=r"gold has \['x'\]"):
        function(["a", "x"], ["a", "b"], LABELS)
    with pytest.raises(ValueError, match=r"labels repeats \['a'\]"):
        function(["a"], ["a"], ["a", "b", "a"])


def test_lengths_are_checked():
    for function in (accuracy_scores, lambda g, p: macro_f1(g, p, LABELS), lambda g, p: per_class(g, p, LABELS)):
        with pytest.raises(ValueError, match="gold has 2 cases, predicted has 1 cases"):
            function(["a", "b"], ["a"])
        with pytest.raises(ValueError, match="gold has 0 cases, predicted has 0 cases"):
            function([], [])
    with pytest.raises(ValueError, match="gold has 1 cases, student has 1 cases, teacher has 2 cases"):
        confusions_added(["a"], ["a"], ["a", "b"])
    with pytest.raises(ValueError, match="gold has 0 cases"):
        confusions_added([], [], [])

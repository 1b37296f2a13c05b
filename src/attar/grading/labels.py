"""Grading of classifications: predicted labels against gold labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt

__all__ = ["ClassScores", "Confusion", "accuracy_scores", "confusions_added", "macro_f1", "per_class"]


class ClassScores(TypedDict):
    """Scores of one label; `n` is how many cases have it as gold. A score that is 0/0 is given as 0."""

    precision: float
    recall: float
    f1: float
    n: int


class Confusion(TypedDict):
    """How often each model gave `predicted` where `gold` was right."""

    gold: str
    predicted: str
    student: int
    teacher: int


def accuracy_scores(gold: Sequence[str], predicted: Sequence[str]) -> npt.NDArray[np.float64]:
    """Score each case 1 where the predicted label is the gold one, else 0.

    Args:
        gold: [cases].
        predicted: [cases], the same cases in the same order.

    Returns:
        [cases], float64, 0 or 1.

    Raises:
        ValueError: the lengths differ or are 0.
    """
    _check_lengths(gold=gold, predicted=predicted)
    return np.array([g == p for g, p in zip(gold, predicted, strict=True)], dtype=np.float64)


def macro_f1(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> float:
    """Unweighted mean of the labels' F1.

    A label that is neither gold nor predicted anywhere has no F1 (0/0) and is left out of the mean, so that
    predictions without an error score 1 whichever labels the cases happen to cover.

    Args:
        gold: [cases], each in labels.
        predicted: [cases], each in labels.
        labels: the label set.

    Raises:
        ValueError: as `per_class`.
    """
    scores = per_class(gold, predicted, labels)
    seen = set(gold) | set(predicted)
    return float(np.mean([row["f1"] for label, row in scores.items() if label in seen]))


def per_class(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> dict[str, ClassScores]:
    """Precision, recall and F1 of each label.

    Args:
        gold: [cases], each in labels.
        predicted: [cases], each in labels.
        labels: the label set.

    Returns:
        One entry per label, in the order of labels.

    Raises:
        ValueError: the lengths differ or are 0, labels repeats a label, or a gold or predicted label is not in labels.
    """
    _check_lengths(gold=gold, predicted=predicted)
    known = set(labels)
    if len(known) != len(labels):
        raise ValueError(f"labels repeats {sorted(label for label, n in Counter(labels).items() if n > 1)}")
    for name, values in (("gold", gold), ("predicted", predicted)):
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"{name} has {unknown[:5]}; wanted labels out of {list(labels)}")
    right = Counter(g for g, p in zip(gold, predicted, strict=True) if g == p)
    wanted = Counter(gold)
    given = Counter(predicted)
    return {
        label: {
            "precision": _share(right[label], given[label]),
            "recall": _share(right[label], wanted[label]),
            "f1": _share(2 * right[label], wanted[label] + given[label]),
            "n": wanted[label],
        }
        for label in labels
    }


def confusions_added(gold: Sequence[str], student: Sequence[str], teacher: Sequence[str]) -> list[Confusion]:
    """Confusions that the student makes more often than the teacher.

    Args:
        gold: [cases].
        student: [cases], the student's labels for the same cases in the same order.
        teacher: [cases], the teacher's.

    Returns:
        Largest excess first, equal excesses by gold and then predicted label; empty where none was added.

    Raises:
        ValueError: the lengths differ or are 0.
    """
    _check_lengths(gold=gold, student=student, teacher=teacher)
    by_student = Counter((g, s) for g, s in zip(gold, student, strict=True) if g != s)
    by_teacher = Counter((g, t) for g, t in zip(gold, teacher, strict=True) if g != t)
    added = sorted((by_teacher[pair] - n, *pair) for pair, n in by_student.items() if n > by_teacher[pair])
    return [{"gold": g, "predicted": p, "student": by_student[g, p], "teacher": by_teacher[g, p]} for _, g, p in added]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _check_lengths(**columns: Sequence[str]) -> None:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        found = ", ".join(f"{name} has {n} cases" for name, n in lengths.items())
        raise ValueError(f"{found}; wanted as many of each, at least one")

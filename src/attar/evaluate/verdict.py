"""Cost, break-even and the verdict: arithmetic on what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from attar.evaluate.stats import Estimate, ratio_of_means
from attar.recipe import ClassifyEvaluate, Evaluate

__all__ = ["break_even", "cost_per_request", "cost_ratio", "machine_cost", "verdict"]


def machine_cost(settings: Evaluate, seconds: Sequence[float]) -> list[float]:
    """US dollars for so many seconds of the machine, each."""
    return [settings.machine.usd_per_hour / 3600 * second for second in seconds]


def cost_per_request(settings: ClassifyEvaluate, seconds: Sequence[float], api_tokens: float | None) -> list[float]:
    """US dollars for one request, one value a round of the throughput measurement.

    Args:
        settings: prices.
        seconds: machine time for one request in each round, seconds.
        api_tokens: input tokens of one request where the arm is billed by an API's prices; None bills machine time.
    """
    if api_tokens is not None and settings.teacher_api is not None:
        prices = settings.teacher_api
        # A label is one call; its answer is billed as one output token.
        dollars = (api_tokens * prices.input_usd_per_million_tokens + prices.output_usd_per_million_tokens) / 1_000_000
        return [dollars] * len(seconds)
    return machine_cost(settings, seconds)


def cost_ratio(settings: Evaluate, teacher: Sequence[float], student: Sequence[float], seed: int) -> Estimate:
    """What a request costs on the teacher over what it costs on the student."""
    return ratio_of_means(teacher, student, confidence=settings.confidence, resamples=settings.resamples, seed=seed)


def break_even(teacher_usd: float, student_usd: float, one_off_usd: float) -> dict[str, Any]:
    """After how many requests the student has paid for its making.

    Args:
        teacher_usd: one request on the teacher.
        student_usd: one request on the student.
        one_off_usd: the teacher's labels and the training.
    """
    saved = teacher_usd - student_usd
    return {
        "requests": int(np.ceil(one_off_usd / saved)) if saved > 0 else None,
        "teacher_usd_per_1k": teacher_usd * 1000,
        "student_usd_per_1k": student_usd * 1000,
        "one_off_usd": one_off_usd,
        "note": "one-off: labelling and training time of every arm and seed; people's time is not counted"
        if saved > 0
        else "the student costs no less than the teacher, so it never pays back",
    }


def verdict(settings: Evaluate, measured: dict[str, Estimate]) -> tuple[Literal["ship", "hold"], list[str]]:
    """Ship only if the lower end of every interval reaches its threshold.

    Args:
        settings: the thresholds.
        measured: ``retention``, ``speedup`` and ``cost_ratio``.
    """
    reasons = []
    ship = True
    for name, words, style in (
        ("retention", "quality kept", "{:.1%}"),
        ("speedup", "speed-up at p50", "{:,.1f}x"),
        ("cost_ratio", "cost ratio", "{:,.1f}x"),
    ):
        estimate, threshold = measured[name], getattr(settings.ship_if, name)
        reached = estimate.lo >= threshold
        ship &= reached
        value, low, high, wanted = (style.format(x) for x in (estimate.value, estimate.lo, estimate.hi, threshold))
        reasons.append(
            f"{words} {value} (interval {low} to {high}): its lower end "
            f"{'reaches' if reached else 'does not reach'} {wanted}"
        )
    return ("ship" if ship else "hold"), reasons

"""Figures of the report; see ``attar.evaluate.drawing`` for how they are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

from attar.evaluate.drawing import (
    ARMS,
    INK,
    MARKERS,
    MUTED,
    Box,
    as_svg,
    canvas,
    colour,
    free_place,
    is_free,
    label_box,
    log_ticks,
    measured,
    percent,
    percent_ticks,
    spread,
    styled,
    usd,
)

__all__ = ["ARMS", "loss_curve", "percent", "quality_cost", "quality_latency", "reliability", "risk_coverage", "usd"]

# Of the losses of single objectives.
_DASHES = ((7, 2, 1, 2), (3, 1, 1, 1, 1, 1), (1, 2.5), (9, 3))


@styled
def quality_cost(evaluation: Mapping[str, Any]) -> str:
    """Draw quality against cost, every measured arm, with the line that the student has to reach.

    Arms of nearly the same cost are drawn side by side, by at most a few percent of the axis.

    Args:
        evaluation: content of evaluation.json.

    Returns:
        SVG element; "" when no arm has both a quality and a cost above 0 (the axis is logarithmic).
    """
    costs = {arm: value.get("cost_usd_per_1k") for arm, value in measured(evaluation["arms"])}
    return _quality_against(
        evaluation,
        costs,
        "quality-cost",
        ("the cost of 1,000 requests", "cost of 1,000 requests, US$", "cost"),
        "${}",
        usd,
    )


@styled
def quality_latency(evaluation: Mapping[str, Any]) -> str:
    """Draw quality against the median latency, as ``quality_cost`` does against cost."""
    latencies = {arm: (value.get("latency_ms") or {}).get("p50") for arm, value in measured(evaluation["arms"])}
    words = ("the median latency", "median latency, milliseconds", "latency")
    return _quality_against(evaluation, latencies, "quality-latency", words, "{}", lambda value: f"{value:,.3g} ms")


def _quality_against(
    evaluation: Mapping[str, Any],
    prices: Mapping[str, float | None],
    name: str,
    words: tuple[str, str, str],
    ticks: str,
    write: Callable[[float], str],
) -> str:
    """Draw quality against what it takes.

    Args:
        evaluation: content of evaluation.json.
        prices: what each arm takes; None where it was not measured.
        name: of the figure.
        words: what it takes, in a sentence, at the axis, and before "axis".
        ticks: format of a number at the axis.
        write: a price in words.
    """
    points = {
        arm: (float(prices[arm] or 0), value["quality"])
        for arm, value in measured(evaluation["arms"])
        if value.get("quality") and (prices[arm] or 0) > 0
    }
    if not points:
        return ""
    figure, axes = canvas(4.6, 3.2, left=0.155, right=0.975, bottom=0.15, top=0.975)
    logs = [math.log10(cost) for cost, _ in points.values()]
    pad = max(0.12 * (max(logs) - min(logs)), 0.2)
    x_low, x_high = min(logs) - pad, max(logs) + pad
    line = _ship_line(evaluation)
    ends = [end for _, quality in points.values() for end in (*(quality.get("ci") or ()), quality["value"])]
    ends += [] if line is None else [line]
    y_low, y_high = min(ends), max(ends)
    margin = max(0.12 * (y_high - y_low), 0.01)
    y_low, y_high = y_low - margin, y_high + margin
    axes.set(xscale="log", xlim=(10**x_low, 10**x_high), ylim=(y_low, y_high))
    axes.set_xlabel(f"{words[1]} (log scale)")
    axes.set_ylabel(next(iter(points.values()))[1]["metric"].replace("_", " "))
    log_ticks(axes, x_high - x_low, ticks)
    percent_ticks(axes.yaxis)

    wanted = [(math.log10(cost) - x_low) / (x_high - x_low) for cost, _ in points.values()]
    shares = dict(zip(points, spread(wanted, 0.03), strict=True))
    heights = {arm: (quality["value"] - y_low) / (y_high - y_low) for arm, (_, quality) in points.items()}
    taken: list[Box] = []
    if line is not None:
        axes.axhline(line, color=MUTED, linewidth=1, linestyle=(0, (5, 3)))
        height = (line - y_low) / (y_high - y_low)
        taken.append((0.0, height - 0.005, 1.0, height + 0.005))
    for arm, (_, quality) in points.items():
        x = 10 ** (x_low + shares[arm] * (x_high - x_low))
        interval = quality.get("ci")
        if interval:
            axes.plot([x, x], interval, color=colour(arm), linewidth=1.6, solid_capstyle="butt")
            low, high = ((end - y_low) / (y_high - y_low) for end in interval)
            taken.append((shares[arm] - 0.008, low, shares[arm] + 0.008, high))
        axes.plot([x], [quality["value"]], color=colour(arm), marker=MARKERS.get(arm, "X"), markersize=7)
        taken.append((shares[arm] - 0.018, heights[arm] - 0.025, shares[arm] + 0.018, heights[arm] + 0.025))
    if line is not None:
        text = f"ship line {percent(line)}"
        places = [(0.985 - 0.05 * i, height + shift) for i in range(14) for shift in (0.045, -0.045)]
        x, y = next((place for place in places if is_free(label_box(text, *place, -1), taken)), places[0])
        style = {"ha": "right", "va": "center_baseline", "color": MUTED, "parse_math": False}
        axes.text(x, y, text, transform=axes.transAxes, **style)
        taken.append(label_box(text, x, y, -1))
    for arm, (_, quality) in sorted(points.items(), key=lambda item: -heights[item[0]]):
        text = f"{arm} {percent(quality['value'])}"
        side, label = free_place(text, shares[arm], heights[arm], taken)
        edge = shares[arm] + side * 0.03
        if abs(label - heights[arm]) > 0.01:
            axes.plot(
                [shares[arm] + side * 0.008, edge - side * 0.005],
                [heights[arm], label],
                color=colour(arm),
                linewidth=0.7,
                transform=axes.transAxes,
            )
        axes.text(
            edge,
            label,
            text,
            ha="left" if side > 0 else "right",
            va="center_baseline",
            transform=axes.transAxes,
            parse_math=False,
            fontweight="bold" if arm == "student" else "normal",
        )
        taken.append(label_box(text, edge, label, side))

    said = [
        f"{arm} {percent(quality['value'])}{_between(quality.get('ci'))} at {write(cost)}"
        for arm, (cost, quality) in points.items()
    ]
    ship = "" if line is None else f" The student has to reach the ship line at {percent(line)}."
    return as_svg(figure, name, f"Quality against {words[0]}, log {words[2]} axis: {'; '.join(said)}.{ship}")


@styled
def reliability(evaluation: Mapping[str, Any]) -> str:
    """Draw how often each model is right where it claims a given confidence.

    Args:
        evaluation: content of evaluation.json.

    Returns:
        SVG element; "" when no arm has a calibration.
    """
    arms = [(arm, value) for arm, value in measured(evaluation["calibration"]) if value.get("bins")]
    if not arms:
        return ""
    figure, axes = canvas(4.6, 3.8, left=0.165, right=0.965, bottom=0.13, top=0.975)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (5, 3)))
    axes.set(xlim=(0, 1.015), ylim=(0, 1.03), xlabel="confidence that the model gives", ylabel="share that is right")
    for arm, value in arms:
        bins = [part for part in value["bins"] if part["n"] and part["confidence"] is not None]
        total = sum(part["n"] for part in bins)
        x, y = [part["confidence"] for part in bins], [part["accuracy"] for part in bins]
        axes.plot(x, y, color=colour(arm), linewidth=1.2)
        sizes = [14 + 130 * part["n"] / total for part in bins]
        axes.scatter(x, y, sizes, color=colour(arm), marker=MARKERS.get(arm, "X"), linewidths=0, zorder=3)
        axes.plot([], [], color=colour(arm), marker=MARKERS.get(arm, "X"), markersize=6, label=arm)
    axes.legend(loc="upper left", frameon=False, labelcolor=INK)
    percent_ticks(axes.xaxis)
    percent_ticks(axes.yaxis)
    said = "; ".join(f"{arm} has an expected calibration error of {percent(value['ece'])}" for arm, value in arms)
    return as_svg(
        figure,
        "reliability",
        f"Reliability: share of right answers against confidence; on the diagonal confidence can be taken at its word. "
        f"{said}.",
    )


@styled
def risk_coverage(evaluation: Mapping[str, Any]) -> str:
    """Draw the accuracy on the share of the cases that a model is surest of.

    Args:
        evaluation: content of evaluation.json.

    Returns:
        SVG element; "" when no arm has a curve.
    """
    arms = measured(evaluation["risk_coverage"])
    if not arms:
        return ""
    figure, axes = canvas(4.6, 3.8, left=0.165, right=0.81, bottom=0.13, top=0.975)
    axes.set(xlabel="share of the requests answered", ylabel="share of these that is right", xlim=(0, 1))
    for arm, curve in arms:
        x, y = [point["coverage"] for point in curve], [point["accuracy"] for point in curve]
        axes.plot(x, y, color=colour(arm), linewidth=1.6)
    low, high = axes.get_ylim()
    low, high = low - 0.02 * (high - low), high + 0.02 * (high - low)
    axes.set_ylim(low, high)
    wanted = [(curve[-1]["accuracy"] - low) / (high - low) for _, curve in arms]
    for (arm, curve), height, label in zip(arms, wanted, spread(wanted, 0.062), strict=True):
        end = curve[-1]["coverage"]
        style = {"color": colour(arm), "transform": axes.transAxes, "clip_on": False}
        axes.plot([end, 1.035], [height, label], linewidth=0.7, **style)
        axes.plot([1.035], [label], marker=MARKERS.get(arm, "X"), markersize=5, **style)
        axes.text(1.06, label, arm, va="center_baseline", transform=axes.transAxes, parse_math=False)
    percent_ticks(axes.xaxis)
    percent_ticks(axes.yaxis)
    said = "; ".join(
        f"{arm} from {percent(curve[0]['accuracy'])} on the surest {percent(curve[0]['coverage'], 0)} "
        f"to {percent(curve[-1]['accuracy'])} on {percent(curve[-1]['coverage'], 0)}"
        for arm, curve in arms
    )
    return as_svg(figure, "risk-coverage", f"Accuracy on the share of the cases that the model is surest of: {said}.")


@styled
def loss_curve(arm: str, curve: Sequence[Mapping[str, Any]]) -> str:
    """Draw the losses of one training.

    Args:
        arm: which arm was trained.
        curve: points with a step and, where measured, loss, eval_loss, eval_kl and, for each objective,
            ``loss_<objective>``; these are drawn where there are several.

    Returns:
        SVG element; "" when nothing was measured.
    """
    lines = {}
    objectives = sorted({key for point in curve for key in point if key.startswith("loss_")})
    if len(objectives) < 2:
        objectives = []
    for key in ("loss", "eval_loss", "eval_kl", *objectives):
        points = [(point["step"], point[key]) for point in curve if point.get(key) is not None]
        if points:
            lines[key] = points
    if not lines:
        return ""
    figure, axes = canvas(4.6, 3.0, left=0.14, right=0.975, bottom=0.165, top=0.965)
    axes.set(xlabel="step", ylabel="loss, nats")
    names = {"loss": "training loss", "eval_loss": "held-out loss", "eval_kl": "held-out KL from the teacher"}
    names |= {key: f"{key.removeprefix('loss_').replace('_', ' ')} in training" for key in objectives}
    styles: dict[str, Any] = {"loss": "-", "eval_loss": (0, (5, 2)), "eval_kl": (0, (1.2, 1.6))}
    styles |= {key: (0, dashes) for key, dashes in zip(objectives, cycle(_DASHES), strict=False)}
    for key, points in lines.items():
        x, y = zip(*points, strict=True)
        width = 1.9 if key.startswith("eval") else 1.0
        mark = "." if len(points) == 1 else ""
        axes.plot(x, y, color=colour(arm), linestyle=styles[key], linewidth=width, marker=mark, label=names[key])
    low = min(0.0, axes.get_ylim()[0])
    axes.set_ylim(low, axes.get_ylim()[1])
    axes.legend(loc="upper right", frameon=False, labelcolor=INK, handlelength=2.6)
    said = "; ".join(
        f"{names[key]} from {points[0][1]:.3g} to {points[-1][1]:.3g}, lowest {min(y for _, y in points):.3g}"
        for key, points in lines.items()
    )
    return as_svg(figure, f"loss-{arm}", f"Losses while the {arm} was trained, {curve[-1]['step']:,} steps: {said}.")


def _ship_line(evaluation: Mapping[str, Any]) -> float | None:
    teacher = evaluation["arms"].get("teacher")
    return evaluation["thresholds"]["retention"] * teacher["quality"]["value"] if teacher else None


def _between(interval: Sequence[float] | None) -> str:
    return f" (interval {percent(interval[0])} to {percent(interval[1])})" if interval else ""

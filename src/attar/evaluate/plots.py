"""Figures of the report: matplotlib drawings as SVG text to stand inside an HTML page.

Colours are left to the page's style sheet. matplotlib draws in sentinel colours, which are replaced by `currentColor`
and by CSS variables, so that one drawing serves light, dark and print. An arm has the same colour and the same marker
in every figure; the marker is there for readers who cannot tell the colours apart.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec

__all__ = ["ARMS", "loss_curve", "percent", "quality_cost", "reliability", "risk_coverage", "usd"]

ARMS = ("teacher", "student", "control", "baseline", "base", "prompted")

_INK = "#010203"
_MUTED = "#010204"
_RULE = "#010205"
_PAPER = "#010206"
_ARM_COLOURS = {arm: f"#0102{0xA0 + i:x}" for i, arm in enumerate(ARMS)}
_OTHER = "#0102f0"
_MARKERS = dict(zip(ARMS, ("s", "o", "^", "D", "v", "P"), strict=True))
_CSS = {
    _INK: "currentColor",
    _MUTED: "var(--muted)",
    _RULE: "var(--rule)",
    _PAPER: "var(--paper)",
    _OTHER: "var(--arm-other)",
} | {colour: f"var(--arm-{arm})" for arm, colour in _ARM_COLOURS.items()}

_NBSP = "\u00a0"


def percent(share: float, digits: int = 1) -> str:
    """Write a share as a percentage, 0.873 as "87.3 %" with a no-break space."""
    return f"{100 * share:.{digits}f}{_NBSP}%"


def usd(amount: float) -> str:
    """Write an amount of US dollars: cents from one dollar up, two significant digits below."""
    if amount == 0:
        return "$0"
    if abs(amount) >= 1:
        return f"${amount:,.2f}" if abs(amount) < 1000 else f"${amount:,.0f}"
    return f"${amount:.{1 - math.floor(math.log10(abs(amount)))}f}"


_STYLE = {
    "svg.hashsalt": "attar",
    "svg.fonttype": "none",
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "legend.fontsize": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "text.usetex": False,
}

P = ParamSpec("P")


def _styled(draw: Callable[P, str]) -> Callable[P, str]:
    """Draw with matplotlib's own defaults and these settings, whatever the user's matplotlibrc says."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> str:
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcParams.update({k: v for k, v in matplotlib.rcParamsDefault.items() if k != "backend"})
            matplotlib.rcParams.update(_STYLE)
            return draw(*args, **kwargs)

    return styled


@_styled
def quality_cost(evaluation: Mapping[str, Any]) -> str:
    """Draw quality against cost, every measured arm, with the line that the student has to reach.

    Arms of nearly the same cost are drawn side by side, by at most a few percent of the axis.

    Args:
        evaluation: content of evaluation.json.

    Returns:
        SVG element; "" when no arm has both a quality and a cost above 0 (the axis is logarithmic).
    """
    points = {
        arm: (float(value["cost_usd_per_1k"]), value["quality"])
        for arm, value in _measured(evaluation["arms"])
        if value.get("quality") and (value.get("cost_usd_per_1k") or 0) > 0
    }
    if not points:
        return ""
    figure, axes = _figure(4.6, 3.2, left=0.155, right=0.975, bottom=0.15, top=0.975)
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
    axes.set_xlabel("cost of 1,000 requests, US$ (log scale)")
    axes.set_ylabel(next(iter(points.values()))[1]["metric"].replace("_", " "))
    _dollar_ticks(axes, x_high - x_low)
    _percent_ticks(axes.yaxis)

    wanted = [(math.log10(cost) - x_low) / (x_high - x_low) for cost, _ in points.values()]
    shares = dict(zip(points, _spread(wanted, 0.03), strict=True))
    heights = {arm: (quality["value"] - y_low) / (y_high - y_low) for arm, (_, quality) in points.items()}
    taken: list[_Box] = []
    if line is not None:
        axes.axhline(line, color=_MUTED, linewidth=1, linestyle=(0, (5, 3)))
        height = (line - y_low) / (y_high - y_low)
        taken.append((0.0, height - 0.005, 1.0, height + 0.005))
    for arm, (_, quality) in points.items():
        x = 10 ** (x_low + shares[arm] * (x_high - x_low))
        interval = quality.get("ci")
        if interval:
            axes.plot([x, x], interval, color=_colour(arm), linewidth=1.6, solid_capstyle="butt")
            low, high = ((end - y_low) / (y_high - y_low) for end in interval)
            taken.append((shares[arm] - 0.008, low, shares[arm] + 0.008, high))
        axes.plot([x], [quality["value"]], color=_colour(arm), marker=_MARKERS.get(arm, "X"), markersize=7)
        taken.append((shares[arm] - 0.018, heights[arm] - 0.025, shares[arm] + 0.018, heights[arm] + 0.025))
    if line is not None:
        words = f"ship line {percent(line)}"
        places = [(0.985 - 0.05 * i, height + shift) for i in range(14) for shift in (0.045, -0.045)]
        x, y = next((place for place in places if _is_free(_box(words, *place, -1), taken)), places[0])
        style = {"ha": "right", "va": "center_baseline", "color": _MUTED, "parse_math": False}
        axes.text(x, y, words, transform=axes.transAxes, **style)
        taken.append(_box(words, x, y, -1))
    for arm, (_, quality) in sorted(points.items(), key=lambda item: -heights[item[0]]):
        words = f"{arm} {percent(quality['value'])}"
        side, label = _free_place(words, shares[arm], heights[arm], taken)
        edge = shares[arm] + side * 0.03
        if abs(label - heights[arm]) > 0.01:
            axes.plot(
                [shares[arm] + side * 0.008, edge - side * 0.005],
                [heights[arm], label],
                color=_colour(arm),
                linewidth=0.7,
                transform=axes.transAxes,
            )
        axes.text(
            edge,
            label,
            words,
            ha="left" if side > 0 else "right",
            va="center_baseline",
            transform=axes.transAxes,
            parse_math=False,
            fontweight="bold" if arm == "student" else "normal",
        )
        taken.append(_box(words, edge, label, side))

    said = [
        f"{arm} {percent(quality['value'])}{_between(quality.get('ci'))} at {usd(cost)}"
        for arm, (cost, quality) in points.items()
    ]
    ship = "" if line is None else f" The student has to reach the ship line at {percent(line)}."
    return _svg(
        figure, "quality-cost", f"Quality against the cost of 1,000 requests, log cost axis: {'; '.join(said)}.{ship}"
    )


@_styled
def reliability(evaluation: Mapping[str, Any]) -> str:
    """Draw how often each model is right where it claims a given confidence.

    Args:
        evaluation: content of evaluation.json.

    Returns:
        SVG element; "" when no arm has a calibration.
    """
    arms = [(arm, value) for arm, value in _measured(evaluation["calibration"]) if value.get("bins")]
    if not arms:
        return ""
    figure, axes = _figure(4.6, 3.8, left=0.165, right=0.965, bottom=0.13, top=0.975)
    axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (5, 3)))
    axes.set(xlim=(0, 1.015), ylim=(0, 1.03), xlabel="confidence that the model gives", ylabel="share that is right")
    for arm, value in arms:
        bins = [part for part in value["bins"] if part["n"] and part["confidence"] is not None]
        total = sum(part["n"] for part in bins)
        x, y = [part["confidence"] for part in bins], [part["accuracy"] for part in bins]
        axes.plot(x, y, color=_colour(arm), linewidth=1.2)
        sizes = [14 + 130 * part["n"] / total for part in bins]
        axes.scatter(x, y, sizes, color=_colour(arm), marker=_MARKERS.get(arm, "X"), linewidths=0, zorder=3)
        axes.plot([], [], color=_colour(arm), marker=_MARKERS.get(arm, "X"), markersize=6, label=arm)
    axes.legend(loc="upper left", frameon=False, labelcolor=_INK)
    _percent_ticks(axes.xaxis)
    _percent_ticks(axes.yaxis)
    said = "; ".join(f"{arm} has an expected calibration error of {percent(value['ece'])}" for arm, value in arms)
    return _svg(
        figure,
        "reliability",
        f"Reliability: share of right answers against confidence; on the diagonal confidence can be taken at its word. "
        f"{said}.",
    )


@_styled
def risk_coverage(evaluation: Mapping[str, Any]) -> str:
    """Draw the accuracy on the share of the cases that a model is surest of.

    Args:
        evaluation: content of evaluation.json.

    Returns:
        SVG element; "" when no arm has a curve.
    """
    arms = _measured(evaluation["risk_coverage"])
    if not arms:
        return ""
    figure, axes = _figure(4.6, 3.8, left=0.165, right=0.81, bottom=0.13, top=0.975)
    axes.set(xlabel="share of the requests answered", ylabel="share of these that is right", xlim=(0, 1))
    for arm, curve in arms:
        x, y = [point["coverage"] for point in curve], [point["accuracy"] for point in curve]
        axes.plot(x, y, color=_colour(arm), linewidth=1.6)
    low, high = axes.get_ylim()
    low, high = low - 0.02 * (high - low), high + 0.02 * (high - low)
    axes.set_ylim(low, high)
    wanted = [(curve[-1]["accuracy"] - low) / (high - low) for _, curve in arms]
    for (arm, curve), height, label in zip(arms, wanted, _spread(wanted, 0.062), strict=True):
        end = curve[-1]["coverage"]
        style = {"color": _colour(arm), "transform": axes.transAxes, "clip_on": False}
        axes.plot([end, 1.035], [height, label], linewidth=0.7, **style)
        axes.plot([1.035], [label], marker=_MARKERS.get(arm, "X"), markersize=5, **style)
        axes.text(1.06, label, arm, va="center_baseline", transform=axes.transAxes, parse_math=False)
    _percent_ticks(axes.xaxis)
    _percent_ticks(axes.yaxis)
    said = "; ".join(
        f"{arm} from {percent(curve[0]['accuracy'])} on the surest {percent(curve[0]['coverage'], 0)} "
        f"to {percent(curve[-1]['accuracy'])} on {percent(curve[-1]['coverage'], 0)}"
        for arm, curve in arms
    )
    return _svg(figure, "risk-coverage", f"Accuracy on the share of the cases that the model is surest of: {said}.")


@_styled
def loss_curve(arm: str, curve: Sequence[Mapping[str, Any]]) -> str:
    """Draw the losses of one training.

    Args:
        arm: which arm was trained.
        curve: points with a step and, where measured, loss, eval_loss and eval_kl.

    Returns:
        SVG element; "" when nothing was measured.
    """
    lines = {}
    for key in ("loss", "eval_loss", "eval_kl"):
        points = [(point["step"], point[key]) for point in curve if point.get(key) is not None]
        if points:
            lines[key] = points
    if not lines:
        return ""
    figure, axes = _figure(4.6, 3.0, left=0.14, right=0.975, bottom=0.165, top=0.965)
    axes.set(xlabel="step", ylabel="loss, nats")
    names = {"loss": "training loss", "eval_loss": "held-out loss", "eval_kl": "held-out KL from the teacher"}
    styles: dict[str, Any] = {"loss": "-", "eval_loss": (0, (5, 2)), "eval_kl": (0, (1.2, 1.6))}
    for key, points in lines.items():
        x, y = zip(*points, strict=True)
        width = 1.0 if key == "loss" else 1.9
        mark = "." if len(points) == 1 else ""
        axes.plot(x, y, color=_colour(arm), linestyle=styles[key], linewidth=width, marker=mark, label=names[key])
    low = min(0.0, axes.get_ylim()[0])
    axes.set_ylim(low, axes.get_ylim()[1])
    axes.legend(loc="upper right", frameon=False, labelcolor=_INK, handlelength=2.6)
    said = "; ".join(
        f"{names[key]} from {points[0][1]:.3g} to {points[-1][1]:.3g}, lowest {min(y for _, y in points):.3g}"
        for key, points in lines.items()
    )
    return _svg(figure, f"loss-{arm}", f"Losses while the {arm} was trained, {curve[-1]['step']:,} steps: {said}.")


_Box = tuple[float, float, float, float]


def _measured(arms: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Arms that hold something, in one order for every figure."""
    known = [arm for arm in ARMS if arms.get(arm)]
    return [(arm, arms[arm]) for arm in [*known, *sorted(arm for arm in arms if arm not in ARMS and arms[arm])]]


def _colour(arm: str) -> str:
    return _ARM_COLOURS.get(arm, _OTHER)


def _ship_line(evaluation: Mapping[str, Any]) -> float | None:
    teacher = evaluation["arms"].get("teacher")
    return evaluation["thresholds"]["retention"] * teacher["quality"]["value"] if teacher else None


def _between(interval: Sequence[float] | None) -> str:
    return f" (interval {percent(interval[0])} to {percent(interval[1])})" if interval else ""


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places at least `gap` apart, in the order of the wanted ones and balanced around them."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    up = [wanted[i] for i in order]
    down = list(up)
    for i in range(1, len(up)):
        up[i] = max(up[i], up[i - 1] + gap)
    for i in range(len(down) - 2, -1, -1):
        down[i] = min(down[i], down[i + 1] - gap)
    places = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        places[i] = (up[rank] + down[rank]) / 2
    return places


def _box(words: str, x: float, y: float, side: int) -> _Box:
    """Room that a label needs, in shares of the axes; the page's font is not known here, so it is a guess."""
    width = 0.0192 * len(words)
    return (x, y - 0.034, x + width, y + 0.034) if side > 0 else (x - width, y - 0.034, x, y + 0.034)


def _is_free(box: _Box, taken: Sequence[_Box]) -> bool:
    left, low, right, high = box
    inside = left >= 0.01 and right <= 1.0 and low >= 0.01 and high <= 0.99
    return inside and not any(left < b[2] and b[0] < right and low < b[3] and b[1] < high for b in taken)


def _free_place(words: str, x: float, y: float, taken: Sequence[_Box]) -> tuple[int, float]:
    """Side (1 right, -1 left) and height of the nearest label that covers nothing; if none, beside the point."""
    for shift in sorted((0.035 * i for i in range(-14, 15)), key=abs):
        for side in (1, -1):
            if _is_free(_box(words, x + side * 0.03, y + shift, side), taken):
                return side, y + shift
    return (1, y) if x < 0.5 else (-1, y)


def _figure(width: float, height: float, **edges: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    figure.subplots_adjust(**edges)
    axes.patch.set_alpha(0)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_MUTED)
    axes.grid(color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(color=_MUTED, labelcolor=_INK, length=3)
    return figure, axes


def _percent_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 2):g}{_NBSP}%"))


def _dollar_ticks(axes: Any, decades: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"${value:.6f}".rstrip("0").rstrip(".")))


def _svg(figure: Any, name: str, said: str) -> str:
    """Write a figure as one <svg> element whose ids are its own and whose colours are the page's."""
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    svg = target.getvalue()
    svg = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="([^"]+)"', svg)
    assert view is not None
    body = svg[svg.index(">") + 1 : svg.rindex("</svg>")]
    # its <style> would apply to the whole page; metadata and comments serve nobody here
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub("|".join(_CSS), lambda found: _CSS[found.group()], body)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r'xlink:href="#', f'href="#{name}-', body)
    body = body.replace("font-family: 'DejaVu Sans'; ", "")
    body = re.sub(r"font: (\S+) (\S+) 'DejaVu Sans'", r"font-weight: \1; font-size: \2", body)
    return f'<svg class="plot" role="img" aria-label="{html.escape(said)}" viewBox="{view.group(1)}">{body}</svg>\n'

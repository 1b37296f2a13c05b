"""How figures are drawn: matplotlib drawings as SVG text to stand inside an HTML page.

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

__all__ = [
    "ARMS",
    "INK",
    "MARKERS",
    "MUTED",
    "Box",
    "as_svg",
    "canvas",
    "colour",
    "free_place",
    "is_free",
    "label_box",
    "log_ticks",
    "measured",
    "percent",
    "percent_ticks",
    "spread",
    "styled",
    "usd",
]

ARMS = ("teacher", "student", "control", "baseline", "base", "prompted")

INK = "#010203"
MUTED = "#010204"
RULE = "#010205"
PAPER = "#010206"
_ARM_COLOURS = {arm: f"#0102{0xA0 + i:x}" for i, arm in enumerate(ARMS)}
_OTHER = "#0102f0"
MARKERS = dict(zip(ARMS, ("s", "o", "^", "D", "v", "P"), strict=True))
_CSS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    PAPER: "var(--paper)",
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
    "text.color": INK,
    "axes.labelcolor": INK,
    "text.usetex": False,
}

P = ParamSpec("P")


def styled(draw: Callable[P, str]) -> Callable[P, str]:
    """Draw with matplotlib's own defaults and these settings, whatever the user's matplotlibrc says."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> str:
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcParams.update({k: v for k, v in matplotlib.rcParamsDefault.items() if k != "backend"})
            matplotlib.rcParams.update(_STYLE)
            return draw(*args, **kwargs)

    return styled


Box = tuple[float, float, float, float]


def measured(arms: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Arms that hold something, in one order for every figure."""
    known = [arm for arm in ARMS if arms.get(arm)]
    return [(arm, arms[arm]) for arm in [*known, *sorted(arm for arm in arms if arm not in ARMS and arms[arm])]]


def colour(arm: str) -> str:
    """The sentinel of an arm's colour."""
    return _ARM_COLOURS.get(arm, _OTHER)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
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


def label_box(words: str, x: float, y: float, side: int) -> Box:
    """Room that a label needs, in shares of the axes; the page's font is not known here, so it is a guess."""
    width = 0.0192 * len(words)
    return (x, y - 0.034, x + width, y + 0.034) if side > 0 else (x - width, y - 0.034, x, y + 0.034)


def is_free(box: Box, taken: Sequence[Box]) -> bool:
    """Whether a box lies inside the axes and touches none of the others."""
    left, low, right, high = box
    inside = left >= 0.01 and right <= 1.0 and low >= 0.01 and high <= 0.99
    return inside and not any(left < b[2] and b[0] < right and low < b[3] and b[1] < high for b in taken)


def free_place(words: str, x: float, y: float, taken: Sequence[Box]) -> tuple[int, float]:
    """Side (1 right, -1 left) and height of the nearest label that covers nothing; if none, beside the point."""
    for shift in sorted((0.035 * i for i in range(-14, 15)), key=abs):
        for side in (1, -1):
            if is_free(label_box(words, x + side * 0.03, y + shift, side), taken):
                return side, y + shift
    return (1, y) if x < 0.5 else (-1, y)


def canvas(width: float, height: float, **edges: float) -> tuple[Any, Any]:
    """A figure and its axes, in inches; ``edges`` are shares of the figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    figure.subplots_adjust(**edges)
    axes.patch.set_alpha(0)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(MUTED)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(color=MUTED, labelcolor=INK, length=3)
    return figure, axes


def percent_ticks(axis: Any) -> None:
    """Write an axis of shares in percent."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 2):g}{_NBSP}%"))


def log_ticks(axes: Any, decades: float, write: str) -> None:
    """Write a logarithmic x axis that spans so many decades; ``write`` formats a number with 6 digits."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: write.format(f"{value:.6f}".rstrip("0").rstrip("."))))


def as_svg(figure: Any, name: str, said: str) -> str:
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

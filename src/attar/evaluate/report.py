"""The report: an evaluation put into one HTML file and into a short JSON summary.

Nothing is measured or estimated here. What the report says was stored by the evaluate stage; this module sorts it,
writes numbers the way people read them, and says in words what an interval or a p-value means.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from attar.evaluate import plots
from attar.evaluate.plots import percent, usd
from attar.recipe import Recipe
from attar.workspace import Run, write_atomic, write_json

__all__ = ["render_html", "report", "summary"]

MISSING = "–"
_NBSP = "\u00a0"
_MINUS = "\u2212"
_LABELS_SHOWN = 4
# Metric of a chat task and the filter that writes it, in the order of the page's columns.
_METRIC_COLUMNS = (
    ("kl_to_teacher", "significant"),
    ("bits_per_byte", "significant"),
    ("top1_agreement", "percent"),
    ("greedy_exact", "percent"),
    ("greedy_prefix", "percent"),
    ("exact_match", "percent"),
)
# Metric of an agent's episodes, and of its single steps, the filter that writes it, and what the column is called.
_AGENT_COLUMNS = (
    ("success", "percent", "Success"),
    ("steps", "significant", "Steps"),
    ("completion_tokens", "significant", "Tokens written"),
    ("prompt_tokens", "significant", "Tokens read"),
    ("tool_errors", "significant", "Failed calls"),
    ("finished", "percent", "Ended by itself"),
)
_STEP_COLUMNS = (
    ("acceptable", "percent", "Does what the teacher did"),
    ("same_kind", "percent", "Calls where it called"),
    ("same_tools", "percent", "The same tools"),
    ("valid", "percent", "Calls fit their schema"),
    ("hallucinated", "percent", "Calls no tool on offer"),
)
_GAINS = {
    "classify": {
        "control": {
            "title": "Over the control: the same student trained on hard labels only",
            "above": "Soft labels beat hard labels here: the whole interval is above 0.",
            "within": "Soft labels did not beat hard labels here: the interval includes 0.",
            "below": "Soft labels did worse than hard labels here: the whole interval is below 0.",
        },
        "baseline": {
            "title": "Over the baseline",
            "above": "The student beat the baseline here: the whole interval is above 0.",
            "within": "The student did not beat the baseline here: the interval includes 0.",
            "below": "The student did worse than the baseline here: the whole interval is below 0.",
        },
    },
    "chat": {
        "control": {
            "title": "Over the control: the same student trained on the reference’s tokens only",
            "above": "Learning from the teacher beat learning from the text here: the whole interval is above 0.",
            "within": "Learning from the teacher did not beat learning from the text here: the interval includes 0.",
            "below": "Learning from the teacher did worse than from the text here: the whole interval is below 0.",
        },
        "base": {
            "title": "Over the base: the same student untrained",
            "above": "Training made the student better: the whole interval is above 0.",
            "within": "Training did not make the student better: the interval includes 0.",
            "below": "Training made the student worse: the whole interval is below 0.",
        },
    },
    "agent": {
        "control": {
            "title": "Over the control: the same student trained on the same number of tokens, without relabelling",
            "above": "It beat plain behaviour cloning here: the whole interval is above 0.",
            "within": "It did not beat plain behaviour cloning here: the interval includes 0.",
            "below": "It did worse than plain behaviour cloning here: the whole interval is below 0.",
        },
        "prompted": {
            "title": "Over the prompt: the untrained student that is shown episodes",
            "above": "Training beat a prompt here: the whole interval is above 0.",
            "within": "Training did not beat a prompt here: the interval includes 0.",
            "below": "Training did worse than a prompt here: the whole interval is below 0.",
        },
        "base": {
            "title": "Over the base: the same student untrained",
            "above": "Training made the student better: the whole interval is above 0.",
            "within": "Training did not make the student better: the interval includes 0.",
            "below": "Training made the student worse: the whole interval is below 0.",
        },
    },
}
"""Task -> arm -> what is said of the student's gain over it."""
_ARM_KEYS = ("quality", "throughput_per_s", "memory_mb", "parameters", "cost_usd_per_1k")


def summary(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Pick the content of report.json, for scripts that compare runs.

    Args:
        evaluation: content of evaluation.json.

    Returns:
        A new dict that shares nothing with `evaluation`. An arm that was not measured is null, and `null_arms` says
        why.
    """
    arms = evaluation["arms"]
    student = arms.get("student") or {}
    same = ("schema", "name", "task", "verdict", "reasons")
    result: dict[str, Any] = {key: evaluation[key] for key in same}
    result["arms"] = {arm: _arm_summary(value) if value else None for arm, value in arms.items()}
    result["null_arms"] = evaluation["null_arms"]
    result["retention"] = evaluation["retention"]
    result["gain_over_control"] = evaluation["gain_over_control"]
    if evaluation["task"] == "classify":
        result["metrics"] = {"macro_f1": {arm: value.get("macro_f1") for arm, value in arms.items() if value}}
    else:
        result |= {key: evaluation[key] for key in ("gain_over_base", "metrics", "metrics_ci")}
    result["speedup_p50"] = (evaluation["speedup_p50"] or {}).get("value")
    result["cost_ratio"] = (evaluation["cost_ratio"] or {}).get("value")
    result["break_even"] = evaluation["break_even"]
    result["seeds"] = [entry["seed"] for entry in student.get("seeds") or ()]
    result["agreement"] = evaluation["agreement"]
    result["calibration"] = {arm: value["ece"] for arm, value in evaluation["calibration"].items() if value}
    result |= {key: evaluation[key] for key in ("spend", "data", "provenance")}
    return copy.deepcopy(result)


def render_html(evaluation: dict[str, Any]) -> str:
    """Write the report as one HTML page that needs no other file, no script and no network.

    Args:
        evaluation: content of evaluation.json.

    Returns:
        The page; the same evaluation gives the same text.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("attar.evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _or_missing(percent),
        "usd": _or_missing(usd),
        "times": _or_missing(_times),
        "points": _or_missing(_points),
        "threshold": _or_missing(_threshold),
        "moment": _moment,
        "integer": _or_missing(_integer),
        "significant": _or_missing(_significant),
        "big": _or_missing(_big),
        "words": lambda name: str(name).replace("_", " "),
    }
    environment.filters["pretty"] = lambda value, name: environment.filters[name](value)
    arms = evaluation["arms"]
    curves = ((arm, plots.loss_curve(arm, curve)) for arm, curve in _ordered(evaluation["curves"]) if curve)
    of_task = {"classify": _classify, "chat": _chat, "agent": _agent}[evaluation["task"]](evaluation)
    figures = {name: Markup(svg) for name, svg in of_task.pop("plots").items()}
    template = environment.get_template("report.html.j2")
    return template.render(
        e=evaluation,
        arms=_ordered(arms),
        interval_name=f"{percent(evaluation['confidence'], 0)} interval"
        if evaluation.get("confidence")
        else "interval",
        gains=_gains(evaluation),
        plots={**figures, "curves": [(arm, Markup(svg)) for arm, svg in curves if svg]},
        **of_task,
    )


def _classify(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What the page of a classify task shows beside what every page shows."""
    alpha = 1 - (evaluation.get("confidence") or 0.95)
    return {
        "axis": {"what": "the cost of 1,000 requests", "word": "cost"},
        "cases_called": "test cases",
        "calibration": [(arm, value) for arm, value in _ordered(evaluation["calibration"]) if value],
        "mcnemar": [_mcnemar_words(pair, test, alpha) for pair, test in (evaluation["mcnemar"] or {}).items() if test],
        "per_class": _per_class(evaluation),
        "confusions": sorted(evaluation["confusions_added"], key=lambda c: (c["teacher"] - c["student"], c["gold"])),
        "disagreements": [_disagreement(case) for case in evaluation["disagreements"]],
        "plots": {
            "quality": plots.quality_cost(evaluation),
            "reliability": plots.reliability(evaluation),
            "risk_coverage": plots.risk_coverage(evaluation),
        },
    }


def _chat(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What the page of a chat task shows beside what every page shows."""
    return {
        "axis": {"what": "the median time of a request", "word": "latency"},
        "cases_called": "held-out conversations",
        "mcnemar": [],
        "metric_columns": _METRIC_COLUMNS,
        "plots": {"quality": plots.quality_latency(evaluation)},
    }


def _agent(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What the page of an agent task shows beside what every page shows."""
    return {
        "axis": {"what": "the median time of a step", "word": "latency"},
        "cases_called": "tasks",
        "mcnemar": [],
        "agent_columns": _AGENT_COLUMNS,
        "step_columns": _STEP_COLUMNS,
        "plots": {"quality": plots.quality_latency(evaluation)},
    }


def _arm_summary(arm: Mapping[str, Any]) -> dict[str, Any]:
    result = {key: arm.get(key) for key in _ARM_KEYS}
    result |= {key: arm[key] for key in ("first_token_ms", "tokens_per_s") if key in arm}
    latency = arm.get("latency_ms")
    result["latency_ms"] = {key: latency[key] for key in ("p50", "p95")} if latency else None
    return result


def _ordered(arms: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rank = {arm: i for i, arm in enumerate(plots.ARMS)}
    return sorted(arms.items(), key=lambda item: (rank.get(item[0], len(rank)), item[0]))


def _gains(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The student against the cheaper ways to get a small model, each with what its interval allows to say."""
    rows = []
    for arm, words in _GAINS[evaluation["task"]].items():
        gain = evaluation[f"gain_over_{arm}"]
        if gain is None:
            reason = evaluation["null_arms"].get(arm)
            rows.append(
                {"title": words["title"], "gain": None, "says": f"Not measured: {reason or 'no reason given'}."}
            )
            continue
        low, high = gain["ci"]
        says = words["above"] if low > 0 else words["below"] if high < 0 else words["within"]
        rows.append({"title": words["title"], "gain": gain, "says": says})
    return rows


def _mcnemar_words(pair: str, test: Mapping[str, Any], alpha: float) -> str:
    a, _, b = pair.partition("_vs_")
    p = test["p_value"]
    only = f"{test['only_a']:,} cases only the {a} got right, {test['only_b']:,} only the {b}."
    if not test["only_a"] + test["only_b"]:
        return f"The {a} and the {b} were right on exactly the same cases."
    chance = "below 0.001" if p < 0.001 else f"{p:.2g}"
    if p < alpha:
        better = a if test["only_a"] > test["only_b"] else b
        verdict = f"so the {better} is better on cases like these, beyond what chance explains"
    else:
        verdict = f"so these cases do not tell the {a} and the {b} apart"
    return (
        f"{a.capitalize()} against {b}: {only} If both erred equally often, a split at least this uneven would come up "
        f"with probability {chance} (McNemar, exact), {verdict}."
    )


def _per_class(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Scores by label, the student's worst first."""
    scores = {arm: (evaluation["arms"].get(arm) or {}).get("per_class") or {} for arm in ("teacher", "student")}
    rows = []
    for label in evaluation["labels"]:
        teacher, student = scores["teacher"].get(label), scores["student"].get(label)
        either = student or teacher
        if either:
            rows.append({"label": label, "n": either["n"], "scores": [teacher or {}, student or {}]})
    return sorted(rows, key=lambda row: row["scores"][1].get("f1", -1.0))


def _disagreement(case: Mapping[str, Any]) -> dict[str, Any]:
    """One case with the labels that matter to it: those the gold and the answers name, then the likeliest."""
    teacher, student = case["teacher"].get("distribution") or {}, case["student"].get("distribution") or {}
    named = {case.get("gold"), case["teacher"]["label"], case["student"]["label"]}
    labels = sorted(
        {*teacher, *student},
        key=lambda label: (label not in named, -max(teacher.get(label, 0), student.get(label, 0)), label),
    )
    shown = labels[: max(_LABELS_SHOWN, len(named))]
    rows = [(label, teacher.get(label), student.get(label)) for label in shown]
    return {
        "text": case["text"],
        "gold": case.get("gold"),
        "teacher": case["teacher"]["label"],
        "student": case["student"]["label"],
        "rows": sorted(rows, key=lambda row: -max(row[1] or 0, row[2] or 0)),
        "hidden": len(labels) - len(shown),
    }


def _or_missing(write: Any) -> Any:
    return lambda value, *rest: MISSING if value is None else write(value, *rest)


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}×" if ratio >= 10 else f"{ratio:.2g}×"


def _threshold(share: float) -> str:
    """Write a share that somebody chose, with the digits that they chose and no more."""
    return f"{100 * share:.6g}{_NBSP}%"


def _moment(stamp: str) -> str:
    """Write an ISO time in UTC to the minute; any other text stays as it is."""
    return f"{stamp[:10]} {stamp[11:16]} UTC" if stamp.endswith("Z") and stamp[10:11] == "T" else stamp


def _points(difference: float) -> str:
    """Write a difference of two shares in percentage points, with its sign."""
    written = f"{100 * abs(difference):.1f}"
    sign = "" if float(written) == 0 else "+" if difference > 0 else _MINUS
    return sign + written


def _integer(count: float) -> str:
    return f"{count:,.0f}"


def _significant(value: float) -> str:
    """Write a measured quantity with about three digits and no exponent."""
    digits = next((d for bound, d in ((100, 0), (10, 1), (1, 2), (0.1, 3)) if abs(value) >= bound), 4)
    return f"{value:,.{digits}f}" if value else "0"


def _big(count: float) -> str:
    """Write a large count in thousands (k), millions (M) or billions (B)."""
    for bound, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= bound:
            return f"{count / bound:.3g}{_NBSP}{unit}"
    return f"{count:,.0f}"


def report(recipe: Recipe, run: Run) -> dict[str, Any]:
    """evaluate/evaluation.json -> report/report.html and report/report.json."""
    del recipe
    evaluation = json.loads(run.path("evaluate", "evaluation.json").read_text("utf-8"))
    write_json(run.path("report", "report.json"), summary(evaluation))
    write_atomic(run.path("report", "report.html"), render_html(evaluation).encode())
    return {"verdict": evaluation["verdict"]}

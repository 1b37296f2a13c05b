from __future__ import annotations

import copy
import itertools
import math
import random
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from attar.evaluate import plots, report

LABELS = ["lights", "email", "calendar", "weather", "calculator", "none"]
AGREEMENT = {"student": 0.91, "control": 0.88, "baseline": 0.83}
FORBIDDEN = {"script", "iframe", "object", "embed", "img", "image", "base", "form", "audio", "video"}
HOSTILE = "<script>alert('x')</script> & \"quotes\" <img src=http://evil.example/a.png>"


def _arm(quality: float, low: float, high: float, p50: float, cost: float, **more: Any) -> dict[str, Any]:
    return {
        "quality": {"metric": "accuracy", "value": quality, "ci": [low, high], "n": 310},
        "macro_f1": quality - 0.012,
        "per_class": {
            label: {
                "precision": quality - 0.01 * i,
                "recall": quality - 0.02 * i,
                "f1": quality - 0.015 * i,
                "n": 50 + i,
            }
            for i, label in enumerate(LABELS)
        },
        "latency_ms": {"p50": p50, "p95": 1.7 * p50, "ci_p50": [0.96 * p50, 1.05 * p50], "n": 100},
        "throughput_per_s": 1900 / p50,
        "memory_mb": 84.2,
        "parameters": 1_234_567,
        "size_mb": 2.6,
        "cost_usd_per_1k": cost,
        "seeds": [{"seed": seed, "quality": quality + 0.004 * (seed - 1)} for seed in range(3)],
        **more,
    }


def _distribution(rng: random.Random, top: str, share: float) -> dict[str, float]:
    rest = {label: rng.random() for label in LABELS if label != top}
    return {label: (1 - share) * r / sum(rest.values()) for label, r in rest.items()} | {top: share}


def _bins(ece: float) -> dict[str, Any]:
    bins: list[dict[str, Any]] = [
        {"lo": i / 10, "hi": (i + 1) / 10, "n": n, "confidence": (i + 0.6) / 10, "accuracy": (i + 0.6) / 10 - ece}
        for i, n in enumerate([0, 0, 3, 7, 9, 14, 20, 31, 55, 171])
    ]
    for part in bins[:2]:
        part["confidence"] = part["accuracy"] = None
    return {"ece": ece, "bins": bins}


def _coverage(end: float) -> list[dict[str, float]]:
    return [{"coverage": c / 20, "accuracy": 1 - (1 - end) * (c / 20) ** 2} for c in range(1, 21)]


def make_evaluation() -> dict[str, Any]:
    rng = random.Random(0)
    pairs = [("email", "calendar"), ("weather", "none"), ("lights", "none"), ("calculator", "calendar")]
    texts = ["mail the meeting notes to Ann", "will it hold until Sunday?", HOSTILE, "half of that, please " * 12]
    return {
        "schema": 1,
        "name": "router",
        "task": "classify",
        "created": "2026-11-24T09:00:00Z",
        "verdict": "ship",
        "reasons": [
            "retention 0.98 (interval 0.95-1.02) is at or above 0.90",
            "speed-up 212 (interval 205-220) is at or above 5",
            "cost ratio 198 (interval 190-207) is at or above 10",
        ],
        "thresholds": {"retention": 0.90, "speedup": 5, "cost_ratio": 10},
        "labels": LABELS,
        "arms": {
            "teacher": _arm(
                0.873, 0.832, 0.906, 231.0, 0.0055, parameters=134_515_008, about="SmolLM2-135M, 3 prompts"
            ),
            "baseline": _arm(0.803, 0.756, 0.843, 0.41, 0.0000097, about="TF-IDF and logistic regression"),
            "control": _arm(0.842, 0.797, 0.878, 1.09, 0.0000279, about="the student, trained on hard labels"),
            "student": _arm(0.858, 0.815, 0.893, 1.09, 0.0000278, about="tiny, 2 layers, width 128"),
            "base": None,
            "prompted": None,
        },
        "null_arms": {
            "base": "an untrained tiny student answers at chance",
            "prompted": "a classifier takes no prompt",
        },
        "retention": {"value": 0.983, "ci": [0.951, 1.016]},
        "gain_over_control": {"value": 0.016, "ci": [-0.010, 0.042]},
        "gain_over_baseline": {"value": 0.055, "ci": [0.019, 0.090]},
        "mcnemar": {
            "student_vs_teacher": {"only_a": 5, "only_b": 9, "p_value": 0.4240},
            "student_vs_control": {"only_a": 11, "only_b": 6, "p_value": 0.3323},
        },
        "speedup_p50": {"value": 211.9, "ci": [204.8, 219.6]},
        "cost_ratio": {"value": 197.8, "ci": [190.1, 206.6]},
        "break_even": {
            "requests": 123_456,
            "teacher_usd_per_1k": 0.0055,
            "student_usd_per_1k": 0.0000278,
            "one_off_usd": 0.68,
            "note": "Counts machine time only.",
        },
        "agreement": {arm: {"value": v, "ci": [v - 0.03, v + 0.03]} for arm, v in AGREEMENT.items()},
        "calibration": {"student": _bins(0.031), "teacher": _bins(0.012), "control": _bins(0.084)},
        "risk_coverage": {"student": _coverage(0.858), "teacher": _coverage(0.873), "control": _coverage(0.842)},
        "confusions_added": [
            {"gold": "weather", "predicted": "none", "student": 3, "teacher": 2},
            {"gold": "email", "predicted": "calendar", "student": 4, "teacher": 1},
        ],
        "disagreements": [
            {
                "text": texts[i % 4],
                "gold": gold if i % 3 else None,
                "teacher": {"label": gold, "distribution": _distribution(rng, gold, 0.9 - 0.05 * i)},
                "student": {"label": other, "distribution": _distribution(rng, other, 0.8 - 0.03 * i)},
            }
            for i, (gold, other) in enumerate(pairs * 2)
        ],
        "curves": {
            arm: [
                {
                    "step": step,
                    "loss": scale * (0.3 + 1.6 * math.exp(-step / 120) + 0.05 * rng.random()),
                    "eval_loss": scale * (0.38 + 1.5 * math.exp(-step / 110)) if step % 50 == 0 else None,
                }
                | ({"eval_kl": 0.1 + math.exp(-step / 100)} if arm == "student" else {})
                for step in range(10, 610, 10)
            ]
            for arm, scale in (("student", 1.0), ("control", 0.8))
        },
        "data": {"train": 1200, "val": 300, "test": 310, "dropped": {"duplicate": 3, "near_duplicate": 1}},
        "spend": {"teacher_usd": 0.0, "calls": 4600, "tokens": 120_000},
        "machine_price": {"usd_per_hour": 0.085, "source": "list price, see https://prices.example", "date": "2026-11"},
        "provenance": {
            "teacher": "hf:HuggingFaceTB/SmolLM2-135M-Instruct@12fd25f77366fa6b3b4b768ec3050bf629380bac",
            "student": "tiny",
            "licences": ["Apache-2.0"],
            "hashes": {"train": "sha256:" + "0f" * 32, "test": "sha256:" + "ab" * 32},
            "versions": {"attar": "0.1.0", "torch": "2.9.1", "python": "3.11.2"},
            "machine": "2 cores, x86_64, 24 GiB",
        },
        "reproduce": ["attar run attar.yaml"],
        "limits": ["Measured on 310 cases written for this demo.", "One machine, one process at a time."],
    }


@pytest.fixture
def evaluation() -> dict[str, Any]:
    return make_evaluation()


class _Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self._skip = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._skip = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._skip = False

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.parts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.parts))

    def attributes(self, *names: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags for name in names if name in attrs]


def _text(evaluation: dict[str, Any]) -> str:
    return _Page(report.render_html(evaluation)).text


def test_summary_has_the_keys_of_report_json(evaluation):
    result = report.summary(evaluation)
    assert set(result) == {
        "schema", "name", "task", "verdict", "reasons", "arms", "null_arms", "retention", "gain_over_control",
        "metrics", "speedup_p50", "cost_ratio", "break_even", "seeds", "agreement", "calibration", "spend", "data",
        "provenance",
    }  # fmt: skip
    assert set(result["arms"]["student"]) == {
        "quality", "latency_ms", "throughput_per_s", "memory_mb", "parameters", "cost_usd_per_1k",
    }  # fmt: skip
    assert result["arms"]["student"]["latency_ms"] == {"p50": 1.09, "p95": 1.7 * 1.09}
    assert result["speedup_p50"] == 211.9
    assert result["cost_ratio"] == 197.8
    assert result["metrics"]["macro_f1"]["student"] == pytest.approx(0.846)
    assert result["calibration"] == {"student": 0.031, "teacher": 0.012, "control": 0.084}
    assert result["seeds"] == [0, 1, 2]


def test_summary_keeps_null_arms_null_with_their_reasons(evaluation):
    result = report.summary(evaluation)
    assert result["arms"]["base"] is None
    assert result["arms"]["prompted"] is None
    assert result["null_arms"] == evaluation["null_arms"]
    assert "base" not in result["metrics"]["macro_f1"]


def test_rendering_and_summing_up_leave_the_evaluation_alone(evaluation):
    before = copy.deepcopy(evaluation)
    report.summary(evaluation)["arms"]["student"]["quality"]["value"] = 0
    report.render_html(evaluation)
    assert evaluation == before


def test_page_asks_the_network_for_nothing(evaluation):
    text = report.render_html(evaluation)
    page = _Page(text)
    assert not FORBIDDEN & {tag for tag, _ in page.tags}
    targets = page.attributes("src", "href", "xlink:href", "action", "poster", "srcset", "data")
    assert targets
    assert all(target.startswith(("#", "data:,")) for target in targets)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_hostile_text_is_shown_and_not_obeyed(evaluation):
    evaluation["name"] = "<b>name</b>"
    evaluation["labels"][0] = evaluation["confusions_added"][0]["gold"] = "<i onclick=x>lights"
    evaluation["reasons"].append("</style><script>1</script>")
    evaluation["arms"]["student"]["about"] = "<u>about</u>"
    page = _Page(report.render_html(evaluation))
    assert {"script", "b", "u", "img"}.isdisjoint(tag for tag, _ in page.tags)
    assert not page.attributes("onclick")
    assert HOSTILE in page.text
    assert "<b>name</b>" in page.text


def test_page_states_verdict_and_the_four_numbers_with_intervals(evaluation):
    text = _text(evaluation).split("Why ship")[0]
    for said in (
        "SHIP",
        "98.3 % interval 95.1 % to 101.6 %",
        "212× interval 205× to 220×",
        "198× interval 190× to 207×",
        "85.8 % interval 81.5 % to 89.3 %",
    ):
        assert said.replace(" ", "") in re.sub(r"\s", "", text), said


def test_hold_is_not_dressed_up_as_ship(evaluation):
    evaluation["verdict"] = "hold"
    text = _text(evaluation)
    assert "HOLD" in text
    assert "SHIP" not in text
    assert "the student can take over" not in text


@pytest.mark.parametrize(
    ("ci", "said"),
    [
        ([-0.010, 0.042], "Soft labels did not beat hard labels here"),
        ([0.0, 0.042], "Soft labels did not beat hard labels here"),
        ([0.004, 0.042], "Soft labels beat hard labels here"),
        ([-0.05, -0.002], "Soft labels did worse than hard labels here"),
    ],
)
def test_gain_over_control_says_what_its_interval_allows(evaluation, ci, said):
    evaluation["gain_over_control"]["ci"] = ci
    text = _text(evaluation)
    assert said in text
    assert len(re.findall("Soft labels (?:did|beat)", text)) == 1


def test_mcnemar_is_put_in_words_both_ways(evaluation):
    assert "5 cases only the student got right, 9 only the teacher" in _text(evaluation)
    assert "do not tell the student and the teacher apart" in _text(evaluation)
    evaluation["mcnemar"] = {"student_vs_teacher": {"only_a": 2, "only_b": 30, "p_value": 2e-6}}
    text = _text(evaluation)
    assert "probability below 0.001" in text
    assert "the teacher is better on cases like these" in text
    assert "apart" not in text


def test_two_renders_are_equal_and_ids_are_unique(evaluation):
    first = report.render_html(evaluation)
    assert first == report.render_html(copy.deepcopy(evaluation))
    page = _Page(first)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]+)\)", first) + [ref[1:] for ref in page.attributes("href") if ref[0] == "#"]
    assert used
    assert set(used) <= set(ids)


def test_a_user_s_matplotlib_settings_change_nothing(evaluation):
    import matplotlib

    plain = plots.quality_cost(evaluation)
    with matplotlib.rc_context({"axes.facecolor": "red", "lines.linewidth": 9, "axes.grid": False}):
        assert plots.quality_cost(evaluation) == plain
        assert matplotlib.rcParams["lines.linewidth"] == 9


def test_every_figure_says_in_words_what_it_shows_and_takes_the_page_s_colours(evaluation):
    page = _Page(report.render_html(evaluation))
    figures = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(figures) == 5
    assert all(attrs["role"] == "img" and len(attrs["aria-label"] or "") > 60 for attrs in figures)
    said = (figures[0]["aria-label"] or "").replace("\u00a0", " ")
    assert "student 85.8 % (interval 81.5 % to 89.3 %) at $0.000028" in said
    assert "ship line at 78.6 %" in said
    assert not re.search(r"#0102[0-9a-f]{2}", report.render_html(evaluation)), "a sentinel colour was left"
    for svg in (plots.quality_cost(evaluation), plots.reliability(evaluation), plots.risk_coverage(evaluation)):
        assert "var(--arm-student)" in svg
        assert "var(--arm-control)" in svg
        assert "currentColor" in svg


def test_arms_of_equal_cost_do_not_hide_each_other(evaluation):
    for arm in ("control", "student", "baseline"):
        evaluation["arms"][arm]["cost_usd_per_1k"] = 0.00003
    svg = plots.quality_cost(evaluation)
    mark = r'<use href="[^"]*" x="([\d.]+)" y="[\d.]+" style="fill: var\(--arm-(?:control|student|baseline)\)'
    places = sorted(float(x) for x in re.findall(mark, svg))
    assert len(places) == 3
    assert min(b - a for a, b in itertools.pairwise(places)) > 7


def test_no_break_even_is_said_in_words(evaluation):
    assert "paid for itself after 123,456 requests" in _text(evaluation)
    evaluation["break_even"] |= {"requests": None, "note": "The student costs more per request."}
    text = _text(evaluation)
    assert "There is no break-even" in text
    assert "The student costs more per request." in text
    assert "None" not in text


def test_null_arms_stand_in_the_table_with_their_reason(evaluation):
    evaluation["arms"]["baseline"] = evaluation["gain_over_baseline"] = None
    evaluation["null_arms"]["baseline"] = "switched off in the recipe"
    text = _text(evaluation)
    assert "an untrained tiny student answers at chance" in text
    assert text.count("switched off in the recipe") == 2
    assert "None" not in text


def test_what_was_not_measured_does_not_break_the_page(evaluation):
    for arm in evaluation["arms"].values():
        if arm:
            arm |= {"latency_ms": None, "cost_usd_per_1k": None, "memory_mb": None, "size_mb": None, "macro_f1": None}
    evaluation |= {"speedup_p50": None, "cost_ratio": None, "calibration": {}, "risk_coverage": {}, "curves": {}}
    evaluation |= {
        "disagreements": [],
        "confusions_added": [],
        "mcnemar": {},
        "break_even": None,
        "machine_price": None,
    }
    evaluation["data"]["dropped"] = {}
    text = _text(evaluation)
    assert "No arm has both a quality and a cost" in text
    assert "None" not in text.replace("None:", "").replace("None was", "")
    assert report.summary(evaluation)["speedup_p50"] is None


def test_confidence_level_is_named_where_it_is_stored(evaluation):
    evaluation["confidence"] = 0.9
    assert re.search(r"90\s% interval 95\.1\s% to 101\.6\s%", _text(evaluation))


@pytest.mark.parametrize(
    ("amount", "written"),
    [
        (0, "$0"),
        (0.0012, "$0.0012"),
        (0.00000278, "$0.0000028"),
        (0.68, "$0.68"),
        (12.3456, "$12.35"),
        (1234.5, "$1,234"),
    ],
)
def test_usd(amount, written):
    assert plots.usd(amount) == written


def test_percent():
    assert plots.percent(0.8734) == "87.3\u00a0%"
    assert plots.percent(0.9, 0) == "90\u00a0%"

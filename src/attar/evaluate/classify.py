"""Every arm answers the same held-out cases; all that the report shows is computed here."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

from attar.data.files import read_jsonl
from attar.engines.api import ledger_path
from attar.engines.ledger import Ledger, Spend
from attar.engines.load import teacher_files
from attar.evaluate import evidence, stats, verdict
from attar.evaluate.confidence import expected_calibration_error, reliability, risk_coverage
from attar.evaluate.speed import measure
from attar.evaluate.tasks import fit_temperature, open_arm
from attar.grading.labels import accuracy_scores, confusions_added, macro_f1, per_class
from attar.progress import track
from attar.recipe import ClassifyRecipe
from attar.workspace import Run, write_atomic, write_json

__all__ = ["evaluate"]

Floats = npt.NDArray[np.float64]

_NULL = {
    "base": "an untrained classifier has no labels to answer with; it would stand at chance",
    "prompted": "a classifier takes no prompt, so it cannot be shown demonstrations",
}
# Cases shown in the report's list of worst disagreements.
_SHOWN = 20
_ANSWERED_AT_ONCE = 64
_WARM_UP = 5
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn")


class _Cases:
    """The labelled cases of one split."""

    def __init__(self, recipe: ClassifyRecipe, run: Run, split: str) -> None:
        rows = read_jsonl(run.path("data", f"{split}.jsonl"))
        self.texts: list[str] = [row["text"] for row in rows]
        self.gold: list[str] = [row["label"] for row in rows]
        self.numbers = np.array([recipe.data.labels.index(label) for label in self.gold], dtype=np.int64)


def _folders(recipe: ClassifyRecipe, run: Run) -> dict[str, list[Path | None]]:
    """Arm -> the folder of each of its seeds; None is the teacher."""
    arms: dict[str, list[Path | None]] = {"teacher": [None]}
    if recipe.evaluate.baseline:
        arms["baseline"] = [run.path("models", "baseline", "seed-0")]
    for arm in ("control", "student"):
        arms[arm] = [run.path("export", arm, f"seed-{seed}") for seed in recipe.train.seeds]
    return arms


def _answers(
    recipe: ClassifyRecipe,
    run: Run,
    arm: str,
    folders: Sequence[Path | None],
    calibration: dict[str, Any],
    cases: _Cases,
    split: str,
) -> tuple[Floats, int]:
    """Log-probabilities [seeds, cases, labels] and prompt tokens; answers that are on disk are not asked again."""
    tables = []
    tokens = 0
    for number, folder in enumerate(folders):
        path = run.path("evaluate", "answers", f"{arm}-{split}-{number}.npy")
        about = path.with_suffix(".json")
        if not about.exists():
            loaded = open_arm(recipe, folder, calibration)
            parts, read = [], 0
            with track(run.progress, f"{arm} answers {split}", len(cases.texts)) as step:
                for start in range(0, len(cases.texts), _ANSWERED_AT_ONCE):
                    batch = cases.texts[start : start + _ANSWERED_AT_ONCE]
                    values, used = loaded.answer(batch)
                    parts.append(values)
                    read += used
                    step.advance(len(batch))
            content = io.BytesIO()
            np.save(content, np.concatenate(parts), allow_pickle=False)
            write_atomic(path, content.getvalue())
            write_json(about, {"tokens": read})
        tables.append(np.load(path, allow_pickle=False))
        tokens += json.loads(about.read_text("utf-8"))["tokens"]
    return np.stack(tables), tokens


def _speed(
    recipe: ClassifyRecipe, run: Run, arm: str, folder: Path | None, calibration: dict[str, Any], texts: list[str]
) -> dict[str, Any]:
    def make() -> dict[str, Any]:
        run.progress.note(f"  measuring the speed of {arm}")
        arguments = {
            "recipe": recipe.dump(),
            "folder": None if folder is None else str(folder),
            "calibration": calibration,
        }
        opener = "attar.evaluate.tasks:open_subject"
        return measure(recipe.evaluate, f"the {arm}", opener, arguments, texts, warm_up=_WARM_UP)

    result: dict[str, Any] = evidence.stored(run.path("evaluate", "speed", f"{arm}.json"), make)
    return result


def evaluate(recipe: ClassifyRecipe, run: Run) -> dict[str, Any]:
    """Ask, grade, measure, compare, decide; writes ``evaluate/evaluation.json``."""
    settings, labels = recipe.evaluate, recipe.data.labels
    bootstrap = evidence.bootstrap(recipe)
    calibration = json.loads(run.path("signals", "labels", "calibration.json").read_text("utf-8"))
    test, held = _Cases(recipe, run, "test"), _Cases(recipe, run, "calibration")
    folders = _folders(recipe, run)
    arms: dict[str, Any] = {}
    scores: dict[str, Floats] = {}
    predicted: dict[str, list[list[str]]] = {}
    probabilities: dict[str, Floats] = {}
    calibrated: dict[str, Any] = {}
    coverage: dict[str, Any] = {}
    speeds: dict[str, dict[str, Any]] = {}
    costs: dict[str, list[float]] = {}
    tokens_a_request = 0.0
    spent_tokens = 0
    for arm, places in folders.items():
        answers, tokens = _answers(recipe, run, arm, places, calibration, test, "test")
        temperatures: list[float] = []
        if held.texts:
            of_held, held_tokens = _answers(recipe, run, arm, places, calibration, held, "calibration")
            temperatures = [fit_temperature(table, held.numbers) for table in of_held]
            tokens_held = held_tokens
        else:
            tokens_held = 0
        if arm == "teacher":
            tokens_a_request = tokens / len(test.texts)
            spent_tokens = tokens + tokens_held
        predicted[arm] = [[labels[i] for i in table.argmax(-1)] for table in answers]
        scores[arm] = np.stack([accuracy_scores(test.gold, names) for names in predicted[arm]])
        probabilities[arm] = np.exp(answers)
        scaled = np.exp(
            np.stack([log_softmax(table / t, axis=-1) for table, t in zip(answers, temperatures, strict=True)])
            if temperatures
            else answers
        )
        confidence, correct = scaled.max(-1).ravel(), scores[arm].ravel()
        calibrated[arm] = {
            "ece": expected_calibration_error(confidence, correct),
            "ece_before": expected_calibration_error(probabilities[arm].max(-1).ravel(), correct),
            "temperatures": temperatures or None,
            "bins": reliability(confidence, correct),
        }
        coverage[arm] = risk_coverage(confidence, correct)
        speeds[arm] = _speed(recipe, run, arm, places[0], calibration, test.texts)
        api = tokens_a_request if arm == "teacher" and settings.teacher_api else None
        costs[arm] = verdict.cost_per_request(settings, speeds[arm]["seconds_a_request"], api)
        if arm == "teacher" and (billed := _billed(recipe)) is not None:
            calls = len(recipe.teacher.prompts) * (recipe.teacher.samples or 1)
            costs[arm] = [calls * billed.usd / max(billed.calls, 1)] * len(costs[arm])
        quality = stats.mean_estimate(scores[arm], **bootstrap)
        arms[arm] = {
            "quality": {"metric": "accuracy", **quality.to_json(), "n": len(test.texts)},
            "macro_f1": float(np.mean([macro_f1(test.gold, names, labels) for names in predicted[arm]])),
            "per_class": per_class(test.gold, predicted[arm][0], labels),
            **evidence.speed_record(recipe, speeds[arm], costs[arm]),
            "size_mb": _size_mb(recipe, places[0]),
            "seeds": [
                {"seed": seed, "quality": float(score.mean())}
                for seed, score in zip(
                    recipe.train.seeds if len(places) > 1 else (recipe.train.seeds[0],), scores[arm], strict=False
                )
            ],
            "about": _about(recipe, arm),
        }
    arms |= dict.fromkeys(_NULL)
    null = dict(_NULL)
    if not settings.baseline:
        arms["baseline"], null["baseline"] = None, "evaluate.baseline is false"
    retention = stats.retention(scores["student"], scores["teacher"], **bootstrap)
    seconds = {stage: run.stages[stage]["seconds"] for stage in ("score", "train")}
    score_tokens = run.stages["score"]["counts"]["tokens"]
    labelling = settings.machine.usd_per_hour / 3600 * seconds["score"]
    if settings.teacher_api:
        asked = run.stages["score"]["counts"]["examples"]
        labelling = asked * verdict.cost_per_request(settings, [0.0], score_tokens / max(asked, 1))[0]
    billed = _billed(recipe)
    if billed is not None:
        labelling = billed.usd + billed.lost_usd
    one_off = labelling + settings.machine.usd_per_hour / 3600 * seconds["train"]
    counts = dict(run.stages["curate"]["counts"])
    evaluation: dict[str, Any] = {
        **evidence.opening(recipe),
        **evidence.decision(
            recipe, retention, {arm: speeds[arm]["latency_ms"] for arm in ("teacher", "student")}, costs, one_off
        ),
        "labels": list(labels),
        "arms": arms,
        "null_arms": null,
        "gain_over_control": stats.paired_difference(scores["student"], scores["control"], **bootstrap).to_json(),
        "gain_over_baseline": stats.paired_difference(scores["student"], scores["baseline"], **bootstrap).to_json()
        if settings.baseline
        else None,
        "mcnemar": {
            f"student_vs_{other}": vars(stats.mcnemar(scores["student"][0].astype(bool), scores[other][0].astype(bool)))
            for other in ("teacher", "control")
        },
        "agreement": {
            arm: stats.mean_estimate(
                np.stack([accuracy_scores(predicted["teacher"][0], names) for names in predicted[arm]]), **bootstrap
            ).to_json()
            for arm in folders
            if arm != "teacher"
        },
        "calibration": calibrated,
        "risk_coverage": coverage,
        "confusions_added": confusions_added(test.gold, predicted["student"][0], predicted["teacher"][0]),
        "disagreements": _disagreements(recipe, test, predicted, probabilities),
        "curves": evidence.training_curves(recipe, run, ("student", "control")),
        "data": {split: counts[split] for split in ("train", "val", "dev", "calibration", "test")}
        | {"dropped": counts["dropped"]},
        "spend": {
            "teacher_usd": labelling if settings.teacher_api or billed is not None else 0.0,
            "calls": len(recipe.teacher.prompts)
            * (recipe.teacher.samples or 1)
            * (run.stages["score"]["counts"]["examples"] + len(test.texts) + len(held.texts)),
            "tokens": score_tokens + spent_tokens,
        },
        "provenance": evidence.provenance(recipe, run, recipe.student.model, recipe.data.licence, _PACKAGES),
        "reproduce": [f"attar run {run.path('recipe.resolved.yaml')}"],
        "limits": _limits(recipe, len(test.texts), bool(held.texts)),
    }
    write_json(run.path("evaluate", "evaluation.json"), evaluation)
    return {"verdict": evaluation["verdict"]}


def _behind_api(recipe: ClassifyRecipe) -> bool:
    return recipe.teacher.model.partition(":")[0] in ("openai", "anthropic")


def _billed(recipe: ClassifyRecipe) -> Spend | None:
    """What a teacher behind an API has billed so far; None for one in this process."""
    if not _behind_api(recipe):
        return None
    ledger = Ledger(ledger_path(recipe))
    try:
        return ledger.spend()
    finally:
        ledger.close()


def _size_mb(recipe: ClassifyRecipe, folder: Path | None) -> float | None:
    """Of an arm's files; None where the teacher has none here."""
    if folder is None and _behind_api(recipe):
        return None
    return evidence.size_mb(folder or teacher_files(recipe))


def _disagreements(
    recipe: ClassifyRecipe, test: _Cases, predicted: dict[str, list[list[str]]], probabilities: dict[str, Floats]
) -> list[dict[str, Any]]:
    """Cases where student and teacher differ, the largest total variation first."""
    teacher, student = probabilities["teacher"][0], probabilities["student"][0]
    distance = np.abs(teacher - student).sum(-1) / 2
    differ = [
        i for i in np.argsort(-distance, kind="stable") if predicted["teacher"][0][i] != predicted["student"][0][i]
    ]
    return [
        {
            "text": test.texts[i],
            "gold": test.gold[i],
            **{
                arm: {
                    "label": predicted[arm][0][i],
                    "distribution": dict(
                        zip(recipe.data.labels, probabilities[arm][0][i].round(4).tolist(), strict=True)
                    ),
                }
                for arm in ("teacher", "student")
            },
        }
        for i in differ[:_SHOWN]
    ]


def _about(recipe: ClassifyRecipe, arm: str) -> str:
    teacher, student = recipe.teacher, recipe.student
    known = teacher.model.startswith(("hf:", "gguf:", "openai:", "anthropic:"))
    scripted = "" if known else "scripted or user-made engine, "
    return {
        "teacher": f"{scripted}{teacher.model}, {len(teacher.prompts)} prompt(s), calibration {teacher.calibration}",
        "baseline": "TF-IDF and logistic regression on the teacher's hard labels",
        "control": f"{student.model}, the teacher's hard labels only",
        "student": f"{student.model}, {' + '.join(o.kind for o in recipe.distill.objectives)}",
    }[arm]


def _limits(recipe: ClassifyRecipe, cases: int, has_calibration: bool) -> list[str]:
    seeds = len(recipe.train.seeds)
    limits = [
        f"Quality is measured on {cases} labelled cases; a difference smaller than the intervals cannot be seen.",
        f"The student was trained with {seeds} seed{'s' if seeds > 1 else ''}; "
        + ("the spread between them is shown." if seeds > 1 else "how much another seed would differ is not known."),
        "Speed was measured on this machine, with nothing else on it controlled; cost follows by the stated price.",
        f"The teacher's cost is for {len(recipe.teacher.prompts)} prompt(s) a request with the shared prefix cached.",
        "Traffic that differs from the test cases was not measured.",
    ]
    if not has_calibration:
        limits.append("No calibration cases were given: confidences are shown as the arms state them, unscaled.")
    return limits

"""The chat task: every arm reads and answers the same held-out conversations, and is compared with the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attar.evaluate import evidence, stats, verdict
from attar.evaluate.answers import compare
from attar.evaluate.arms import Measured
from attar.evaluate.language import COLUMNS, Floats, estimates, shares
from attar.evaluate.stats import Estimate
from attar.recipe import ChatRecipe
from attar.workspace import Run, write_json

__all__ = ["evaluate"]

_NULL = {
    "prompted": "the student is asked as the teacher is; it is shown no demonstrations",
    "baseline": "no classical model writes text",
}
_NO_CONTROL = "the student learns from the reference's tokens alone, so it is its own control"
# Conversations in the report's list of the worst, and the longest text of each that it shows.
_SHOWN = 12
_CHARACTERS = 1200
# Stages whose time makes a student; signals are not always cached.
_MAKING = ("score", "train")
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def evaluate(recipe: ChatRecipe, run: Run) -> dict[str, Any]:
    """Ask, grade, measure, compare, decide; writes ``evaluate/evaluation.json``.

    Quality is next-token accuracy: the share of a conversation's supervised tokens whose most likely token is the
    reference's, averaged over conversations.
    """
    settings, bootstrap = recipe.evaluate, evidence.bootstrap(recipe)
    measured = Measured(recipe, run)
    cases, names = measured.cases, list(measured.arms)
    tables = {arm: measured.tables(arm) for arm in names}
    measured.forget_teacher()
    answers = {arm: measured.answers(arm) for arm in names}
    speeds = {arm: measured.speed(arm) for arm in names}
    costs = {arm: _costs(measured, arm, speed["seconds_a_request"]) for arm, speed in speeds.items()}
    scores = {arm: shares(table, "correct") for arm, table in tables.items()}
    found = {arm: _metrics(measured, arm, tables[arm], answers, bootstrap) for arm in names}
    arms: dict[str, Any] = {arm: _record(recipe, measured, arm, scores[arm], speeds[arm], costs[arm]) for arm in names}
    null = dict(_NULL) | ({} if "control" in arms else {"control": _NO_CONTROL})
    arms |= dict.fromkeys(null)
    counts = {stage: run.stages[stage]["counts"] for stage in ("curate", "score") if stage in run.stages}
    scored = counts.get("score", {"examples": 0, "tokens": 0})
    making = [run.stages[stage]["seconds"] for stage in _MAKING if stage in run.stages]
    written = sum(map(len, answers["teacher"][0]))
    prompted = sum(len(turn.prompt) for turn in cases.teacher.turns)
    evaluation: dict[str, Any] = {
        **evidence.opening(recipe),
        **evidence.decision(
            recipe,
            stats.retention(scores["student"], scores["teacher"], **bootstrap),
            {arm: speeds[arm]["latency_ms"] for arm in ("teacher", "student")},
            costs,
            sum(verdict.machine_cost(settings, making)),
        ),
        "arms": arms,
        "null_arms": null,
        **{
            f"gain_over_{other}": stats.paired_difference(scores["student"], scores[other], **bootstrap).to_json()
            if other in scores
            else None
            for other in ("control", "base")
        },
        "metrics": _by_metric(found, "value"),
        "metrics_ci": _by_metric(found, "ci"),
        "agreement": {arm: metrics["top1_agreement"] for arm, metrics in found.items() if arm != "teacher"},
        "calibration": {},
        "answers": {"turns": len(cases.owner), "conversations": len(np.unique(cases.owner)), "tokens": written},
        "worst": _worst(measured, tables["student"][0], answers),
        "curves": evidence.training_curves(recipe, run, [a for a in ("student", "control") if a in measured.arms]),
        "data": {split: counts["curate"][split] for split in ("train", "val", "test", "dropped")},
        "spend": {
            "teacher_usd": _usd(recipe, scored["tokens"] + cases.teacher.tokens + prompted, written),
            "calls": scored["examples"] + cases.size + len(cases.owner),
            "tokens": scored["tokens"] + cases.teacher.tokens + prompted + written,
        },
        "provenance": evidence.provenance(
            recipe,
            run,
            _student(recipe),
            recipe.data.licence,
            (*_PACKAGES, "xllamacpp") if measured.gguf else _PACKAGES,
        ),
        "reproduce": [f"attar run {run.path('recipe.resolved.yaml')}"],
        "limits": _limits(recipe, measured, tables["student"]),
    }
    write_json(run.path("evaluate", "evaluation.json"), evaluation)
    return {"verdict": evaluation["verdict"]}


def _costs(measured: Measured, arm: str, seconds: Sequence[float]) -> list[float]:
    """US dollars for one request, one value a round; of a teacher that is billed by the token, by its prices."""
    recipe = measured.recipe
    if arm != "teacher" or recipe.teacher.price is None:
        return verdict.machine_cost(recipe.evaluate, seconds)
    prompt = float(np.mean([len(turn.prompt) for turn in measured.cases.teacher.turns]))
    return [_usd(recipe, prompt, recipe.evaluate.answer_tokens)] * len(seconds)


def _usd(recipe: ChatRecipe, prompt_tokens: float, completion_tokens: float) -> float:
    """What the teacher's server bills; 0 where no price is stated, as its machine's time is no bill."""
    price = recipe.teacher.price
    if price is None:
        return 0.0
    paid = prompt_tokens * price.input_usd_per_million_tokens + completion_tokens * price.output_usd_per_million_tokens
    return paid / 1_000_000


def _metrics(
    measured: Measured, arm: str, tables: Floats, answers: dict[str, list[list[list[int]]]], bootstrap: dict[str, Any]
) -> dict[str, dict[str, Any] | None]:
    """Every metric of an arm as ``{"value", "ci"}``, or None."""
    of_answers = compare(
        measured.cases,
        measured.reading(arm),
        answers[arm],
        answers["teacher"][0],
        measured.recipe.evaluate.answer_tokens,
    )
    found: dict[str, Estimate | None] = estimates(tables, bootstrap)
    for name, values in vars(of_answers).items():
        found[name] = None if values is None else stats.mean_estimate(values, **bootstrap)
    return {name: None if estimate is None else estimate.to_json() for name, estimate in found.items()}


def _by_metric(found: dict[str, dict[str, dict[str, Any] | None]], key: str) -> dict[str, dict[str, Any]]:
    """Metric -> arm -> the value or the interval."""
    return {name: {arm: (metrics[name] or {}).get(key) for arm, metrics in found.items()} for name in found["teacher"]}


def _record(
    recipe: ChatRecipe, measured: Measured, arm: str, scores: Floats, speed: dict[str, Any], costs: list[float]
) -> dict[str, Any]:
    seconds = sum(speed["latency_ms"]) / 1000
    seeds = [0] if arm == "base" else recipe.train.seeds
    return {
        "quality": {
            "metric": "next-token accuracy",
            **stats.mean_estimate(scores, **evidence.bootstrap(recipe)).to_json(),
            "n": measured.cases.size,
        },
        **evidence.speed_record(recipe, speed, costs),
        "first_token_ms": {"p50": float(np.median(speed["first_token_ms"]))},
        "tokens_per_s": recipe.evaluate.answer_tokens * len(speed["latency_ms"]) / seconds,
        "size_mb": measured.size_mb(arm),
        # What was resident is the client's, where the model is elsewhere.
        **({"memory_mb": None} if measured.served and arm == "teacher" else {}),
        "seeds": [{"seed": seed, "quality": float(score.mean())} for seed, score in zip(seeds, scores, strict=False)],
        "about": _about(recipe, measured, arm),
    }


def _worst(measured: Measured, table: Floats, answers: dict[str, list[list[list[int]]]]) -> list[dict[str, Any]]:
    """Answered turns of the conversations with the largest KL(teacher || student) a token, the first seed's."""
    cases = measured.cases
    kl = table[:, COLUMNS.index("kl")] / table[:, COLUMNS.index("tokens")]
    order = np.argsort(-kl[cases.owner], kind="stable")[:_SHOWN]
    shown = []
    for turn in order.tolist():
        case, asked = int(cases.owner[turn]), cases.teacher.turns[turn]
        texts = {
            "reference": (cases.teacher, asked.reference),
            **{arm: (measured.reading(arm), answers[arm][0][turn]) for arm in ("teacher", "student")},
        }
        prompt = cases.teacher.tokenizer.decode(asked.prompt, clean_up_tokenization_spaces=False)
        shown.append(
            {
                "conversation": cases.teacher.examples[case][0].id,
                "kl": float(kl[case]),
                # The end of a prompt is what the answer is to.
                "prompt": prompt if len(prompt) <= _CHARACTERS else "…" + prompt[-_CHARACTERS:],
                **{name: _cut(reading.tokenizer, ids) for name, (reading, ids) in texts.items()},
            }
        )
    return shown


def _cut(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + "…"


def _student(recipe: ChatRecipe) -> str:
    """What the student was made from, and how."""
    student = recipe.student
    sizes = student.shrink.model_dump(exclude_defaults=True)
    words = [f"{key} {value}" for key, value in sizes.items()]
    if student.lora is not None:
        words.append(f"LoRA of rank {student.lora.rank}")
    return ", ".join([student.model or recipe.teacher.model, *words])


def _about(recipe: ChatRecipe, measured: Measured, arm: str) -> str:
    objectives = " + ".join(
        f"{o.kind} ({o.divergence})" if o.kind == "logit" else o.kind for o in recipe.distill.objectives
    )
    engine = "llama.cpp, F16" if measured.gguf else f"transformers, {_dtype(recipe, arm)}"
    if measured.served and arm == "teacher":
        return f"{recipe.teacher.model}, asked at {recipe.teacher.base_url}; answers and speed through its server"
    what = {
        "teacher": recipe.teacher.model,
        "base": f"{_student(recipe)}, untrained",
        "control": f"{_student(recipe)}, trained on the reference's tokens only",
        "student": f"{_student(recipe)}, trained on {objectives}",
    }[arm]
    return f"{what}; answers and speed through {engine}"


def _dtype(recipe: ChatRecipe, arm: str) -> str:
    if arm != "teacher":
        return recipe.export.dtype
    return "as stored" if recipe.teacher.dtype == "auto" else recipe.teacher.dtype


def _limits(recipe: ChatRecipe, measured: Measured, tables: Floats) -> list[str]:
    settings, cases = recipe.evaluate, measured.cases
    seeds = len(recipe.train.seeds)
    limits = [
        f"Quality is next-token accuracy on {cases.size} held-out conversations: how often the most likely token is "
        "the reference's, each after the reference's own beginning. It does not say how good a free answer is.",
        f"{len(cases.owner)} turns were answered freely, greedily, in at most {settings.answer_tokens} tokens; a "
        f"longer answer was compared as far as it went.",
        "Exact match counts only references that fit into an answer of that length; it is left out where none does.",
        f"The student was trained with {seeds} seed{'s' if seeds > 1 else ''}; "
        + ("the spread between them is shown." if seeds > 1 else "how much another seed would differ is not known."),
        f"Speed is that of one held-out prompt at a time, answered with exactly {settings.answer_tokens} tokens by "
        "every arm, past any end, and with nothing of an earlier prompt in memory.",
        "Speed was measured on this machine, with nothing else on it controlled; cost follows by the stated price.",
        "Memory is that of the whole process, Python and its libraries included.",
        "Traffic that differs from the held-out conversations was not measured.",
    ]
    if recipe.export.gguf and not measured.gguf:
        limits.append("Not every arm has a GGUF file, so all were asked and measured through transformers.")
    if cases.counts["truncated"]:
        limits.append(f"{cases.counts['truncated']} conversations were cut at {recipe.curate.max_tokens} tokens.")
    if cases.counts["left out"]:
        limits.append(f"{cases.counts['left out']} held-out conversations had nothing to answer and were left out.")
    if cases.kept is not None:
        outside = tables[..., COLUMNS.index("outside")].sum() / tables[..., COLUMNS.index("tokens")].sum()
        limits.append(
            f"The student's vocabulary has {len(cases.kept):,} of the teacher's tokens: each arm's quality is on its "
            f"own tokens, and the KL is from the teacher's distribution over these ({outside:.2%} of it is on others)."
        )
    if measured.served:
        entries = measured.entries
        limits += [
            "The teacher is served: how many parameters it has, and what memory and disk it takes, is not known.",
            f"The KL is between distributions over the teacher's {entries} likeliest tokens and one bucket of all "
            "others, which is as far as its server shows them; the full one is at least that.",
            "The teacher's speed is that of its server as it was reached from here, with whatever else it had to do; "
            "throughput is of several requests at once, where the other arms answer one after the other.",
        ]
        if recipe.teacher.price is None:
            limits.append(
                "The teacher's cost is its time at the price of evaluate.machine, as no teacher.price is stated."
            )
    if recipe.distill.signals.source == "live":
        limits.append("What a live teacher read while the student was trained is not in the spend, its time is.")
    return limits

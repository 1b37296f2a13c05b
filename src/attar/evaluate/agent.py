"""The agent task: every arm takes the same steps and plays the same tasks; in quality the environment decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from attar.data.episodes import Episode
from attar.data.tools import CallChecker
from attar.data.types import Message
from attar.engines.load import scripted
from attar.evaluate import evidence, stats, verdict
from attar.evaluate.acting import Acting
from attar.evaluate.breaks import where_it_breaks
from attar.evaluate.stats import Estimate
from attar.grading.steps import StepGrade, grade_step
from attar.recipe import AgentRecipe
from attar.workspace import Run, write_json

__all__ = ["evaluate", "pass_hat"]

Floats = npt.NDArray[np.float64]
_NULL = {
    "baseline": "no classical model acts",
    "control": "the student learns from the teacher's steps alone, so it is its own control",
    "prompted": "evaluate.demonstrations is 0",
}
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")
_MAKING = ("rollout", "score", "train")
_OF_EPISODES: dict[str, Callable[[Episode], float]] = {
    "success": lambda e: float(e.outcome.success),
    "score": lambda e: e.outcome.score,
    "steps": lambda e: float(len(e.steps)),
    "completion_tokens": lambda e: float(sum(step.completion_tokens for step in e.steps)),
    "prompt_tokens": lambda e: float(sum(step.prompt_tokens for step in e.steps)),
    "tool_errors": lambda e: float(sum(step.tool_errors for step in e.steps)),
    "finished": lambda e: float(e.stopped == "finished"),
}
_OF_STEPS: dict[str, Callable[[StepGrade], bool]] = {
    "acceptable": lambda g: g.acceptable,
    "same_kind": lambda g: g.kind,
    "same_tools": lambda g: g.tools,
    "valid": lambda g: g.valid,
    "hallucinated": lambda g: g.hallucinated,
}


def evaluate(recipe: AgentRecipe, run: Run) -> dict[str, Any]:
    """Play, replay, measure, compare, decide; writes ``evaluate/evaluation.json``.

    Quality is success, by the environment's own check, on the first of ``evaluate.splits``; without an environment,
    the share of acceptable steps. Everything is paired by task and trial, and a task is the case that estimates
    resample.
    """
    acting, bootstrap = Acting(recipe, run), evidence.bootstrap(recipe)
    names = acting.arms
    played = {split: {arm: acting.episodes(arm, split) for arm in names} for split in acting.tasks}
    grades = {arm: [_grades(acting, said) for said in acting.replayed(arm)] for arm in names}
    speeds = {arm: None if _no_speed(recipe, arm) else acting.speed(arm) for arm in names}
    owner = np.array([moment.episode for moment in acting.moments])
    replay = {
        name: {arm: _by_owner([[float(value(g)) for g in seed] for seed in grades[arm]], owner) for arm in names}
        for name, value in _OF_STEPS.items()
    }
    trials = recipe.evaluate.trials
    of_split = {
        split: {
            name: {arm: _by_task(episodes, value, trials) for arm, episodes in arms.items()}
            for name, value in _OF_EPISODES.items()
        }
        for split, arms in played.items()
    }
    first = recipe.evaluate.splits[0]
    headline = of_split[first]["success"] if of_split else replay["acceptable"]
    metric = "success" if of_split else "acceptable steps"
    arms: dict[str, Any] = {
        arm: _record(acting, arm, metric, headline[arm], speeds[arm], played.get(first, {}).get(arm)) for arm in names
    }
    metrics: dict[str, dict[str, Estimate]] = {}
    for split, tables in of_split.items():
        for name, by_arm in tables.items():
            metrics[f"{name} ({split})"] = {a: stats.mean_estimate(v, **bootstrap) for a, v in by_arm.items()}
        if trials > 1:
            metrics[f"pass^{trials} ({split})"] = {
                arm: stats.mean_estimate(_passed(episodes, trials), **bootstrap)
                for arm, episodes in played[split].items()
            }
    for name, by_arm in replay.items():
        metrics[f"{name} (steps)"] = {arm: stats.mean_estimate(values, **bootstrap) for arm, values in by_arm.items()}
    making = sum(verdict.machine_cost(recipe.evaluate, [run.stages[s]["seconds"] for s in _MAKING if s in run.stages]))
    evaluation: dict[str, Any] = {
        **evidence.opening(recipe),
        **_decision(acting, headline, speeds, making),
        "arms": arms | {name: None for name in _NULL if name not in arms},
        "null_arms": {name: reason for name, reason in _NULL.items() if name not in arms},
        "scripted_teacher": scripted(recipe),
        **{f"gain_over_{other}": _gain(headline, other, bootstrap) for other in ("control", "base", "prompted")},
        "splits": {
            split: {
                "tasks": len(acting.tasks[split]),
                "trials": trials,
                "gains": {
                    other: _gain(tables["success"], other, bootstrap) for other in ("control", "base", "prompted")
                },
                "retention": stats.retention(
                    tables["success"]["student"], tables["success"]["teacher"], **bootstrap
                ).to_json(),
            }
            for split, tables in of_split.items()
        },
        "metrics": {name: {arm: e.value for arm, e in by.items()} for name, by in metrics.items()},
        "metrics_ci": {name: {arm: [e.lo, e.hi] for arm, e in by.items()} for name, by in metrics.items()},
        "agreement": {arm: float(replay["acceptable"][arm].mean()) for arm in names if arm != "teacher"},
        "calibration": {},
        "steps_replayed": len(acting.moments),
        "endings": {split: {arm: _endings(e) for arm, e in of_arm.items()} for split, of_arm in played.items()},
        "families": {split: _families(of_arm) for split, of_arm in played.items()},
        "breaks": where_it_breaks(played.get(first, {})),
        "curves": evidence.training_curves(recipe, run, [a for a in ("student", "control") if a in names]),
        "data": _data(run),
        "spend": _spend(run, played),
        "provenance": evidence.provenance(
            recipe, run, recipe.student.model or recipe.teacher.model, recipe.data.licence, _PACKAGES
        ),
        "reproduce": [f"attar run {run.path('recipe.resolved.yaml')}"],
        "limits": _limits(acting),
    }
    write_json(run.path("evaluate", "evaluation.json"), evaluation)
    return {"verdict": evaluation["verdict"]}


def pass_hat(successes: int, trials: int, k: int) -> float:
    """The chance that k trials, drawn from those made without putting back, all succeed: pass^k of Yao et al. 2024
    (arXiv:2406.12045, section 3).
    """
    return math.comb(successes, k) / math.comb(trials, k)


def _passed(episodes: Sequence[Sequence[Episode]], trials: int) -> Floats:
    """pass^k with k = trials, [seeds, tasks]."""
    found = []
    for of_seed in episodes:
        counts: dict[str, int] = {}
        for episode in of_seed:
            counts[episode.task] = counts.get(episode.task, 0) + episode.outcome.success
        found.append([pass_hat(n, trials, trials) for n in counts.values()])
    return np.array(found)


def _by_task(episodes: Sequence[Sequence[Episode]], value: Callable[[Episode], float], trials: int) -> Floats:
    """Means over trials, [seeds, tasks]. Episodes come task by task, trial after trial."""
    table = np.array([[value(episode) for episode in of_seed] for of_seed in episodes])
    means: Floats = table.reshape(len(table), trials, -1).mean(axis=1)
    return means


def _by_owner(values: Sequence[Sequence[float]], owner: npt.NDArray[np.int64]) -> Floats:
    """Means over the steps of one episode, [seeds, episodes]."""
    _, place = np.unique(owner, return_inverse=True)
    sums = np.stack([np.bincount(place, weights=np.asarray(row, dtype=np.float64)) for row in values])
    means: Floats = sums / np.bincount(place)
    return means


def _grades(acting: Acting, said: Sequence[Message | None]) -> list[StepGrade]:
    check = CallChecker()
    return [
        grade_step(m, moment.reference, moment.tools, check) for m, moment in zip(said, acting.moments, strict=True)
    ]


def _gain(scores: dict[str, Floats], other: str, bootstrap: dict[str, Any]) -> dict[str, Any] | None:
    if other not in scores:
        return None
    return stats.paired_difference(scores["student"], scores[other], **bootstrap).to_json()


def _no_speed(recipe: AgentRecipe, arm: str) -> bool:
    """A script's speed says nothing about a model's."""
    return arm == "teacher" and scripted(recipe)


def _decision(
    acting: Acting, scores: dict[str, Floats], speeds: dict[str, dict[str, Any] | None], making: float
) -> dict[str, Any]:
    recipe = acting.recipe
    retention = stats.retention(scores["student"], scores["teacher"], **evidence.bootstrap(recipe))
    teacher, student = speeds["teacher"], speeds["student"]
    if teacher is None or student is None:
        return {
            "verdict": "hold",
            "reasons": [
                f"the teacher is scripted: the student imitates a script, and no model was distilled; it keeps "
                f"{retention.value:.1%} ({retention.lo:.1%} to {retention.hi:.1%}) of the script's success"
            ],
            "retention": retention.to_json(),
            "speedup_p50": None,
            "cost_ratio": None,
            "break_even": None,
        }
    costs = {"teacher": _costs(acting, "teacher", teacher), "student": _costs(acting, "student", student)}
    latency = {"teacher": teacher["latency_ms"], "student": student["latency_ms"]}
    return evidence.decision(recipe, retention, latency, costs, making)


def _costs(acting: Acting, arm: str, speed: dict[str, Any]) -> list[float]:
    """US dollars for one step, one value a round; of a teacher that is billed, what its steps were billed."""
    recipe = acting.recipe
    if arm == "teacher" and acting.tasks:
        episodes = acting.episodes("teacher", recipe.evaluate.splits[0])[0]
        billed = [step.usd for episode in episodes for step in episode.steps]
        if billed and all(usd for usd in billed):
            return [float(np.mean([usd or 0.0 for usd in billed]))] * len(speed["seconds_a_request"])
    return verdict.machine_cost(recipe.evaluate, speed["seconds_a_request"])


def _record(
    acting: Acting,
    arm: str,
    metric: str,
    scores: Floats,
    speed: dict[str, Any] | None,
    episodes: Sequence[Sequence[Episode]] | None,
) -> dict[str, Any]:
    recipe = acting.recipe
    costs = [] if speed is None else _costs(acting, arm, speed)
    record: dict[str, Any] = {
        "quality": {
            "metric": metric,
            **stats.mean_estimate(scores, **evidence.bootstrap(recipe)).to_json(),
            "n": scores.shape[1],
        },
        **(_NO_SPEED if speed is None else evidence.speed_record(recipe, speed, costs)),
        "size_mb": acting.size_mb(arm),
        "seeds": [
            {"seed": seed, "quality": float(row.mean())} for seed, row in zip(acting.seeds(arm), scores, strict=True)
        ],
        "about": _about(recipe, arm),
    }
    if episodes is not None:
        steps = [len(e.steps) for of_seed in episodes for e in of_seed]
        won = float(np.mean([e.outcome.success for of_seed in episodes for e in of_seed]))
        cost = float(np.mean(costs)) * float(np.mean(steps)) if costs else None
        record["episode_usd"] = cost
        record["success_usd"] = None if cost is None or not won else cost / won
        if speed is not None:
            record["episode_ms"] = float(np.median(speed["latency_ms"])) * float(np.mean(steps))
    return record


_NO_SPEED: dict[str, Any] = {
    "latency_ms": None,
    "throughput_per_s": None,
    "memory_mb": None,
    "parameters": None,
    "cost_usd_per_1k": None,
}


def _about(recipe: AgentRecipe, arm: str) -> str:
    student = recipe.student.model or recipe.teacher.model
    sizes = ", ".join(f"{k} {v}" for k, v in recipe.student.shrink.model_dump(exclude_defaults=True).items())
    student = f"{student} ({sizes})" if sizes else student
    taught = "imitating the script" if scripted(recipe) else "trained on the teacher's episodes"
    objectives = " + ".join(o.kind for o in recipe.distill.objectives)
    rounds = recipe.distill.relabel.rounds if recipe.distill.relabel else 0
    after = f", {rounds} round{'s' if rounds > 1 else ''} of relabelling" if rounds else ""
    return {
        "teacher": f"{recipe.teacher.model}{', a script and no model' if scripted(recipe) else ''}",
        "base": f"{student}, untrained",
        "prompted": f"{student}, untrained, shown {recipe.evaluate.demonstrations} episodes in its prompt",
        "control": f"{student}, {taught} with the same number of tokens, as hard targets, without relabelling",
        "student": f"{student}, {taught} ({objectives}){after}",
    }[arm]


def _endings(episodes: Sequence[Sequence[Episode]]) -> dict[str, int]:
    """Why failed episodes failed, the most common first."""
    counts: dict[str, int] = {}
    for of_seed in episodes:
        for episode in of_seed:
            if not episode.outcome.success:
                reason = episode.outcome.reason or "no reason given"
                if episode.stopped != "finished":
                    reason = f"stopped: {episode.stopped}"
                counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:8])


def _families(arms: dict[str, list[list[Episode]]]) -> dict[str, dict[str, Any]]:
    """Family -> tasks, and each arm's success."""
    found: dict[str, dict[str, Any]] = {}
    for arm, episodes in arms.items():
        for of_seed in episodes:
            for episode in of_seed:
                row = found.setdefault(episode.family, {"tasks": set(), "success": {}})
                row["tasks"].add(episode.task)
                row["success"].setdefault(arm, []).append(float(episode.outcome.success))
    return {
        family: {
            "tasks": len(row["tasks"]),
            "success": {arm: float(np.mean(values)) for arm, values in row["success"].items()},
        }
        for family, row in sorted(found.items())
    }


def _data(run: Run) -> dict[str, Any]:
    counts = run.stages["curate"]["counts"]
    return {split: counts.get(split, 0) for split in ("train", "val", "test")} | {"dropped": counts["dropped"]}


def _spend(run: Run, played: dict[str, dict[str, list[list[Episode]]]]) -> dict[str, Any]:
    """What the teacher was asked for, as its engine counted."""
    asked = [e for arms in played.values() for of_seed in arms["teacher"] for e in of_seed]
    steps = [step for episode in asked for step in episode.steps]
    before = [c for c in run.stages.get("rollout", {"counts": {}})["counts"].values() if isinstance(c, dict)]
    return {
        "teacher_usd": sum(step.usd or 0.0 for step in steps) + sum(c["usd"] for c in before),
        "calls": len(steps) + sum(c["steps"] for c in before),
        "tokens": sum(s.prompt_tokens + s.completion_tokens for s in steps)
        + sum(c["completion_tokens"] for c in before),
    }


def _limits(acting: Acting) -> list[str]:
    recipe = acting.recipe
    settings, seeds = recipe.evaluate, len(recipe.train.seeds)
    limits = []
    if scripted(recipe):
        limits.append(
            "The teacher is a script that knows the tasks' grammar. The student imitates it; what a model would have "
            "taught, and what was saved in time or money, is not shown here."
        )
    if acting.tasks:
        limits.append(
            f"Success is what the environment's own check says, on {len(acting.tasks[settings.splits[0]])} tasks"
            + (f", {settings.trials} trials each" if settings.trials > 1 else ", one trial each")
            + ". Other environments, and other tasks in this one, were not measured."
        )
    limits += [
        f"{len(acting.moments)} steps of the teacher's successful episodes were replayed: a step counts as acceptable "
        "where it does what the teacher did; another one may have been as good.",
        f"The student was trained with {seeds} seed{'s' if seeds > 1 else ''}; "
        + ("the spread between them is shown." if seeds > 1 else "how much another seed would differ is not known."),
        "Latency is of one step, with the prompts that the teacher had; an episode's is that times its mean number of "
        "steps, without what tools take.",
        "Speed was measured on this machine, with nothing else on it controlled; cost follows by the stated price.",
    ]
    return limits

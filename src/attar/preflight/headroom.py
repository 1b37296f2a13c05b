"""Before money is spent: has distillation something to gain here, is a prompt enough, is the teacher good enough?

Teacher, untrained student, and untrained student with demonstrations in its prompt play the same few tasks of ``val``.
No test task is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

from attar.agents.demonstrations import Demonstrated, choose_demonstrations
from attar.agents.episodes import Asking
from attar.agents.load import load_environment, stage_of, tasks_of
from attar.agents.playing import play_all, tries_of
from attar.data.episodes import Episode
from attar.engines.base import ChatEngine
from attar.engines.load import load_chat_teacher, scripted
from attar.errors import DataError, RecipeError
from attar.evaluate import stats
from attar.evaluate.evidence import bootstrap
from attar.evaluate.stats import Estimate
from attar.progress import Progress
from attar.recipe import AgentRecipe, Recipe

__all__ = ["Room", "headroom", "judge"]

# Tasks of `train` that the teacher plays to find demonstrations, for each one that is shown.
_SHOWN_FROM = 8
# A teacher that surely does not reach this teaches nothing; a prompt that is surely this near to it is enough.
_GOOD_ENOUGH = 0.5
_NEAR = 0.05
# The bootstrap is too narrow for a handful of cases.
_FEWEST = 8
# Half of the width of the interval that a number of cases is planned for.
_HALF_WIDTH = 0.1


@dataclass(frozen=True)
class Room:
    """What there is to gain on one kind of task, with intervals over tasks."""

    family: str
    """``all`` for all of them"""
    tasks: int
    teacher: Estimate
    base: Estimate
    prompted: Estimate | None
    gap: Estimate
    """teacher over the better of the two, paired"""
    says: str
    cases: int | None
    """tasks that bring the gap's interval to 0.1 on either side; None where all pairs were alike, so that nothing is
    known of how much they vary"""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def headroom(recipe: Recipe, *, tasks: int, progress: Progress) -> list[Room]:
    """Play and compare; episodes are kept in ``headroom/`` of the run folder, and not played twice.

    Args:
        recipe: of an agent, with an environment.
        tasks: of ``val``, at most.
        progress: where to report.

    Returns:
        One for all tasks, then one for each family.

    Raises:
        RecipeError: it is no such recipe.
        DataError: the environment has no task of ``val``.
        Stopped: as the teacher's engine does.
    """
    if not isinstance(recipe, AgentRecipe) or recipe.environment is None:
        raise RecipeError("--headroom: it is for task: agent with an environment, whose tasks are played")
    make = load_environment(recipe)
    environment = make()
    chosen = tasks_of(environment, "val", tasks)
    if not chosen:
        raise DataError(f"environment {environment.name} has no tasks of the split `val` to play")
    folder = recipe.folder / "headroom"
    stage = stage_of(recipe, make)
    teacher_asked = Asking(temperature=recipe.collect.rollout.temperature)
    student_asked = Asking(temperature=recipe.evaluate.temperature)
    policy = "scripted" if scripted(recipe) else recipe.teacher.model

    def played(arm: str, engine: Callable[[], ChatEngine], split: str, found: Sequence[Any]) -> list[Episode]:
        return play_all(
            engine,
            stage,
            tries_of(found, 1),
            folder / f"{arm}-{split}.jsonl",
            policy=policy if arm == "teacher" else arm,
            asking=teacher_asked if arm == "teacher" else student_asked,
            progress=progress,
            name=f"{arm} plays {split}",
        )

    arms = {"teacher": played("teacher", lambda: load_chat_teacher(recipe), "val", chosen)}
    arms["base"] = played("base", lambda: _student(recipe), "val", chosen)
    shown = recipe.evaluate.demonstrations
    if shown:
        from_tasks = tasks_of(environment, "train", shown * _SHOWN_FROM)
        taught = played("teacher", lambda: load_chat_teacher(recipe), "train", from_tasks)
        demonstrations = choose_demonstrations(taught, shown)
        arms["prompted"] = played("prompted", lambda: Demonstrated(_student(recipe), demonstrations), "val", chosen)
    families = [task.family for task in chosen]
    scores = {arm: np.array([float(e.outcome.success) for e in episodes]) for arm, episodes in arms.items()}
    rooms = [_room(recipe, "all", scores, np.ones(len(chosen), dtype=bool))]
    for family in sorted(set(families)):
        rooms.append(_room(recipe, family, scores, np.array([name == family for name in families])))
    return rooms


def _student(recipe: AgentRecipe) -> ChatEngine:
    """The model that the student starts from, whole: cut, and untrained, it could do nothing."""
    from attar.engines.local_chat import load_local_chat  # late: torch

    model = recipe.student.model or recipe.teacher.model
    if not model.startswith("hf:") or not Path(model.removeprefix("hf:")).expanduser().exists():
        raise RecipeError(f"student.model: {model!r} is no folder here; the untrained student has to play")
    return load_local_chat(
        model, device=recipe.run.device, name="base", constrained=recipe.evaluate.constrained,
        tokens_per_batch=recipe.teacher.tokens_per_batch,
    )  # fmt: skip


def _room(recipe: AgentRecipe, family: str, scores: dict[str, Any], chosen: Any) -> Room:
    settings = bootstrap(recipe)
    rows = {arm: values[chosen][None] for arm, values in scores.items()}
    best = max((arm for arm in rows if arm != "teacher"), key=lambda arm: float(rows[arm].mean()))
    gap = stats.paired_difference(rows["teacher"], rows[best], **settings)
    estimates = {arm: stats.mean_estimate(values, **settings) for arm, values in rows.items()}
    spread = float(np.std(rows["teacher"][0] - rows[best][0]))
    z = float(norm.ppf(0.5 + recipe.evaluate.confidence / 2))
    return Room(
        family=family,
        tasks=int(chosen.sum()),
        teacher=estimates["teacher"],
        base=estimates["base"],
        prompted=estimates.get("prompted"),
        gap=gap,
        says=judge(estimates["teacher"], gap, int(chosen.sum()), best),
        cases=math.ceil((z * spread / _HALF_WIDTH) ** 2) if spread else None,
    )


def judge(teacher: Estimate, gap: Estimate, tasks: int, best: str) -> str:
    """What the intervals allow to say.

    Args:
        teacher: success of the teacher.
        gap: the teacher's success over the better untrained student's.
        tasks: how many were played; of very few nothing is said.
        best: which of the untrained ones is the better.
    """
    if teacher.hi < _GOOD_ENOUGH:
        return f"do not distil this: the teacher itself succeeds in at most {teacher.hi:.0%}"
    if tasks < _FEWEST:
        return f"too few tasks to say anything; at least {_FEWEST}"
    if gap.hi < _NEAR:
        enough = "a prompt is enough" if best == "prompted" else "the untrained student is enough"
        return f"{enough}: at most {max(gap.hi, 0):.0%} are missing"
    if gap.lo > 0:
        return f"there is something to gain: {gap.lo:.0%} to {gap.hi:.0%}"
    return "not known: the interval holds both, nothing to gain and something"

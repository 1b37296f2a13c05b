"""The teacher's own episodes: teacher x environment -> raw/episodes/{train,val}.jsonl."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from attar.agents.environments import Environment
from attar.agents.episodes import Asking
from attar.agents.load import load_environment, stage_of, tasks_of
from attar.agents.playing import Stage, play_all, tries_of
from attar.data.episodes import Episode
from attar.engines.base import ChatEngine
from attar.engines.load import load_chat_teacher, scripted
from attar.errors import DataError
from attar.recipe import AgentRecipe
from attar.workspace import Run, open_atomic

__all__ = ["EPISODES", "rollout"]

EPISODES = ("raw", "episodes")
"""folder of the teacher's episodes in a run folder"""


def rollout(recipe: AgentRecipe, run: Run) -> dict[str, Any]:
    """Play the tasks of ``train`` and ``val``; nothing where the recipe names a file of episodes.

    Raises:
        DataError: the environment has no task to train on, or one stands in two splits.
        Stopped: as the teacher's engine does; the same call goes on from there.
    """
    if recipe.data.train is not None:
        return {"episodes": 0}
    make = load_environment(recipe)
    environment = make()
    settings = recipe.collect.rollout
    tasks = {
        "train": tasks_of(environment, "train", settings.tasks),
        "val": tasks_of(environment, "val", settings.val_tasks),
    }
    if not tasks["train"]:
        raise DataError(f"environment {environment.name} has no tasks of the split `train`")
    _require_apart(environment, [*tasks, *recipe.evaluate.splits])
    engine = cache(lambda: load_chat_teacher(recipe))
    trials = {"train": settings.trials, "val": 1}
    counts: dict[str, Any] = {}
    for split, found in tasks.items():
        if found:
            tries = tries_of(found, trials[split])
            episodes = _played(engine, recipe, run, stage_of(recipe, make), split, tries)
            counts[split] = _counts(episodes)
    return counts


def _played(
    engine: Callable[[], ChatEngine], recipe: AgentRecipe, run: Run, stage: Stage, split: str, tries: Sequence[Any]
) -> list[Episode]:
    """The episodes of a split, in the order of their tasks whatever the order in which they ended."""
    journal = run.path(*EPISODES, f"{split}.parts.jsonl")
    episodes = play_all(
        engine,
        stage,
        tries,
        journal,
        policy="scripted" if scripted(recipe) else recipe.teacher.model,
        asking=Asking(temperature=recipe.collect.rollout.temperature),
        progress=run.progress,
        name=f"teacher plays {split}",
    )
    with open_atomic(run.path(*EPISODES, f"{split}.jsonl")) as handle:
        for episode in episodes:
            handle.write((json.dumps(episode.wire, ensure_ascii=False) + "\n").encode())
    journal.unlink(missing_ok=True)
    return episodes


def _require_apart(environment: Environment, splits: Sequence[str]) -> None:
    """A task is in one split, or what is tested was learned."""
    where: dict[str, str] = {}
    for split in dict.fromkeys(splits):
        for task in environment.tasks(split):
            if where.setdefault(task.id, split) != split:
                raise DataError(
                    f"environment {environment.name}: task {task.id!r} stands in {where[task.id]} and in {split}; what "
                    "is tested would have been learned"
                )


def _counts(episodes: Sequence[Episode]) -> dict[str, Any]:
    """What became of them."""
    return {
        "episodes": len(episodes),
        "successes": sum(episode.outcome.success for episode in episodes),
        "steps": sum(len(episode.steps) for episode in episodes),
        "completion_tokens": sum(step.completion_tokens for e in episodes for step in e.steps),
        "usd": sum(step.usd or 0.0 for e in episodes for step in e.steps),
        "stopped": dict(Counter(episode.stopped for episode in episodes)),
    }

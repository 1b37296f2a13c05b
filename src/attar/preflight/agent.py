"""What can be known of an agent's job."""

from __future__ import annotations

from collections.abc import Iterator

from attar.agents.environments import Environment
from attar.agents.load import load_environment, tasks_of
from attar.data.schemas import check_tools
from attar.engines.load import load_chat_teacher, scripted
from attar.errors import AttarError
from attar.preflight import chat
from attar.preflight.findings import Finding
from attar.recipe import AgentRecipe

__all__ = ["check"]

# Tasks of each split that are started, to look at their tools.
_STARTED = 20


def check(recipe: AgentRecipe) -> list[Finding]:
    """Look at the environment, its tasks and tools, and the teacher; of recorded episodes, at tokens and models as for
    a chat.
    """
    findings: list[Finding] = []
    try:
        if recipe.environment is not None:
            findings += _environment(recipe, load_environment(recipe)())
        if scripted(recipe):
            findings.append(
                Finding("warn", f"teacher.model: {recipe.teacher.model} is a script: the student will imitate it")
            )
        if recipe.data.train is None:
            load_chat_teacher(recipe)
            findings.append(Finding("ok", f"teacher: {recipe.teacher.model} can be asked"))
            return findings
    except AttarError as error:
        return [*findings, Finding("refuse", str(error))]
    return [*findings, *chat.check(recipe)]


def _environment(recipe: AgentRecipe, environment: Environment) -> Iterator[Finding]:
    """Its splits, and whether a few tasks of each start."""
    for split in dict.fromkeys(("train", "val", *recipe.evaluate.splits)):
        tasks = tasks_of(environment, split)
        wanted = split != "val"
        families = len({task.family for task in tasks})
        words = f"environment {environment.name}: {split}: {len(tasks)} tasks of {families} families"
        yield Finding("refuse" if wanted and not tasks else "ok", words)
        for task in tasks[:_STARTED]:
            try:
                check_tools(environment.start(task).tools, f"task {task.id}")
            except Exception as error:
                yield Finding("refuse", f"environment {environment.name}: task {task.id} cannot be played: {error}")
                break

"""Runs the stages that are missing or out of date."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attar import __version__
from attar.engines.load import teacher_fingerprint
from attar.errors import RunError, UsageError
from attar.progress import Progress, Silent
from attar.recipe import Recipe
from attar.stages import STAGES, Stage
from attar.workspace import Run, open_run, write_atomic

__all__ = ["Plan", "plan", "run", "shorten"]


@dataclass(frozen=True)
class Plan:
    """What a run would do with one stage, and why; no reasons means that it is done."""

    stage: str
    reasons: tuple[str, ...]


def _lookup(recipe: dict[str, Any], dotted: str) -> Any:
    value: Any = recipe
    for part in dotted.split("."):
        value = value[part]
    return value


def _leaves(prefix: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {key: leaf for name, part in value.items() for key, leaf in _leaves(f"{prefix}.{name}", part).items()}
    return {prefix: value}


def _fingerprint(stage: Stage, recipe: Recipe, run: Run) -> dict[str, Any]:
    dumped = recipe.dump()
    part = {key: leaf for dotted in stage.reads for key, leaf in _leaves(dotted, _lookup(dumped, dotted)).items()}
    inputs: dict[str, str] = {}
    unread = {name for other in STAGES[recipe.task] for name in other.people}
    for needed in stage.needs:
        inputs |= {name: value for name, value in run.outputs_of(needed).items() if name not in unread}
    if stage.data:
        for key, path in recipe.files.items():
            # The content decides, not the place; a missing file is the stage's own error to tell.
            part.pop(key)
            inputs[key] = run.fingerprint_path(path) if path.exists() else "absent"
    if stage.teacher:
        inputs["teacher.model"] = teacher_fingerprint(recipe, run)
    return {"recipe": part, "inputs": inputs, "version": __version__}


def _selected(recipe: Recipe, until: str | None) -> Sequence[Stage]:
    stages = STAGES[recipe.task]
    if until is None:
        return stages
    names = [stage.name for stage in stages]
    if until not in names:
        raise UsageError(f"no stage {until!r}; there are {', '.join(names)}")
    return stages[: names.index(until) + 1]


def plan(recipe: Recipe, until: str | None = None) -> list[Plan]:
    """What :func:`run` would do now, without doing it."""
    if not (recipe.folder / "manifest.json").exists():
        return [Plan(stage.name, ("not done yet",)) for stage in _selected(recipe, until)]
    plans: list[Plan] = []
    with open_run(recipe.folder, recipe.name) as opened:
        for stage in _selected(recipe, until):
            waiting = [p.stage for p in plans if p.reasons and p.stage in stage.needs]
            if waiting:
                plans.append(Plan(stage.name, (f"depends on {', '.join(waiting)}",)))
            else:
                plans.append(Plan(stage.name, tuple(opened.changes(stage.name, _fingerprint(stage, recipe, opened)))))
    return plans


def shorten(reasons: Sequence[str], most: int = 3) -> str:
    """The first reasons, and how many more there are: one line for people."""
    more = len(reasons) - most
    return "; ".join(reasons[:most]) + (f"; and {more} more" if more > 0 else "")


def _set_threads(recipe: Recipe) -> None:
    import torch

    torch.set_num_threads(recipe.run.threads or os.cpu_count() or 1)


def run(recipe: Recipe, *, until: str | None = None, progress: Progress | None = None) -> Path:
    """Run the stages that are missing or out of date, up to and including ``until``.

    Args:
        recipe: the job.
        until: the last stage to run; None runs all.
        progress: where to report; None is silent.

    Returns:
        The run folder.

    Raises:
        AttarError: whatever a stage refuses or fails on; the run can be started again and goes on.
    """
    progress = progress or Silent()
    _set_threads(recipe)
    with open_run(recipe.folder, recipe.name, progress) as opened:
        import yaml

        resolved = yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True)
        write_atomic(opened.path("recipe.resolved.yaml"), resolved.encode())
        for stage in _selected(recipe, until):
            fingerprint = _fingerprint(stage, recipe, opened)
            reasons = opened.changes(stage.name, fingerprint)
            if not reasons:
                progress.note(f"{stage.name}: done before")
                continue
            resumed = opened.begin(stage.name, fingerprint, stage.folders)
            progress.note(f"{stage.name}: {'goes on' if resumed else shorten(reasons)}")
            started = time.time()
            counts = stage(recipe, opened)
            opened.finish(stage.name, fingerprint, stage.folders, counts, started)
            if _fingerprint(stage, recipe, opened) != fingerprint:
                raise RunError(f"{stage.name}: its inputs changed while it ran; run again")
    return recipe.folder

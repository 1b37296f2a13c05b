"""The stages in order: what each reads, what it writes, and when it has to run again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attar import __version__
from attar.engines.load import teacher_files
from attar.errors import RunError, UsageError
from attar.progress import Progress, Silent
from attar.recipe import Recipe
from attar.workspace import Run, open_run, write_atomic

__all__ = ["STAGES", "Plan", "plan", "run", "shorten"]


@dataclass(frozen=True)
class Stage:
    """One stage: a function of (recipe, run), and all that decides whether its files are still right."""

    name: str
    function: Callable[[Recipe, Run], dict[str, Any]]
    reads: tuple[str, ...]
    """dotted keys of the recipe"""
    needs: tuple[str, ...]
    """stages whose outputs it reads"""
    folders: tuple[str, ...]
    """what it writes, and alone"""
    data: bool = False
    """whether it reads the user's files"""
    teacher: bool = False
    """whether it reads the teacher's weights"""


def _curate(recipe: Recipe, run: Run) -> dict[str, Any]:
    from attar.collect.curate import curate

    return curate(recipe, run)


def _score(recipe: Recipe, run: Run) -> dict[str, Any]:
    from attar.signals.score import score

    return score(recipe, run)


def _calibrate(recipe: Recipe, run: Run) -> dict[str, Any]:
    from attar.signals.score import calibrate

    return calibrate(recipe, run)


def _train(recipe: Recipe, run: Run) -> dict[str, Any]:
    from attar.train.stage import train

    return train(recipe, run)


def _export(recipe: Recipe, run: Run) -> dict[str, Any]:
    from attar.students.export import export

    return export(recipe, run)


def _evaluate(recipe: Recipe, run: Run) -> dict[str, Any]:
    from attar.evaluate.stage import evaluate

    return evaluate(recipe, run)


def _report(recipe: Recipe, run: Run) -> dict[str, Any]:
    from attar.evaluate.report import report

    return report(recipe, run)


_ASKED = ("data.labels", "teacher.prompts", "teacher.label_words", "teacher.length", "teacher.dtype")

STAGES: tuple[Stage, ...] = (
    Stage("curate", _curate, ("data", "curate", "run.seed"), (), ("data",), data=True),
    Stage(
        "score",
        _score,
        (*_ASKED, "teacher.content_free", "teacher.tokens_per_batch"),
        ("curate",),
        ("signals/raw",),
        teacher=True,
    ),
    Stage(
        "calibrate",
        _calibrate,
        ("data.labels", "teacher.calibration", "teacher.prior", "teacher.content_free"),
        ("curate", "score"),
        ("signals/labels",),
        teacher=True,
    ),
    Stage(
        "train",
        _train,
        ("data.labels", "student", "distill", "train", "evaluate.baseline", "run.device", "run.threads"),
        ("curate", "calibrate"),
        ("models", "work"),
        teacher=True,
    ),
    Stage("export", _export, ("export", "train.seeds"), ("curate", "train"), ("export",)),
    Stage(
        "evaluate",
        _evaluate,
        (
            "name",
            "task",
            "data.labels",
            "data.licence",
            "teacher",
            "student.model",
            "distill",
            "train.seeds",
            "evaluate",
            "run.seed",
            "run.device",
            "run.threads",
        ),
        ("curate", "score", "calibrate", "train", "export"),
        ("evaluate",),
        teacher=True,
    ),
    Stage("report", _report, (), ("evaluate",), ("report",)),
)


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
    for needed in stage.needs:
        inputs |= run.outputs_of(needed)
    if stage.data:
        for key in ("pool", "dev", "calibration", "test"):
            path = getattr(recipe.data, key)
            # The content decides, not the place; a missing file is the stage's own error to tell.
            part.pop(f"data.{key}")
            inputs[f"data.{key}"] = run.fingerprint_path(path) if path and path.is_file() else "absent"
    if stage.teacher:
        inputs["teacher.model"] = run.fingerprint_path(teacher_files(recipe))
    return {"recipe": part, "inputs": inputs, "version": __version__}


def _selected(until: str | None) -> Sequence[Stage]:
    if until is None:
        return STAGES
    names = [stage.name for stage in STAGES]
    if until not in names:
        raise UsageError(f"no stage {until!r}; there are {', '.join(names)}")
    return STAGES[: names.index(until) + 1]


def plan(recipe: Recipe, until: str | None = None) -> list[Plan]:
    """What :func:`run` would do now, without doing it."""
    if not (recipe.folder / "manifest.json").exists():
        return [Plan(stage.name, ("not done yet",)) for stage in _selected(until)]
    plans: list[Plan] = []
    with open_run(recipe.folder, recipe.name) as opened:
        for stage in _selected(until):
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
        for stage in _selected(until):
            fingerprint = _fingerprint(stage, recipe, opened)
            reasons = opened.changes(stage.name, fingerprint)
            if not reasons:
                progress.note(f"{stage.name}: done before")
                continue
            resumed = opened.begin(stage.name, fingerprint, stage.folders)
            progress.note(f"{stage.name}: {'goes on' if resumed else shorten(reasons)}")
            started = time.time()
            counts = stage.function(recipe, opened)
            opened.finish(stage.name, fingerprint, stage.folders, counts, started)
            if _fingerprint(stage, recipe, opened) != fingerprint:
                raise RunError(f"{stage.name}: its inputs changed while it ran; run again")
    return recipe.folder

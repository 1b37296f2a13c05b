"""The stages of each task, in order."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

from attar.recipe import Recipe
from attar.workspace import Run

__all__ = ["STAGES", "Stage"]


@dataclass(frozen=True)
class Stage:
    """One stage, and all that decides whether its files are still right."""

    name: str
    function: str
    """``module:name`` of a function of (recipe, run), imported when it is needed"""
    reads: tuple[str, ...]
    """dotted keys of the recipe"""
    needs: tuple[str, ...]
    """stages whose outputs it reads"""
    folders: tuple[str, ...]
    """what it writes, and alone"""
    people: tuple[str, ...] = ()
    """files among what it writes that no stage reads: a change in them alone makes nothing out of date"""
    data: bool = False
    """whether it reads the user's files"""
    teacher: bool = False
    """whether it depends on the teacher itself"""

    def __call__(self, recipe: Recipe, run: Run) -> dict[str, Any]:
        """Run it; returns its counts."""
        module, _, name = self.function.partition(":")
        counts: dict[str, Any] = getattr(importlib.import_module(module), name)(recipe, run)
        return counts


_ANSWERED = ("teacher.samples", "teacher.constrained", "teacher.max_tokens")
_MACHINE = ("run.device", "run.threads")
_ASKED = ("data.labels", "teacher.prompts", "teacher.label_words", "teacher.length", "teacher.dtype", *_ANSWERED)
_REPORT = Stage("report", "attar.evaluate.report:report", (), ("evaluate",), ("report",))

_CURATE = Stage(
    "curate",
    "attar.collect.curate:curate",
    ("name", "task", "data", "curate", "teacher.model", "teacher.licence", "teacher.terms", "run.seed"),
    (),
    ("data",),
    people=("data/README.md", "data/dropped.jsonl"),
    data=True,
)

_CLASSIFY = (
    _CURATE,
    Stage(
        "score",
        "attar.signals.score:score",
        (*_ASKED, "teacher.content_free", "teacher.tokens_per_batch"),
        ("curate",),
        ("signals/raw",),
        teacher=True,
    ),
    Stage(
        "calibrate",
        "attar.signals.score:calibrate",
        ("data.labels", "teacher.calibration", "teacher.prior", "teacher.content_free"),
        ("curate", "score"),
        ("signals/labels",),
        teacher=True,
    ),
    Stage(
        "train",
        "attar.train.stage:train",
        ("data.labels", "student", "distill", "train", "evaluate.baseline", *_MACHINE),
        ("curate", "calibrate"),
        ("models", "work"),
        teacher=True,
    ),
    Stage("export", "attar.students.export:export", ("export", "train.seeds"), ("curate", "train"), ("export",)),
    Stage(
        "evaluate",
        "attar.evaluate.classify:evaluate",
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
            *_MACHINE,
        ),
        ("curate", "score", "calibrate", "train", "export"),
        ("evaluate",),
        teacher=True,
    ),
    _REPORT,
)

_CHAT = (
    _CURATE,
    Stage(
        "score",
        "attar.signals.chat:score",
        ("teacher.dtype", "curate.max_tokens", "curate.max_truncated", "distill", "run.seed"),
        ("curate",),
        ("signals/tokens",),
        teacher=True,
    ),
    Stage(
        "train",
        "attar.train.chat:train",
        (
            "teacher.dtype",
            "student",
            "curate.max_tokens",
            "curate.max_truncated",
            "distill",
            "train",
            "run.seed",
            *_MACHINE,
        ),
        ("curate", "score"),
        ("models", "work"),
        teacher=True,
    ),
    Stage(
        "export",
        "attar.students.chat:export",
        ("export", "train.seeds", "student.dtype", "curate.max_tokens", "curate.max_truncated"),
        ("curate", "train"),
        ("export",),
        teacher=True,
    ),
    Stage(
        "evaluate",
        "attar.evaluate.chat:evaluate",
        (
            "name",
            "task",
            "data.licence",
            "teacher",
            "student",
            "curate",
            "distill",
            "train.seeds",
            "export",
            "evaluate",
            "run.seed",
            *_MACHINE,
        ),
        ("curate", "score", "train", "export"),
        ("evaluate",),
        teacher=True,
    ),
    _REPORT,
)

_CHAT_STAGES = {stage.name: stage for stage in _CHAT}

_AGENT = (
    Stage(
        "rollout",
        "attar.collect.rollout:rollout",
        ("data.train", "environment", "collect.rollout", "evaluate.splits", "teacher", "run.seed"),
        (),
        ("raw/episodes",),
        teacher=True,
    ),
    replace(_CURATE, function="attar.collect.episodes:curate", needs=("rollout",)),
    _CHAT_STAGES["score"],
    replace(
        _CHAT_STAGES["train"],
        function="attar.rounds:train",
        reads=(*_CHAT_STAGES["train"].reads, "environment", "collect.rollout"),
        folders=(*_CHAT_STAGES["train"].folders, "rounds"),
    ),
    _CHAT_STAGES["export"],
    replace(
        _CHAT_STAGES["evaluate"],
        function="attar.evaluate.agent:evaluate",
        reads=(*_CHAT_STAGES["evaluate"].reads, "environment"),
        needs=("rollout", *_CHAT_STAGES["evaluate"].needs),
    ),
    _REPORT,
)

STAGES: dict[str, tuple[Stage, ...]] = {"classify": _CLASSIFY, "chat": _CHAT, "agent": _AGENT}

"""How an arm of the classify task is asked, and loading it as it is served."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from attar.data.types import Part
from attar.engines.base import Engine
from attar.engines.classifier import load_classifier
from attar.engines.load import load_teacher
from attar.evaluate.speed import Subject
from attar.recipe import ClassifyRecipe
from attar.signals.calibration import Calibration
from attar.signals.labels import LabelQuestion

__all__ = ["Arm", "fit_temperature", "open_arm", "open_subject"]

Floats = npt.NDArray[np.float64]


class Arm(Protocol):
    """One model under evaluation."""

    engine: Engine

    def answer(self, texts: Sequence[str]) -> tuple[Floats, int]:
        """Log-probabilities [texts, labels], and the prompt tokens that were read."""


class _TeacherArm:
    def __init__(self, recipe: ClassifyRecipe, calibration: Calibration, fresh: bool) -> None:
        self.engine = load_teacher(recipe, fresh=fresh)
        self._question = LabelQuestion(recipe)
        self._calibration = calibration

    def answer(self, texts: Sequence[str]) -> tuple[Floats, int]:
        raw, tokens = self._question.ask(self.engine, texts)
        return self._calibration.apply(raw), tokens


class _ClassifierArm:
    def __init__(self, recipe: ClassifyRecipe, folder: Path) -> None:
        self.engine: Engine = load_classifier(folder)
        self._labels = recipe.data.labels

    def answer(self, texts: Sequence[str]) -> tuple[Floats, int]:
        scores = self.engine.score([(Part(text, trusted=False),) for text in texts], self._labels)
        return scores.log_probs.astype(np.float64), int(scores.prompt_tokens.sum())


def open_arm(recipe: ClassifyRecipe, folder: Path | None, calibration: dict[str, Any], *, fresh: bool = False) -> Arm:
    """Load an arm: a trained classifier from its folder, or the teacher (``folder`` None) with its calibration.

    Args:
        recipe: the job.
        folder: of the classifier.
        calibration: of the teacher.
        fresh: ask a teacher behind an API anew, as a measurement of speed has to.
    """
    if folder is not None:
        return _ClassifierArm(recipe, folder)
    return _TeacherArm(recipe, Calibration.from_json(calibration), fresh)


class _Subject:
    def __init__(self, arm: Arm) -> None:
        self._arm = arm
        self.parameters = arm.engine.parameters

    def answer(self, requests: Sequence[str]) -> list[float]:
        self._arm.answer(requests)
        return []


def open_subject(arguments: dict[str, Any]) -> Subject:
    """What ``attar.evaluate.speed`` measures; ``arguments`` holds the recipe and what ``open_arm`` takes."""
    recipe = ClassifyRecipe.model_validate(arguments["recipe"])
    folder = Path(arguments["folder"]) if arguments["folder"] else None
    if folder is None or not (folder / "idf.npy").is_file():
        import torch

        torch.set_num_threads(recipe.run.threads or os.cpu_count() or 1)
    return _Subject(open_arm(recipe, folder, arguments["calibration"], fresh=True))


def fit_temperature(log_probs: Floats, gold: npt.NDArray[np.int64]) -> float:
    """The temperature that makes labelled cases most likely (Guo et al. 2017, arXiv:1706.04599, section 4.2).

    Args:
        log_probs: [cases, labels].
        gold: [cases], label numbers.

    Returns:
        A temperature between 1/20 and 20; answers do not change with it, confidences do.
    """

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(log_probs / np.exp(log_temperature), axis=-1)
        return float(-scaled[np.arange(len(gold)), gold].mean())

    found = minimize_scalar(loss, bounds=(-np.log(20), np.log(20)), method="bounded")
    return float(np.exp(found.x))

"""models/ -> export/: the student as it is served, checked against what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from attar.data.files import read_jsonl
from attar.engines.textclassifier import load_text_classifier, log_probs
from attar.errors import RunError
from attar.recipe import ClassifyRecipe
from attar.workspace import Run, replace_folder

__all__ = ["export"]

# Largest change of a probability that storing the weights may cause, and the least share of equal answers.
_TOLERANCE = {"float32": (1e-5, 1.0), "float16": (5e-2, 0.99)}


def export(recipe: ClassifyRecipe, run: Run) -> dict[str, Any]:
    """Export student and control of every seed.

    Raises:
        RunError: an export answers differently from the trained model beyond the tolerance of its number format.
    """
    texts = [row["text"] for row in read_jsonl(run.path("data", "val.jsonl"))]
    worst = 0.0
    for arm in ("student", "control"):
        for seed in recipe.train.seeds:
            source, target = (run.path(top, arm, f"seed-{seed}") for top in ("models", "export"))
            if not target.exists():
                trained = load_text_classifier(source)
                with replace_folder(target) as temporary:
                    trained.save(temporary, getattr(torch, recipe.export.dtype))
            worst = max(worst, _compare(recipe.export.dtype, source, target, texts))
    return {"dtype": recipe.export.dtype, "largest_probability_difference": worst}


def _compare(dtype: str, source: Path, target: Path, texts: list[str]) -> float:
    trained, exported = (log_probs(load_text_classifier(folder), texts) for folder in (source, target))
    difference = float(np.abs(np.exp(trained) - np.exp(exported)).max())
    equal = float((trained.argmax(-1) == exported.argmax(-1)).mean())
    tolerance, least = _TOLERANCE[dtype]
    if difference > tolerance or equal < least:
        raise RunError(
            f"the export {target} differs from what was trained: probabilities by up to {difference:.3g} "
            f"(at most {tolerance}), {equal:.1%} equal answers (at least {least:.0%}); set export.dtype: float32"
        )
    return difference

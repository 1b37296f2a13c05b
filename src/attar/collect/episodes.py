"""Episodes -> data/: curation of what was played or recorded."""

from __future__ import annotations

from typing import Any

from attar.collect.curate import curate as curate_files
from attar.collect.rollout import EPISODES
from attar.recipe import AgentRecipe
from attar.workspace import Run

__all__ = ["curate"]


def curate(recipe: AgentRecipe, run: Run) -> dict[str, Any]:
    """Curate the recipe's files, or the teacher's own episodes where it names none.

    Raises:
        DataError: as :func:`attar.collect.curate.curate`.
    """
    if recipe.data.train is None:
        played = {split: run.path(*EPISODES, f"{split}.jsonl") for split in ("train", "val")}
        data = recipe.data.model_copy(update={split: path for split, path in played.items() if path.exists()})
        recipe = recipe.model_copy(update={"data": data})
    return curate_files(recipe, run)

"""Who said what is trained on: the models that rows name, and what their terms say of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from attar.collect.tables import Indices, Table
from attar.errors import PreflightRefused
from attar.recipe import ChatRecipe, ClassifyRecipe
from attar.terms import NO_ADVICE, Terms, terms_of

__all__ = ["Model", "counted", "models", "require_acknowledged"]

_ENGINES = ("anthropic", "gguf", "hf", "openai", "vllm")


@dataclass(frozen=True)
class Model:
    """A model whose answers are trained on."""

    name: str
    """as the rows have it"""
    rows: int
    terms: Terms


def counted(parts: Iterable[tuple[Table, Indices]], column: str) -> list[tuple[str, int]]:
    """What rows say in a column of names, and how many say it, the most frequent first; nothing where none is said."""
    found: Counter[str] = Counter()
    for table, indices in parts:
        values, counts = np.unique(table.rows[column][indices], return_counts=True)
        found.update(
            {table.names[value]: n for value, n in zip(values.tolist(), counts.tolist(), strict=True) if value}
        )
    return sorted(found.items(), key=lambda item: (-item[1], item[0]))


def models(parts: Iterable[tuple[Table, Indices]]) -> list[Model]:
    """The models that rows name, by how many do."""
    return [Model(name, n, _terms(name)) for name, n in counted(parts, "model")]


def _terms(name: str) -> Terms:
    # A log has the model's own name; what attar made may have the recipe's, engine first.
    return terms_of(name if name.partition(":")[0] in _ENGINES else f":{name}")


def require_acknowledged(recipe: ChatRecipe | ClassifyRecipe, found: list[Model]) -> None:
    """Refuse to train on answers of models whose terms restrict it, unless the recipe acknowledges that.

    Raises:
        PreflightRefused: names the models.
    """
    if recipe.teacher.terms == "acknowledged":
        return
    restricted = [model for model in found if model.terms.use == "restricted"]
    if restricted:
        said = "; ".join(f"{model.rows:,} of {model.name} ({model.terms.words})" for model in restricted)
        raise PreflightRefused(
            f"terms: examples that are trained on are answers of models whose terms restrict that: {said}. If you may "
            f"train on them all the same, set teacher.terms: acknowledged; else take them out. {NO_ADVICE}"
        )

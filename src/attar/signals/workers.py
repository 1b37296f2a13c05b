"""Scoring by workers on other machines: a teacher in each, its signals back in order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from attar.cluster.machines import Work, start_cluster
from attar.cluster.shards import stage_shards
from attar.engines.load import load_teacher, teacher_files
from attar.engines.local import load_local, resolve_device
from attar.recipe import ChatRecipe, ClassifyRecipe, Recipe
from attar.signals.labels import LabelQuestion
from attar.signals.language import SignalKind, ask_in_batches
from attar.signals.store import SignalStore
from attar.signals.tables import examples_of, examples_table, records_of, records_table, requests_table
from attar.tokens import TokenizedExample

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Made", "TokenWork", "WordWork", "ask_about_tokens", "ask_about_words"]

AnyRecipe = TypeVar("AnyRecipe", ChatRecipe, ClassifyRecipe)

Made = tuple[list[str], list[dict[str, np.ndarray[Any, Any]]], int]
"""Ids, their records, and the prompt tokens that were read for them"""


@dataclass(frozen=True)
class TokenWork:
    """What a causal language model says about tokenised examples."""

    recipe: ChatRecipe
    kind: SignalKind

    def open(self) -> Callable[[pa.Table], pa.Table]:
        """Load the teacher; returns examples -> records."""
        teacher = self.recipe.teacher
        engine = load_local(teacher.model, dtype=teacher.dtype, device=resolve_device(self.recipe.run.device))

        def work(table: pa.Table) -> pa.Table:
            examples = examples_of(table)
            records = ask_in_batches(engine.model, engine.tokenizer, examples, self.kind, teacher.tokens_per_batch)
            return records_table([example.id for example in examples], records, sum(map(len, examples)))

        return work


@dataclass(frozen=True)
class WordWork:
    """What a teacher says about the words that stand for labels."""

    recipe: ClassifyRecipe

    def open(self) -> Callable[[pa.Table], pa.Table]:
        """Load the teacher; returns requests -> records of their words' scores."""
        engine = load_teacher(self.recipe)
        question = LabelQuestion(self.recipe)

        def work(table: pa.Table) -> pa.Table:
            values, tokens = question.ask(engine, table["text"].to_pylist())
            return records_table(table["id"].to_pylist(), [{"scores": rows[None]} for rows in values], tokens)

        return work


def ask_about_tokens(
    recipe: ChatRecipe, kind: SignalKind, parts: Sequence[Sequence[TokenizedExample]], store: SignalStore
) -> Generator[Made]:
    """Ask the workers of the recipe's cluster about examples; yields the records of each part, in order.

    Args:
        recipe: says where the cluster is, and which teacher its workers load.
        kind: what is kept.
        parts: each a shard.
        store: where the records will be kept; what is on its way stands beside it, or at ``run.shards``.
    """
    return _asked(recipe, TokenWork(_sent(recipe), kind), parts, examples_table, store)


def ask_about_words(
    recipe: ClassifyRecipe, parts: Sequence[Sequence[tuple[str, str]]], store: SignalStore
) -> Generator[Made]:
    """The same for the words that stand for labels; the parts are of (id, text)."""
    return _asked(recipe, WordWork(_sent(recipe)), parts, requests_table, store)


def _asked(
    recipe: Recipe,
    work: Work,
    parts: Sequence[Sequence[Any]],
    tabled: Callable[[Sequence[Any]], pa.Table],
    store: SignalStore,
) -> Generator[Made]:
    shards = stage_shards(recipe, "score", store.folder, store.fingerprint)
    if parts:
        with start_cluster(recipe.run) as cluster:
            yield from map(records_of, cluster.map(work, map(tabled, parts), shards))
    # Whoever draws has kept all by now.
    shards.remove()


def _sent(recipe: AnyRecipe) -> AnyRecipe:
    """The recipe for workers, who may stand in another folder."""
    if not recipe.teacher.model.startswith("hf:"):
        return recipe
    model = f"hf:{teacher_files(recipe).resolve()}"
    return recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"model": model})})

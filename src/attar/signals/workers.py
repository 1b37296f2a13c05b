"""Scoring by workers on other machines: a teacher in each, its signals back in order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attar.cluster.machines import start_cluster
from attar.cluster.shards import Shards
from attar.engines.api import ledger_path
from attar.engines.leases import LeasedLedger, lease_ledger, own_share
from attar.engines.load import for_workers, load_teacher, served
from attar.engines.local import LocalEngine, load_local, resolve_device
from attar.engines.vllm import load_vllm
from attar.recipe import ChatRecipe, ClassifyRecipe
from attar.signals.labels import LabelQuestion
from attar.signals.language import SignalKind, ask_in_batches
from attar.signals.packing import Packed
from attar.signals.served import ask_vllm, check_lengths, refuse_unfit
from attar.signals.tables import examples_of, examples_table, records_of, records_table, requests_table
from attar.tokens import TokenizedExample

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Made", "TokenWork", "WordWork", "ask_about_tokens", "ask_about_words", "load_asker"]

Made = tuple[list[str], list[dict[str, np.ndarray[Any, Any]]], int]
"""Ids, their records, and the prompt tokens that were read for them"""


def load_asker(
    recipe: ChatRecipe, kind: SignalKind, engine: LocalEngine | None = None
) -> Callable[[Sequence[TokenizedExample]], list[Packed]]:
    """The teacher, ready to be asked: examples -> their records.

    Args:
        recipe: names it.
        kind: what is kept.
        engine: the teacher, where it is loaded already.

    Raises:
        CapabilityError: vLLM does not give what is to be kept, or the recipe wants.
    """
    teacher = recipe.teacher
    if teacher.model.startswith("vllm:"):
        vllm = load_vllm(teacher.model, dtype=teacher.dtype)
        refuse_unfit(recipe, vllm, kind)

        def ask(examples: Sequence[TokenizedExample]) -> list[Packed]:
            check_lengths(vllm, examples)
            return ask_vllm(vllm, examples, kind)

        return ask
    local = engine or load_local(teacher.model, dtype=teacher.dtype, device=resolve_device(recipe.run.device))
    return lambda examples: ask_in_batches(local.model, local.tokenizer, examples, kind, teacher.tokens_per_batch)


@dataclass(frozen=True)
class TokenWork:
    """What a causal language model says about tokenised examples."""

    recipe: ChatRecipe
    kind: SignalKind

    def open(self, threads: int) -> Callable[[pa.Table], pa.Table]:
        """Load the teacher; returns examples -> records."""
        torch.set_num_threads(threads)
        ask = load_asker(self.recipe, self.kind)

        def work(table: pa.Table) -> pa.Table:
            examples = examples_of(table)
            return records_table([example.id for example in examples], ask(examples), sum(map(len, examples)))

        return work


@dataclass(frozen=True)
class WordWork:
    """What a teacher says about the words that stand for labels."""

    recipe: ClassifyRecipe
    ledger: LeasedLedger | None = None
    """of a teacher behind an API"""

    def open(self, threads: int) -> Callable[[pa.Table], pa.Table]:
        """Load the teacher; returns requests -> records of their words' scores."""
        torch.set_num_threads(threads)
        run = self.recipe.run.model_copy(update={"threads": threads})
        engine = load_teacher(self.recipe.model_copy(update={"run": run}), ledger=self.ledger)
        question = LabelQuestion(self.recipe)

        def work(table: pa.Table) -> pa.Table:
            values, tokens = question.ask(engine, table["text"].to_pylist())
            return records_table(table["id"].to_pylist(), [{"scores": rows[None]} for rows in values], tokens)

        return work


def ask_about_tokens(
    recipe: ChatRecipe, kind: SignalKind, parts: Sequence[Sequence[TokenizedExample]], shards: Shards
) -> Generator[Packed]:
    """Ask the workers of the recipe's cluster about examples; yields their records, in order.

    Args:
        recipe: says where the cluster is, and which teacher its workers load.
        kind: what is kept.
        parts: each a shard.
        shards: what is on its way; to be removed once the records are kept.
    """
    if not parts:
        return
    with start_cluster(recipe.run) as cluster:
        tables = map(examples_table, parts)
        for made in cluster.map(TokenWork(for_workers(recipe), kind), tables, shards):
            yield from records_of(made)[1]


def ask_about_words(
    recipe: ClassifyRecipe, parts: Sequence[Sequence[tuple[str, str]]], shards: Shards
) -> Generator[Made]:
    """The same for the words that stand for labels; the parts are of (id, text).

    Raises:
        Stopped: budget or quota is used up, or the server is gone; what was answered is kept.
    """
    with ExitStack() as stack:
        cluster = stack.enter_context(start_cluster(recipe.run))
        work = WordWork(for_workers(recipe))
        if served(recipe):
            ledger = stack.enter_context(lease_ledger(ledger_path(recipe), recipe.budget.usd))
            teacher = own_share(recipe.teacher, cluster.workers)
            work = WordWork(recipe.model_copy(update={"teacher": teacher}), ledger)
        yield from map(records_of, cluster.map(work, map(requests_table, parts), shards))

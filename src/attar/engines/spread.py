"""A chat engine in each worker of a Ray cluster, as one engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice

from attar.cluster.crew import Crew, hire
from attar.cluster.machines import start_cluster
from attar.engines.api import ledger_path
from attar.engines.base import Answer, Capability, ChatRequest, Failure, all_known
from attar.engines.leases import LeasedLedger, lease_ledger, own_share
from attar.engines.load import for_workers, load_chat_teacher, served
from attar.recipe import Recipe

__all__ = ["ChatWork", "SpreadChat", "spread_chat"]

# Requests that are sent to a worker together, unless run.shard_rows says another number. Of a server several times as
# many as it has in flight: the last of a block are waited for, and a ledger keeps the others.
BLOCK = 16
_ROUNDS = 4

Block = tuple[ChatRequest, ...]


@dataclass(frozen=True)
class ChatWork:
    """The recipe's teacher in a worker. Called with its CPU threads, it gives what answers a block of requests."""

    recipe: Recipe
    ledger: LeasedLedger | None = None
    """of a teacher that keeps one"""

    def __call__(self, threads: int) -> Callable[[Block | None], list[Answer | Failure] | frozenset[Capability]]:
        """Load the teacher; returns requests -> outcomes in their order, and None -> what it can give."""
        if self.recipe.teacher.model.startswith("hf:"):
            import torch

            torch.set_num_threads(threads)
        run = self.recipe.run.model_copy(update={"threads": threads})
        engine = load_chat_teacher(self.recipe.model_copy(update={"run": run}), ledger=self.ledger)

        def answer(block: Block | None) -> list[Answer | Failure] | frozenset[Capability]:
            if block is None:
                return engine.capabilities
            outcomes = dict(engine.chat(block))
            return [outcomes[number] for number in range(len(block))]

        return answer


class SpreadChat:
    """Sends requests to the workers in blocks; see :class:`attar.engines.base.ChatEngine`.

    Args:
        crew: whose work is a :class:`ChatWork`.
        rows: requests of a block: what a worker that dies has to ask again at most, but for what a ledger holds.
    """

    def __init__(self, crew: Crew, rows: int = BLOCK) -> None:
        self._crew, self._rows = crew, rows
        self._capabilities: frozenset[Capability] | None = None

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What the engine in a worker can give."""
        if self._capabilities is None:
            [(_, self._capabilities)] = self._crew.run([None])
        return self._capabilities

    def chat(self, requests: Iterable[ChatRequest | None]) -> Iterator[tuple[int, Answer | Failure]]:
        """Answer requests, many at a time, in their order; those of a block are handed on together."""
        source = all_known(requests, "a cluster (run.on: ray)")
        blocks = iter(lambda: tuple(islice(source, self._rows)), ())
        for number, outcomes in self._crew.ordered(blocks):
            yield from enumerate(outcomes, start=number * self._rows)


@contextmanager
def spread_chat(recipe: Recipe) -> Iterator[SpreadChat]:
    """The recipe's teacher in each worker of its cluster, for as long as the block lasts.

    What a teacher behind an API or in a GGUF file answers is kept in the run's ledger, which a process beside this one
    owns; all workers together have ``teacher.concurrency`` requests in flight at a server.

    Raises:
        MissingExtra: Ray is not installed.
        RecipeError: batch mode is asked for.
        ModelError: there is no model at the teacher's place.
        RunError: there is no cluster, or it has too little for the workers.
    """
    recipe = for_workers(recipe)
    with ExitStack() as stack:
        cluster = stack.enter_context(start_cluster(recipe.run))
        rows, ledger = BLOCK, None
        if served(recipe):
            teacher = own_share(recipe.teacher, cluster.workers)
            rows = _ROUNDS * teacher.concurrency
            recipe = recipe.model_copy(update={"teacher": teacher})
        if served(recipe) or recipe.teacher.model.startswith("gguf:"):
            ledger = stack.enter_context(lease_ledger(ledger_path(recipe), recipe.budget.usd))
        yield SpreadChat(stack.enter_context(hire(cluster, ChatWork(recipe, ledger))), recipe.run.shard_rows or rows)

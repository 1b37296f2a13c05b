"""One ledger for workers on many machines: a process beside the file owns it, the others lease budget from that one.

A worker's engine asks as it would ask the file (see :mod:`attar.engines.ledger`): before a request is sent, its cost is
reserved by the owner, and its answer is stored there before it is handed on. A worker says from time to time that it
lives. When it has not for as long as a lease lasts, the requests that it had in flight are lost: what they can have
cost at most stays charged, and another worker may ask them.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from attar.engines.ledger import Claim, Ending, Ledger, Over, Spend, Stored, Taken
from attar.errors import RecipeError, RunError, require
from attar.recipe.base import TeacherModel

__all__ = ["LeasedLedger", "Owner", "lease_ledger", "own_share"]

AnyTeacher = TypeVar("AnyTeacher", bound=TeacherModel)

LEASE_S = 30.0
"""How long a worker may be silent."""


class Owner:
    """The one that has the ledger's file open for workers elsewhere.

    Args:
        path: of the ledger.
        budget_usd: as of the ledger.
        lease_s: how long a holder may be silent before what it has in flight is lost.
    """

    def __init__(self, path: Path, budget_usd: float | None, lease_s: float = LEASE_S) -> None:
        self._ledger = Ledger(path, budget_usd=budget_usd)
        self._lease_s = lease_s
        self._heard: dict[str, float] = {}
        self._held: dict[str, dict[int, Claim]] = {}

    def get(self, key: str) -> Stored | None:
        """What was answered to a request before, if anything."""
        return self._ledger.get(key)

    def spend(self) -> Spend:
        """What was spent and is reserved."""
        return self._ledger.spend()

    def renew(self, holder: str) -> None:
        """Hear that a holder lives."""
        self._heard[holder] = time.monotonic()

    def commit(
        self, holder: str, endings: Sequence[Ending], wanted: Sequence[tuple[str, float]], batch: str | None = None
    ) -> list[Stored | Claim | Taken | Over]:
        """End a holder's claims and ask for new ones; see :meth:`attar.engines.ledger.Ledger.commit`."""
        self.renew(holder)
        held = self._held.setdefault(holder, {})
        ours = [ending for ending in endings if ending.claim.id in held]
        late = [ending for ending in endings if ending.claim.id not in held]
        outcomes = self._ledger.commit([*self._lapsed(), *ours], wanted, batch=batch)
        for ending in ours:
            del held[ending.claim.id]
        held |= {outcome.id: outcome for outcome in outcomes if isinstance(outcome, Claim)}
        for ending in late:
            self._keep_late(ending)
        return outcomes

    def _lapsed(self) -> list[Ending]:
        """Ends of the claims of holders that were silent for too long."""
        limit = time.monotonic() - self._lease_s
        endings = []
        for holder in [name for name, heard in self._heard.items() if heard < limit]:
            endings += [Ending(claim, lost=True) for claim in self._held.pop(holder, {}).values()]
            del self._heard[holder]
        return endings

    def _keep_late(self, ending: Ending) -> None:
        """An answer of a holder that was given up is kept all the same, unless its request is asked anew."""
        if ending.outcome is None:
            return
        [claim] = self._ledger.commit([], [(ending.claim.key, ending.usd or 0.0)])
        if isinstance(claim, Claim):
            # What was charged for it as lost stays charged: rather too much than too little.
            self._ledger.commit(
                [
                    Ending(
                        claim,
                        ending.outcome,
                        ending.usd,
                        prompt_tokens=ending.prompt_tokens,
                        completion_tokens=ending.completion_tokens,
                    )
                ],
                [],
            )


class LeasedLedger:
    """A ledger that another process owns, for an engine in a worker. It may be pickled, before it is used.

    Args:
        owner: Ray's handle of the actor that runs an :class:`Owner`.
        path: of the file, where the owner is; to be named, not opened.
        budget_usd: of the owner.
        lease_s: of the owner.
    """

    def __init__(self, owner: Any, path: Path, budget_usd: float | None, lease_s: float = LEASE_S) -> None:
        self.path, self.budget_usd = path, budget_usd
        self._owner, self._lease_s = owner, lease_s
        self._holder: str | None = None
        self._closed = threading.Event()

    def __getstate__(self) -> dict[str, Any]:
        # Each process is a holder of its own.
        return {"owner": self._owner, "path": self.path, "budget_usd": self.budget_usd, "lease_s": self._lease_s}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def get(self, key: str) -> Stored | None:
        """What was answered to a request before, if anything."""
        found: Stored | None = self._ask("get", key)
        return found

    def spend(self) -> Spend:
        """What was spent and is reserved by all."""
        spend: Spend = self._ask("spend")
        return spend

    def commit(
        self, endings: Sequence[Ending], wanted: Sequence[tuple[str, float]], *, batch: str | None = None
    ) -> list[Stored | Claim | Taken | Over]:
        """End claims and ask for new ones; see :meth:`attar.engines.ledger.Ledger.commit`."""
        if self._holder is None:
            self._holder = f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            threading.Thread(target=self._live, name="attar lease", daemon=True).start()
        outcomes: list[Stored | Claim | Taken | Over] = self._ask("commit", self._holder, endings, wanted, batch)
        return outcomes

    def close(self) -> None:
        """Say no more that this worker lives."""
        self._closed.set()

    def _live(self) -> None:
        while not self._closed.wait(self._lease_s / 4):
            self._owner.renew.remote(self._holder)

    def _ask(self, method: str, *arguments: Any) -> Any:
        ray = require("ray", "ray")
        try:
            return ray.get(getattr(self._owner, method).remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            raise RunError(
                f"the owner of the ledger {self.path} is gone ({error}); run the same command again, it goes on from "
                "there"
            ) from error


def own_share(teacher: AnyTeacher, workers: int) -> AnyTeacher:
    """A teacher behind an API as one of several workers asks it: all together have ``concurrency`` requests in flight.

    Raises:
        RecipeError: batch mode is asked for, which is one process's work.
    """
    if teacher.batch:
        raise RecipeError("teacher.batch: true is one process's work, and run.on is ray; set run.on: here")
    return teacher.model_copy(update={"concurrency": max(1, teacher.concurrency // workers)})


@contextmanager
def lease_ledger(path: Path, budget_usd: float | None, lease_s: float = LEASE_S) -> Iterator[LeasedLedger]:
    """Own a ledger for as long as the block lasts; yields what workers of the connected Ray cluster take of it.

    Raises:
        WorkspaceError: the file cannot be opened.
    """
    ray = require("ray", "ray")
    # SQLite's file stands on this machine's disk.
    here = require("ray.util.scheduling_strategies", "ray").NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    # Opened here first, as an error in an actor's constructor is told as a death.
    Ledger(path, budget_usd=budget_usd).close()
    owner = ray.remote(num_cpus=0, scheduling_strategy=here)(Owner).remote(path, budget_usd, lease_s)
    try:
        yield LeasedLedger(owner, path, budget_usd, lease_s)
    finally:
        ray.kill(owner)

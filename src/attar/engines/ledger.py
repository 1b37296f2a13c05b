"""What was answered and what it cost, in one SQLite file: no answer is paid for twice, and no budget is exceeded.

A request is claimed before it is sent: the most that it can cost is reserved, against what is spent and reserved
already, in one transaction, by however many processes on one machine share the file. Its answer is stored before it is
handed on. A claim ends in one of three ways: it is *settled* at what the server billed, *released* where nothing was
billed, or *lost* where that is not known (a timeout, a killed process); what is lost stays charged at its most.

Amounts are kept as whole nano-dollars, so that sums are exact.
"""

from __future__ import annotations

import math
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from attar.errors import BudgetExceeded, NoSpaceError, RunError, WorkspaceError

__all__ = ["Accounts", "Claim", "Ending", "Ledger", "Over", "Spend", "Stored", "Taken"]

_SCHEMA = 1
_NANO = 10**9
_BUSY_S = 60.0
_TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, outcome TEXT NOT NULL, nano_usd INTEGER, at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS claims (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, nano_usd INTEGER NOT NULL,
    pid INTEGER NOT NULL, started REAL NOT NULL, batch TEXT
);
CREATE INDEX IF NOT EXISTS claims_by_key ON claims (key);
CREATE INDEX IF NOT EXISTS claims_by_batch ON claims (batch) WHERE batch IS NOT NULL;
CREATE TABLE IF NOT EXISTS totals (
    one INTEGER PRIMARY KEY CHECK (one = 1), spent INTEGER NOT NULL, reserved INTEGER NOT NULL, lost INTEGER NOT NULL,
    calls INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL
);
INSERT OR IGNORE INTO totals VALUES (1, 0, 0, 0, 0, 0, 0);
"""
_SELECT_TOTALS = "SELECT spent, reserved, lost, calls, prompt_tokens, completion_tokens FROM totals"


@dataclass(frozen=True)
class Stored:
    """The request was answered before."""

    outcome: str


@dataclass(frozen=True)
class Claim:
    """The request may be sent; its cost is reserved."""

    id: int
    key: str


@dataclass(frozen=True)
class Taken:
    """The request is in flight already, in this process or another one, or in a batch; ask again later."""

    batch: str | None


@dataclass(frozen=True)
class Over:
    """The request could cost more than is left of the budget; nothing was reserved."""

    message: str


@dataclass(frozen=True)
class Ending:
    """How a claim ends: settled where there is an outcome, else lost or released."""

    claim: Claim
    outcome: str | None = None
    """to be kept; what :meth:`Ledger.commit` gives back from now on"""
    usd: float | None = None
    """what the server billed; None where no price is known"""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    lost: bool = False
    """what was reserved stays charged, since what was billed is not known; else, without an outcome, nothing was"""


@dataclass
class _Totals:
    spent: int
    reserved: int
    lost: int
    calls: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Spend:
    """What a ledger holds."""

    usd: float
    """billed by the servers, by their own counts of tokens"""
    reserved_usd: float
    """the most that requests in flight can cost"""
    lost_usd: float
    """the most that requests of unknown outcome can have cost"""
    calls: int
    """answers and failures that were billed"""
    prompt_tokens: int
    completion_tokens: int


class Accounts(Protocol):
    """What an engine needs of a ledger: this one, or one that another process owns."""

    @property
    def budget_usd(self) -> float | None:
        """What may be spent by all that use it, ever; None for no limit."""

    def get(self, key: str) -> Stored | None:
        """What was answered to a request before, if anything."""

    def commit(
        self, endings: Sequence[Ending], wanted: Sequence[tuple[str, float]], *, batch: str | None = None
    ) -> list[Stored | Claim | Taken | Over]:
        """End claims and ask for new ones; see :meth:`Ledger.commit`."""


class Ledger:
    """One ledger file, opened.

    Args:
        path: the file, made where it does not exist. It must stand on a disk of this machine.
        budget_usd: what may be spent by all that use the file, ever; None for no limit.

    Raises:
        WorkspaceError: the folder cannot be written, or the file is no ledger.
    """

    def __init__(self, path: Path, *, budget_usd: float | None = None) -> None:
        self.path = path
        self.budget_usd = budget_usd
        self._budget = None if budget_usd is None else int(budget_usd * _NANO)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._started = psutil.Process().create_time()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _SCHEMA):
                raise WorkspaceError(
                    f"{path} is a ledger of schema {version}, this attar reads {_SCHEMA}; name another"
                )
            # A commit is safe from a killed process at once, and from a power cut after a moment.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(f"{_TABLES} PRAGMA user_version = {_SCHEMA};")
        except (OSError, sqlite3.Error) as error:
            raise WorkspaceError(
                f"the ledger {path} cannot be opened ({error}); it needs a folder that can be written, and a file that "
                "is a ledger or absent"
            ) from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def get(self, key: str) -> Stored | None:
        """What was answered to a request before, if anything."""
        with self._lock:
            row = self._db.execute("SELECT outcome FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else Stored(row[0])

    def commit(
        self, endings: Sequence[Ending], wanted: Sequence[tuple[str, float]], *, batch: str | None = None
    ) -> list[Stored | Claim | Taken | Over]:
        """End claims and ask for new ones, in one transaction: many cost little more than one.

        Args:
            endings: claims that are over.
            wanted: (hash of all that changes a request's answer, the most that it can cost; 0 where no price is known).
            batch: the batch that the wanted are to be sent in.

        Returns:
            For each that is wanted: it was answered before, it may be sent, it is in flight, or it does not fit the
            budget.
        """
        outcomes: list[Stored | Claim | Taken | Over] = []
        with self._transaction() as db:
            now = _Totals(*db.execute(_SELECT_TOTALS).fetchone())
            for ending in endings:
                self._end(db, ending, now)
            for key, most_usd in wanted:
                row = db.execute("SELECT outcome FROM answers WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    outcomes.append(Stored(row[0]))
                elif (taken := self._in_flight(db, key, now)) is not None:
                    outcomes.append(taken)
                else:
                    nano = _ceil(most_usd)
                    if self._budget is not None and now.spent + now.reserved + now.lost + nano > self._budget:
                        outcomes.append(Over(self._over(nano, now)))
                        continue
                    cursor = db.execute(
                        "INSERT INTO claims (key, nano_usd, pid, started, batch) VALUES (?, ?, ?, ?, ?)",
                        (key, nano, self._pid, self._started, batch),
                    )
                    now.reserved += nano
                    outcomes.append(Claim(int(cursor.lastrowid or 0), key))
            db.execute(
                "UPDATE totals SET spent = ?, reserved = ?, lost = ?, calls = ?, prompt_tokens = ?, "
                "completion_tokens = ?",
                astuple(now),
            )
        return outcomes

    def claim(self, key: str, most_usd: float) -> Stored | Claim | Taken:
        """Ask to send one request; see :meth:`commit`.

        Raises:
            BudgetExceeded: it could cost more than is left; nothing was reserved.
        """
        [outcome] = self.commit([], [(key, most_usd)])
        if isinstance(outcome, Over):
            raise BudgetExceeded(outcome.message)
        return outcome

    def batches(self) -> list[str]:
        """Batches with requests in flight, the oldest first."""
        with self._lock:
            rows = self._db.execute("SELECT batch FROM claims WHERE batch IS NOT NULL GROUP BY batch ORDER BY MIN(id)")
            return [row[0] for row in rows]

    def in_batch(self, batch: str) -> dict[str, Claim]:
        """Key -> claim of the requests that wait in a batch."""
        with self._lock:
            rows = self._db.execute("SELECT id, key FROM claims WHERE batch = ?", (batch,))
            return {key: Claim(number, key) for number, key in rows}

    def rename_batch(self, batch: str, name: str) -> None:
        """Call a batch by another name: the server's, once it has one."""
        with self._transaction() as db:
            db.execute("UPDATE claims SET batch = ? WHERE batch = ?", (name, batch))

    def spend(self) -> Spend:
        """What was spent and is reserved by all that use the file."""
        with self._lock:
            spent, reserved, lost, *counts = self._db.execute(_SELECT_TOTALS).fetchone()
        return Spend(spent / _NANO, reserved / _NANO, lost / _NANO, *counts)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                if getattr(error, "sqlite_errorname", "") == "SQLITE_FULL":
                    raise NoSpaceError(
                        f"no space left for the ledger {self.path}; free some and run the same command again, it goes "
                        "on from there"
                    ) from error
                raise RunError(f"the ledger {self.path} cannot be written: {error}") from error

    def _in_flight(self, db: sqlite3.Connection, key: str, now: _Totals) -> Taken | None:
        """Whether a living process or a batch has the request; what a dead one had is lost."""
        for number, pid, started, batch in db.execute(
            "SELECT id, pid, started, batch FROM claims WHERE key = ?", (key,)
        ).fetchall():
            if batch is not None or self._lives(pid, started):
                return Taken(batch)
            self._end(db, Ending(Claim(number, key), lost=True), now)
        return None

    def _lives(self, pid: int, started: float) -> bool:
        if (pid, started) == (self._pid, self._started):
            return True
        try:
            return abs(psutil.Process(pid).create_time() - started) < 1
        except psutil.NoSuchProcess:
            return False

    @staticmethod
    def _end(db: sqlite3.Connection, ending: Ending, now: _Totals) -> None:
        claim = ending.claim
        row: Any = db.execute("DELETE FROM claims WHERE id = ? RETURNING nano_usd", (claim.id,)).fetchone()
        if row is None:
            raise RunError(f"claim {claim.id} of request {claim.key} is over already")
        now.reserved -= row[0]
        if ending.outcome is None:
            now.lost += row[0] if ending.lost else 0
            return
        nano = None if ending.usd is None else round(ending.usd * _NANO)
        db.execute(
            "INSERT OR REPLACE INTO answers (key, outcome, nano_usd, at) VALUES (?, ?, ?, ?)",
            (claim.key, ending.outcome, nano, time.time()),
        )
        now.spent += nano or 0
        now.calls += 1
        now.prompt_tokens += ending.prompt_tokens
        now.completion_tokens += ending.completion_tokens

    def _over(self, nano: int, now: _Totals) -> str:
        unknown = f", {now.lost / _NANO:.4f} for requests of unknown outcome" if now.lost else ""
        return (
            f"budget.usd is {self.budget_usd}: {now.spent / _NANO:.4f} USD are spent, {now.reserved / _NANO:.4f} "
            f"reserved{unknown}, and the next call could cost {nano / _NANO:.4f}; what was answered is kept: raise "
            "budget.usd or lower max_tokens, and the same command goes on from here"
        )


def _ceil(usd: float) -> int:
    return math.ceil(usd * _NANO)

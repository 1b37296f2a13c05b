"""A recorded folder: rows in segments, outcomes beside them, and deletion.

``exchanges-DAY-NNNN.jsonl`` and ``outcomes-DAY-NNNN.jsonl`` are only ever appended to; a new one is begun when a day
ends (UTC), a segment is full, or a recorder starts. ``deletions.jsonl`` holds what was asked to be deleted, as hashes:
a reader heeds it at once, and whoever holds the folder's lock (a recorder, or else the command that deletes) erases
the rows themselves.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from attar.collect.exchange import timestamp_of
from attar.collect.redact import pseudonym
from attar.errors import DataError, WorkspaceError
from attar.workspace import write_atomic

__all__ = ["Deletions", "Reading", "Segments", "delete", "encode", "erase", "lock", "read_exchanges"]

_DAY_S = 86_400
# What people said to an application is for its owner's eyes.
_MODE = 0o600


def encode(row: dict[str, Any]) -> bytes:
    """A row as a line."""
    try:
        return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    except UnicodeEncodeError:
        # Half a surrogate pair, which JSON can say and UTF-8 cannot.
        return json.dumps(row, separators=(",", ":")).encode() + b"\n"


def lock(folder: Path) -> filelock.BaseFileLock:
    """Take the folder for writing.

    Raises:
        WorkspaceError: another process has it.
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Not of one thread: it may be taken in one and let go in another.
    held = filelock.FileLock(folder / ".lock", thread_local=False)
    try:
        held.acquire(timeout=0)
    except filelock.Timeout as error:
        raise WorkspaceError(f"another recorder is at work in {folder}; stop it, or choose another --folder") from error
    return held


class Segments:
    """The end of a series of files, to append to.

    Args:
        folder: that holds them.
        series: ``exchanges`` or ``outcomes``.
        size: bytes after which the next file is begun.
    """

    def __init__(self, folder: Path, series: str, size: int) -> None:
        self._folder, self._series, self._size = folder, series, size
        self._file = -1
        self._day, self._written = "", 0
        self.path: Path | None = None
        """the open segment"""

    def append(self, lines: bytes) -> None:
        """Write whole lines, or none of them.

        Raises:
            OSError: they could not be written; what stood there before is untouched.
        """
        day = timestamp_of(time.time())[:10]
        if self._file < 0 or day != self._day or self._written >= self._size:
            self.close()
            self._open(day)
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            try:
                os.ftruncate(self._file, self._written)
            except OSError:
                # A reader passes over a line without its end, as long as it is a file's last one.
                self.close()
            raise
        self._written += len(lines)

    def _open(self, day: str) -> None:
        numbers = [int(path.stem[-4:]) for path in self._folder.glob(f"{self._series}-{day}-????.jsonl")]
        path = self._folder / f"{self._series}-{day}-{max(numbers, default=0) + 1:04d}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, _MODE)
        self.path, self._day, self._written = path, day, 0

    def sync(self) -> None:
        """Have the disk hold what was written."""
        if self._file >= 0:
            os.fsync(self._file)

    def close(self) -> None:
        """Close the open segment; the next row begins another."""
        if self._file >= 0:
            file, self._file, self.path = self._file, -1, None
            try:
                os.fsync(file)
            finally:
                os.close(file)


def _hash(kind: str, label: str) -> str:
    return hashlib.sha256(f"{kind}:{label}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass
class Deletions:
    """What was asked to be deleted: for each episode and user the moment, and everything before one moment."""

    named: dict[str, str] = field(default_factory=dict)
    """hash -> timestamp"""
    before: str = ""

    @classmethod
    def load(cls, folder: Path) -> Deletions:
        """Read the folder's ``deletions.jsonl``."""
        deletions = cls()
        path = folder / "deletions.jsonl"
        for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
            entry = _row(line)
            if entry is None:
                continue
            if "before" in entry:
                deletions.before = max(deletions.before, entry["before"])
            else:
                deletions.named[entry["hash"]] = max(deletions.named.get(entry["hash"], ""), entry["timestamp"])
        return deletions

    @classmethod
    def of(
        cls, *, episode: str | None = None, user: str | None = None, older_than_days: float | None = None
    ) -> Deletions:
        """Of an episode, of a user, and of what is older than a number of days, as of now."""
        now = time.time()
        labels = [(kind, label) for kind, label in (("episode", episode), ("user", user)) if label is not None]
        named = {_hash(kind, form): timestamp_of(now) for kind, label in labels for form in (label, pseudonym(label))}
        return cls(named, "" if older_than_days is None else timestamp_of(now - older_than_days * _DAY_S))

    def save(self, folder: Path) -> None:
        """Add them to the folder's ``deletions.jsonl``."""
        entries = [{"hash": label, "timestamp": moment} for label, moment in self.named.items()]
        entries += [{"before": self.before}] if self.before else []
        with (folder / "deletions.jsonl").open("ab") as handle:
            # The end of a line that somebody was killed in stays alone.
            handle.write(b"\n" if handle.tell() else b"")
            handle.write(b"".join(encode(entry) for entry in entries))
            handle.flush()
            os.fsync(handle.fileno())

    def hit(self, row: dict[str, Any], kinds: Iterable[str] = ("episode", "user")) -> bool:
        """Whether a row or an outcome is to go: it is from before the moment at which that was asked."""
        moment = row["timestamp"]
        if moment < self.before:
            return True
        labels = ((kind, row.get(kind)) for kind in kinds) if self.named else ()
        return any(label is not None and moment <= self.named.get(_hash(kind, label), "") for kind, label in labels)


def delete(
    folder: Path, *, episode: str | None = None, user: str | None = None, older_than_days: float | None = None
) -> int | None:
    """Delete what was recorded of an episode, of a user, or before a moment.

    What is recorded later under the same label stays.

    Returns:
        How many rows and outcomes were erased; None where a recorder has the folder: nobody reads them from now on,
        and it erases them within seconds.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; name the one that `attar record` wrote with --folder")
    Deletions.of(episode=episode, user=user, older_than_days=older_than_days).save(folder)
    try:
        held = lock(folder)
    except WorkspaceError:
        return None
    try:
        return erase(folder, Deletions.load(folder))
    finally:
        held.release()


def erase(folder: Path, deletions: Deletions, paths: Iterable[Path] | None = None) -> int:
    """Take rows and outcomes out of closed segments (all of the folder's, or ``paths``); returns how many.

    The caller holds the lock.
    """
    gone: set[str] = set()
    count = 0
    # Exchanges come first: an outcome of a call that goes, goes too.
    for path in sorted(folder.glob("*-*-????.jsonl") if paths is None else paths):
        day = path.name.split("-", 1)[1][:10]
        if deletions.named or day <= deletions.before[:10] or gone:
            count += _rewrite(path, deletions, gone)
    return count


def _rewrite(path: Path, deletions: Deletions, gone: set[str]) -> int:
    kept, count = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        row = _row(line)
        outcome = row is not None and "outcome" in row
        if row is None or not (deletions.hit(row) or (outcome and {row["exchange"], row["episode"]} & gone)):
            kept.append(line)
            continue
        count += 1
        if not outcome:
            # Outcomes do not name users: those of a user's episodes go with them.
            of_user = row["timestamp"] >= deletions.before and deletions.hit(row, ("user",))
            gone |= {row["id"]} | ({row["episode"]} if of_user and row["episode"] is not None else set())
    if count and kept:
        write_atomic(path, b"".join(kept))
        path.chmod(_MODE)
    elif count:
        path.unlink()
    return count


def _row(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return row


@dataclass
class Reading:
    """What a reader met."""

    rows: int = 0
    deleted: int = 0
    damaged: int = 0
    """lines that are no row: what a killed recorder was writing"""


def read_exchanges(folder: Path, reading: Reading | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a recorded folder, oldest segment first, deletions heeded, each with its ``outcomes``.

    An outcome belongs to one call (``exchange``), or to all calls of an ``episode`` (of one ``workload``, where it
    names that).

    Args:
        folder: that ``attar record`` wrote.
        reading: counts what is met.

    Raises:
        DataError: there is no such folder, or it holds no segment.
    """
    reading = reading or Reading()
    segments = sorted(folder.glob("exchanges-*.jsonl"))
    if not segments:
        raise DataError(f"{folder} holds no exchanges-*.jsonl; wanted a folder that `attar record` wrote")
    deletions = Deletions.load(folder)
    by_call: dict[str, list[dict[str, Any]]] = defaultdict(list)
    by_episode: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for outcome in _rows(sorted(folder.glob("outcomes-*.jsonl")), deletions, Reading()):
        if outcome.get("exchange") is not None:
            by_call[outcome["exchange"]].append(outcome)
        else:
            by_episode[outcome["episode"]].append(outcome)
    for row in _rows(segments, deletions, reading):
        reading.rows += 1
        of_episode = by_episode.get(row["episode"], []) if row["episode"] is not None else []
        matching = [o for o in of_episode if o.get("workload") in (None, row["workload"])]
        yield row | {"outcomes": by_call.get(row["id"], []) + matching}


def _rows(paths: Iterable[Path], deletions: Deletions, reading: Reading) -> Iterator[dict[str, Any]]:
    for path in paths:
        with path.open("rb") as handle:
            for line in handle:
                row = _row(line)
                if row is None:
                    reading.damaged += 1
                elif deletions.hit(row):
                    reading.deleted += 1
                else:
                    yield row

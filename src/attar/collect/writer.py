"""From a queue to the disk, in a thread: recording never makes a call wait.

What cannot be kept, because the queue is full, the disk is, or a row cannot be built, is lost, counted by reason and
said in the log; the calls themselves have passed by then.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from attar.collect.exchange import Capture, build_row, timestamp_of
from attar.collect.redact import Redactor
from attar.collect.store import Deletions, Segments, encode, erase, lock

__all__ = ["Writer"]

_log = logging.getLogger("attar.record")

_BATCH = 64
_LOOK_S = 1.0
_SAY_S = 10.0
_CLOSE_S = 60.0
_DAY_S = 86_400

_Outcome = tuple[dict[str, Any], "Future[None]"]


class Writer:
    """Writes captures and outcomes into a folder, and erases what is to be deleted.

    Args:
        folder: taken for as long as the writer lives.
        redactor: for every row.
        segment_bytes: size of a segment.
        queue_bytes: of captures that may wait; more are lost.
        keep_days: age at which rows are erased; None keeps them.

    Raises:
        WorkspaceError: another recorder has the folder.
        OSError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path, redactor: Redactor, *, segment_bytes: int, queue_bytes: int, keep_days: int | None
    ) -> None:
        self._lock = lock(folder)
        self.folder = folder
        self.queue_bytes = queue_bytes
        self.recorded = self.outcomes = self.erased = 0
        self.lost: Counter[str] = Counter()
        """rows and outcomes that were not kept, by reason"""
        self.last_error: str | None = None
        self._redactor, self._keep_days = redactor, keep_days
        self._exchanges = Segments(folder, "exchanges", segment_bytes)
        self._outcomes = Segments(folder, "outcomes", segment_bytes)
        self._queue: queue.SimpleQueue[Capture | _Outcome | None] = queue.SimpleQueue()
        # Each is written by one thread only; their difference is what waits.
        self._put = self._taken = 0
        self._said: dict[str, float] = {}
        self._deletions, self._seen, self._day = Deletions(), -1, ""
        self._erasures: queue.SimpleQueue[tuple[Deletions, list[Path]] | None] = queue.SimpleQueue()
        self._look()
        self._threads = [
            threading.Thread(target=self._write, name="attar-record", daemon=True),
            threading.Thread(target=self._erase, name="attar-erase", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting_bytes(self) -> int:
        """Of captures that are not written yet."""
        return self._put - self._taken

    def submit(self, capture: Capture) -> None:
        """Hand over a call that is over; never waits."""
        if capture.size > self.queue_bytes:
            self.lose("too large", f"a call of over {self.queue_bytes} bytes; raise queue_mb")
        elif self.waiting_bytes + capture.size > self.queue_bytes:
            self.lose("queue full", f"{self.waiting_bytes} bytes wait already; the disk is slow, or queue_mb small")
        elif not self._threads[0].is_alive():
            self.lose("recorder stopped", "the writing thread has ended")
        else:
            self._put += capture.size
            self._queue.put(capture)

    def outcome(self, outcome: dict[str, Any]) -> Future[None]:
        """Hand over an outcome; the future ends when it is written, or with the reason why not."""
        future: Future[None] = Future()
        self._queue.put((outcome, future))
        return future

    def lose(self, reason: str, detail: str, n: int = 1) -> None:
        """Count a loss; the log says each reason at most every ten seconds."""
        self.lost[reason] += n
        self.last_error = f"{reason}: {detail}"
        now = time.monotonic()
        if now - self._said.get(reason, -_SAY_S) >= _SAY_S:
            self._said[reason] = now
            _log.warning("not recorded (%s), %d so far: %s", reason, self.lost[reason], detail)

    def close(self) -> None:
        """Write what waits, and let go of the folder; a second time does nothing."""
        if not self._lock.is_locked:
            return
        self._queue.put(None)
        self._threads[0].join(_CLOSE_S)
        self._erasures.put(None)
        self._threads[1].join(_CLOSE_S)
        left = self._queue.qsize()
        if self._threads[0].is_alive() and left:
            self.lose("not written in time", f"the disk took more than {_CLOSE_S:g} s at the end", left)
        self._lock.release()

    def _next(self) -> tuple[list[Capture | _Outcome], bool]:
        """What waits, at most a batch of it, and whether there may come more."""
        items: list[Capture | _Outcome] = []
        try:
            item = self._queue.get(timeout=_LOOK_S)
            while item is not None:
                items.append(item)
                if len(items) == _BATCH:
                    return items, True
                item = self._queue.get_nowait()
        except queue.Empty:
            return items, True
        return items, False

    def _write(self) -> None:
        looked, going = time.monotonic(), True
        while going:
            items, going = self._next()
            self._keep(items)
            if time.monotonic() - looked >= _LOOK_S:
                looked = time.monotonic()
                self._maintain()
        for segments in (self._exchanges, self._outcomes):
            try:
                segments.close()
            except OSError as error:
                self.lose("not synced", f"{self.folder}: {error.strerror}", 0)

    def _keep(self, items: list[Capture | _Outcome]) -> None:
        lines = []
        for item in items:
            if isinstance(item, Capture):
                try:
                    row = build_row(item, self._redactor)
                    if not self._deletions.hit(row):
                        lines.append(encode(row))
                except Exception as error:
                    self.lose("row not built", f"{item.call.method} {item.call.path!r}: {error!r}")
                self._taken += item.size
            else:
                self._keep_outcome(*item)
        if lines:
            try:
                self._exchanges.append(b"".join(lines))
            except OSError as error:
                self.lose("write failed", f"{self.folder}: {error.strerror or error}", len(lines))
            else:
                self.recorded += len(lines)

    def _keep_outcome(self, outcome: dict[str, Any], future: Future[None]) -> None:
        try:
            self._outcomes.append(encode(self._redacted(outcome)))
        except Exception as error:
            self.lose("outcome not written", f"{self.folder}: {getattr(error, 'strerror', None) or error}")
            future.set_exception(error)
        else:
            self.outcomes += 1
            future.set_result(None)

    def _redacted(self, outcome: dict[str, Any]) -> dict[str, Any]:
        labels = {name: self._redactor.label(outcome.get(name)) for name in ("workload", "episode", "exchange")}
        counts: Counter[str] = Counter()
        value = self._redactor.value(outcome["outcome"], counts)
        return {"timestamp": outcome["timestamp"], **labels, "outcome": value, "redacted": dict(counts)}

    def _maintain(self) -> None:
        try:
            self._exchanges.sync()
            self._outcomes.sync()
            self._look()
        except (OSError, ValueError) as error:
            self.lose("not maintained", f"{self.folder}: {error}", 0)

    def _look(self) -> None:
        """Heed new deletions, and once a day the age of rows."""
        path = self.folder / "deletions.jsonl"
        size, day = path.stat().st_size if path.is_file() else 0, timestamp_of(time.time())[:10]
        due = Deletions()
        if size != self._seen:
            self._deletions, self._seen = Deletions.load(self.folder), size
            due = Deletions(dict(self._deletions.named), self._deletions.before)
        if day != self._day and self._keep_days is not None:
            due.before = max(due.before, timestamp_of(time.time() - self._keep_days * _DAY_S))
        self._day = day
        if due.named or due.before:
            # From here on rows go into new segments, so that the old ones can be rewritten beside the traffic.
            self._exchanges.close()
            self._outcomes.close()
            self._erasures.put((due, sorted(self.folder.glob("*-*-????.jsonl"))))

    def _erase(self) -> None:
        while (task := self._erasures.get()) is not None:
            try:
                self.erased += erase(self.folder, *task)
            except Exception as error:
                self.lose("not erased", f"{self.folder}: {error!r}", 0)

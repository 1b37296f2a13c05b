"""Many requests at once, in a thread with an event loop of its own.

How many are in flight follows from what the server bears, as in TCP: one more with every answer until the server first
complains, then one more with every round of answers, and half as many whenever it complains (429, 5xx, a timeout). It
is told apart from what a request does: that one waits, a random while that grows with its attempts, and is sent again.
Between the two threads stand a queue of requests and one of results, both bounded by how many the caller lets in.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from attar.data.wire import Reply, Usage
from attar.engines.base import Answer, ChatRequest, Failure
from attar.engines.ledger import Accounts, Claim, Ending, Over, Stored, Taken
from attar.engines.outcomes import from_json, to_json
from attar.engines.servers import Trouble
from attar.errors import BudgetExceeded, ModelError, RunError, Stopped

__all__ = ["Flow", "Job", "Limits"]

_FIRST_IN_FLIGHT = 8
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 60.0
# A request that another one with the same key, or another process, has in flight is looked for again after this.
_TAKEN_WAIT_S = 0.2
# Replies that cannot be read, one after another, before the request is given up.
_UNREADABLE = 3
# Requests refused before any was answered, before all are held to be wrong in the same way.
_HOPELESS = 16


@dataclass(frozen=True)
class Limits:
    """How a server is asked."""

    concurrency: int
    """requests in flight, at most"""
    timeout_s: float
    """of an attempt"""
    total_timeout_s: float
    """of a request with all attempts and waits"""


@dataclass
class Job:
    """A request on its way."""

    index: int
    request: ChatRequest
    body: dict[str, Any]
    key: str
    prompt_tokens: int
    """at most"""
    most_usd: float
    claim: Claim | None = None
    attempts: int = 0
    first_sent: float | None = None
    lost_usd: float = 0.0


class _Connection(Protocol):
    async def send(self, body: dict[str, Any]) -> Reply: ...

    async def close(self) -> None: ...


class Flow:
    """Sends jobs and hands on what becomes of them.

    Args:
        connect: opens a connection; called in the flow's own thread.
        read: makes an answer, or a failure of its own, of a job and its reply; may raise an ``AttarError``, which ends
            the flow.
        cost: what such a usage cost, in USD; None where no price is known.
        limits: how the server is asked.
        ledger: where answers are kept; None to keep none.
    """

    def __init__(
        self,
        connect: Callable[[], _Connection],
        read: Callable[[Job, Reply], Answer | Failure],
        cost: Callable[[Usage], float | None],
        limits: Limits,
        ledger: Accounts | None,
    ) -> None:
        self._connect, self._read, self._cost = connect, read, cost
        self._limits, self._ledger = limits, ledger
        self.results: queue.SimpleQueue[list[tuple[int, Answer | Failure]] | BaseException] = queue.SimpleQueue()
        """what became of jobs, by number, or what ended the flow"""
        self._handed: list[tuple[int, Answer | Failure]] = []
        self._waiting: deque[Job] = deque()
        self._idle = True
        self._endings: list[tuple[Ending | None, Job, Answer | Failure | None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._allowed = float(min(_FIRST_IN_FLIGHT, limits.concurrency))
        self._complained = False
        self._cut_at = self._not_before = self._last_answer = 0.0
        self._answered = self._refused = 0
        self._over: str | None = None
        self._error: BaseException | None = None
        self._gated = self._ticking = self._stopping = False
        self._loop = asyncio.new_event_loop()
        self._done = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="attar requests", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let a job in; from the caller's thread."""
        self._waiting.append(job)
        # Waking a busy loop costs a system call and the interpreter's lock for nothing: it looks by itself.
        if self._idle:
            self._idle = False
            self._call(self._tick_soon)

    def stop(self) -> None:
        """Cancel what is in flight, keep what was answered, and end the thread."""
        self._call(self._cancel)
        self._thread.join()

    def _call(self, function: Callable[[], None]) -> None:
        # A loop that has ended by itself is closed, and its error is in the results.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        except BaseException as error:
            self.results.put(error)
        finally:
            self._loop.close()

    async def _main(self) -> None:
        self._connection = self._connect()
        try:
            await self._done.wait()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._commit([])
            self._hand_on()
        finally:
            await self._connection.close()

    def _cancel(self) -> None:
        self._stopping = True
        self._done.set()

    def _tick_soon(self) -> None:
        """Work at the end of this round of the loop, once for all that happens in it."""
        if not self._ticking and not self._stopping:
            self._ticking = True
            self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        self._ticking = False
        if self._stopping:
            return
        try:
            self._work()
        except BaseException as error:
            self._end(error)

    def _hand_on(self) -> None:
        """Give the caller what has ended, in one piece: each waking of its thread takes time from this one."""
        if self._handed:
            self.results.put(self._handed)
            self._handed = []

    def _end(self, error: BaseException) -> None:
        self._hand_on()
        self.results.put(error)
        self._cancel()

    def _work(self) -> None:
        wanted = [self._waiting.popleft() for _ in range(min(self._room(), len(self._waiting)))]
        refused: list[Job] = []
        for job, outcome in zip(wanted, self._commit(wanted), strict=True):
            if isinstance(outcome, Stored):
                self._handed.append((job.index, from_json(outcome.outcome)))
            elif isinstance(outcome, Claim):
                job.claim = outcome
                self._start(job)
            elif isinstance(outcome, Taken):
                self._check_taken(outcome)
                self._later(_TAKEN_WAIT_S, job)
            else:
                self._over = outcome.message
                refused.append(job)
        self._waiting.extendleft(reversed(refused))
        self._hand_on()
        if not self._tasks and self._error is not None:
            self._end(self._error)
        elif not self._tasks and self._over is not None:
            self._end(BudgetExceeded(self._over))
        # With room left, the next job has to wake this loop; without, the end of a task does.
        self._idle = self._room() > 0
        if self._idle and self._waiting:
            self._idle = False
            self._tick_soon()

    def _room(self) -> int:
        """How many more requests may be in flight now."""
        if self._error is not None or self._over is not None:
            return 0
        wait = self._not_before - time.monotonic()
        if wait > 0:
            if not self._gated:
                self._gated = True
                self._loop.call_later(wait, self._open_gate)
            return 0
        return max(int(self._allowed) - len(self._tasks), 0)

    def _open_gate(self) -> None:
        self._gated = False
        self._tick_soon()

    def _check_taken(self, taken: Taken) -> None:
        if taken.batch is not None:
            raise RunError(
                f"requests of this run wait in batch {taken.batch}, and would be paid for twice; collect it with "
                "teacher.batch: true, or cancel it at the provider first"
            )

    def _commit(self, wanted: list[Job]) -> list[Stored | Claim | Taken | Over]:
        """Keep what has ended, then hand it on; ask for what is wanted."""
        endings, self._endings = self._endings, []
        claims: list[Stored | Claim | Taken | Over] = []
        if self._ledger is None:
            claims = [Claim(0, job.key) for job in wanted]
        elif endings or wanted:
            claims = self._ledger.commit(
                [ending for ending, _, _ in endings if ending is not None],
                [(job.key, job.most_usd) for job in wanted],
            )
        for _, job, outcome in endings:
            self._over = None
            if outcome is not None:
                self._handed.append((job.index, outcome))
        return claims

    def _start(self, job: Job) -> None:
        job.attempts += 1
        task = self._loop.create_task(self._attempt(job))
        self._tasks.add(task)

    def _later(self, seconds: float, job: Job) -> None:
        def again() -> None:
            self._waiting.appendleft(job)
            self._tick_soon()

        self._loop.call_later(seconds, again)

    async def _attempt(self, job: Job) -> None:
        sent = time.monotonic()
        job.first_sent = job.first_sent or sent
        try:
            try:
                async with asyncio.timeout(self._limits.timeout_s):
                    reply = await self._connection.send(job.body)
            except TimeoutError as error:
                detail = f"no answer within {self._limits.timeout_s:g} s"
                raise Trouble("timeout", detail, "retry", billed="unknown", slow_down=True) from error
            self._succeed(job, reply)
        except Trouble as trouble:
            self._fail(job, trouble, sent)
        except asyncio.CancelledError:
            self._finish(job, None, lost=True)
            raise
        except BaseException as error:
            self._finish(job, None, lost=True)
            self._error = self._error or error
        finally:
            current = asyncio.current_task()
            if current is not None:
                self._tasks.discard(current)
            self._tick_soon()

    def _succeed(self, job: Job, reply: Reply) -> None:
        outcome = self._read(job, reply)
        self._answered += 1
        self._last_answer = time.monotonic()
        if len(self._tasks) >= int(self._allowed):
            step = 1 / self._allowed if self._complained else 1.0
            self._allowed = min(self._allowed + step, float(self._limits.concurrency))
        self._finish(job, outcome, usage=reply.usage)

    def _finish(
        self, job: Job, outcome: Answer | Failure | None, *, usage: Usage | None = None, lost: bool = False
    ) -> None:
        """End a job's claim; a kept outcome is handed on once it is stored."""
        kept = isinstance(outcome, Answer) or (outcome is not None and outcome.final)
        ending = None
        if self._ledger is not None and job.claim is not None:
            ending = Ending(
                job.claim,
                to_json(outcome) if outcome is not None and kept else None,
                None if outcome is None else outcome.usd,
                prompt_tokens=0 if usage is None else usage.prompt_tokens,
                completion_tokens=0 if usage is None else usage.completion_tokens,
                lost=lost,
            )
        job.lost_usd += job.most_usd if lost else 0.0
        job.claim = None
        self._endings.append((ending, job, outcome))

    def _fail(self, job: Job, trouble: Trouble, sent: float) -> None:
        now = time.monotonic()
        if trouble.slow_down and sent > self._cut_at:
            self._allowed = max(self._allowed / 2, 1.0)
            self._complained, self._cut_at = True, now
        if trouble.retry_after_s is not None:
            self._not_before = max(self._not_before, now + trouble.retry_after_s)
        lost = trouble.billed == "unknown"
        if trouble.next == "stop":
            self._error = self._error or trouble.error
            self._finish(job, None, lost=lost)
        elif trouble.next == "final":
            usage = None if isinstance(trouble.billed, str) else trouble.billed
            usd = (job.most_usd if lost else 0.0) if usage is None else self._cost(usage)
            self._finish(job, Failure(trouble.reason, trouble.detail, True, usd), usage=usage)
        elif trouble.next == "give up":
            self._refused += 1
            if self._refused == _HOPELESS and not self._answered:
                self._error = self._error or ModelError(
                    f"the first {_HOPELESS} requests were all refused, the last with {trouble.detail}"
                )
            self._finish(job, Failure(trouble.reason, trouble.detail, False, job.lost_usd))
        else:
            self._try_again(job, trouble, now, lost)

    def _try_again(self, job: Job, trouble: Trouble, now: float, lost: bool) -> None:
        wait = random.uniform(0, min(_FIRST_WAIT_S * 2**job.attempts, _LONGEST_WAIT_S))
        wait = max(wait, self._not_before - now)
        first = job.first_sent if job.first_sent is not None else now
        exhausted = now + wait - first > self._limits.total_timeout_s
        if exhausted and self._last_answer < first:
            self._error = self._error or Stopped(
                f"no request was answered for {now - first:.0f} s, the last ended with {trouble}; what was answered is "
                "kept: once the server is back, the same command goes on from here"
            )
            self._finish(job, None, lost=lost)
        elif exhausted or (trouble.reason == "not json" and job.attempts >= _UNREADABLE):
            usd = job.lost_usd + (job.most_usd if lost else 0.0)
            self._finish(job, Failure(trouble.reason, trouble.detail, False, usd), lost=lost)
        else:
            self._finish(job, None, lost=lost)
            self._later(wait, job)

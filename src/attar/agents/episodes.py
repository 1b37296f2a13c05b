"""Engine x environment -> episodes, many at a time.

The driver keeps many plans (:mod:`attar.agents.plan`) going between one engine and their environments. With an engine
whose answers follow from request and seed, an episode follows from its task, trial and seed alone.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from attar.agents.environments import Environment
from attar.agents.plan import Answered, Ask, Asking, Limits, Plan, Rules, Try, plan_episode, seed_of
from attar.agents.seats import Hung, Seat
from attar.data.episodes import Episode
from attar.engines.base import ChatEngine, ChatRequest

__all__ = ["Asking", "Limits", "Try", "play", "seed_of"]

# How long an engine waits for environments that are still at work before it goes on with the requests that it has.
_GATHER_S = 0.05


@dataclass(eq=False)
class _Playing:
    """An episode that goes on."""

    plan: Plan
    seat: Seat | None
    asked_at: float = 0.0
    deadline: float = 0.0
    """of the operation that its environment is at; 0 where it is at none"""


class _Done(NamedTuple):
    playing: _Playing
    result: Any
    error: Exception | None


def play(
    engine: ChatEngine,
    make: Callable[[], Environment],
    tries: Iterable[Try],
    *,
    policy: str,
    seed: int,
    limits: Limits | None = None,
    asking: Asking | None = None,
    at_once: int = 16,
) -> Generator[Episode, None, None]:
    """Play episodes, each in an environment of its own, and hand them on as they end.

    What goes wrong in an environment or a tool is part of the episode: an exception of a call is its result. An engine
    that fails at a request ends the episode, ``stopped: engine``.

    Args:
        engine: who acts.
        make: makes an environment; called at most ``at_once`` times, and once more for each that hangs.
        tries: tasks and trials, drawn as there is room for them.
        policy: how who acts is called in the episodes.
        seed: of all of them together.
        limits: what an episode may take.
        asking: how the engine is asked.
        at_once: episodes that are played at the same time.

    Raises:
        ModelError: as the engine's ``chat`` does; likewise CapabilityError and Stopped.
    """
    driver = _Driver(make, iter(tries), Rules(policy, seed, limits or Limits(), asking or Asking()), at_once)
    try:
        yield from driver.run(engine)
    finally:
        driver.close()


class _Driver:
    """Keeps episodes going between an engine and their environments."""

    def __init__(self, make: Callable[[], Environment], tries: Iterator[Try], rules: Rules, at_once: int) -> None:
        self._make, self._tries, self._rules, self._at_once = make, tries, rules, at_once
        self._more = True
        self._free: list[Seat] = []
        self._playing: set[_Playing] = set()
        self._ready: deque[tuple[_Playing, ChatRequest]] = deque()
        self._asked: dict[int, _Playing] = {}
        self._drawn = 0
        self._done: queue.SimpleQueue[_Done] = queue.SimpleQueue()
        self._ended: list[Episode] = []

    def run(self, engine: ChatEngine) -> Iterator[Episode]:
        for number, outcome in engine.chat(self._requests()):
            playing = self._asked.pop(number)
            latency_ms = (time.monotonic() - playing.asked_at) * 1000
            self._resume(playing, Answered(outcome, latency_ms), None)
            yield from self._hand_on()
        yield from self._hand_on()

    def close(self) -> None:
        for playing in self._playing:
            playing.plan.close()
            if playing.seat is not None:
                playing.seat.close()
        for seat in self._free:
            seat.close()

    def _hand_on(self) -> list[Episode]:
        ended, self._ended = self._ended, []
        return ended

    def _requests(self) -> Iterator[ChatRequest | None]:
        """What to ask next; None while that depends on answers that are out."""
        while True:
            self._admit()
            self._collect(0.0)
            if not self._ready and self._working:
                self._collect(_GATHER_S if self._asked else None)
            if self._ready:
                playing, request = self._ready.popleft()
                self._asked[self._drawn] = playing
                self._drawn += 1
                playing.asked_at = time.monotonic()
                yield request
            elif self._asked:
                yield None
            elif not self._working and not self._more:
                return

    @property
    def _working(self) -> bool:
        return any(playing.deadline for playing in self._playing)

    def _admit(self) -> None:
        while self._more and len(self._playing) < self._at_once:
            drawn = next(self._tries, None)
            if drawn is None:
                self._more = False
                return
            seat = self._free.pop() if self._free else Seat(self._make, self._on_done)
            playing = _Playing(plan_episode(drawn, self._rules), seat)
            self._playing.add(playing)
            self._resume(playing, None, None)

    def _on_done(self, token: Any, result: Any, error: Exception | None) -> None:
        self._done.put(_Done(token, result, error))

    def _collect(self, patience_s: float | None) -> None:
        """Take in what environments have done; wait so long for one of them, None for as long as one may take."""
        now = time.monotonic()
        if patience_s is None:
            patience_s = max(min(p.deadline for p in self._playing if p.deadline) - now, 0.0)
        try:
            done = self._done.get(timeout=patience_s) if patience_s > 0 else self._done.get_nowait()
            while True:
                # One that had been given up may come back late.
                if done.playing in self._playing:
                    done.playing.deadline = 0.0
                    self._resume(done.playing, done.result, done.error)
                done = self._done.get_nowait()
        except queue.Empty:
            pass
        now = time.monotonic()
        for playing in [p for p in self._playing if p.deadline and p.deadline <= now]:
            playing.deadline, playing.seat = 0.0, None
            self._resume(playing, None, Hung(f"no result within {self._rules.limits.call_s:g} s"))

    def _resume(self, playing: _Playing, value: Any, error: Exception | None) -> None:
        try:
            wanted = playing.plan.send(value) if error is None else playing.plan.throw(error)
        except StopIteration as end:
            self._playing.discard(playing)
            if playing.seat is not None:
                self._free.append(playing.seat)
            self._ended.append(end.value)
            return
        if isinstance(wanted, Ask):
            self._ready.append((playing, wanted.request))
            return
        assert playing.seat is not None
        playing.deadline = time.monotonic() + self._rules.limits.call_s
        playing.seat.do(wanted.operation, playing)

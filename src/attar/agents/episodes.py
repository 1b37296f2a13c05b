"""Engine x environment -> episodes, many at a time.

An episode is written as one generator, :func:`_episode`, that asks the engine and has its environment do things; the
driver below it keeps many of them going. With an engine whose answers follow from request and seed, an episode follows
from its task, trial and seed alone.
"""

from __future__ import annotations

import hashlib
import json
import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from attar.agents.environments import Conversing, Environment, Task, ToolError
from attar.agents.limits import EnvironmentLost, write_result
from attar.agents.seats import Hung, Seat
from attar.data.episodes import Episode, Outcome, Step, Stopped
from attar.data.schemas import check_tools
from attar.data.tools import CallChecker
from attar.data.types import Message, ToolCall
from attar.engines.base import Answer, ChatEngine, ChatRequest, Failure

__all__ = ["Asking", "Limits", "Try", "play", "seed_of"]

# How long an engine waits for environments that are still at work before it goes on with the requests that it has.
_GATHER_S = 0.05


@dataclass(frozen=True)
class Limits:
    """What an episode may take."""

    steps: int = 12
    """answers of the agent"""
    answer_tokens: int = 256
    """of one answer, its reasoning included"""
    tokens: int | None = None
    """of all answers together"""
    seconds: float | None = None
    """from the first request; looked at between steps"""
    usd: float | None = None
    """looked at between steps"""
    call_s: float = 60.0
    """of one operation of the environment; one that takes longer hangs"""
    result_characters: int = 20_000
    """of a tool's result; a longer one is cut in its middle"""


@dataclass(frozen=True)
class Asking:
    """How the engine is asked at each step. What is None is left to the engine."""

    temperature: float | None = None
    tool_choice: str | None = None
    top_p: float | None = None


class Try(NamedTuple):
    """One episode to play."""

    task: Task
    trial: int = 0


class _Ask(NamedTuple):
    request: ChatRequest


class _Do(NamedTuple):
    operation: Callable[[Environment], Any]


class _Answered(NamedTuple):
    outcome: Answer | Failure
    latency_ms: float


_Plan = Generator[_Ask | _Do, Any, Episode]


@dataclass(eq=False)
class _Playing:
    """An episode that goes on."""

    plan: _Plan
    seat: Seat | None
    asked_at: float = 0.0
    deadline: float = 0.0
    """of the operation that its environment is at; 0 where it is at none"""


class _Done(NamedTuple):
    playing: _Playing
    result: Any
    error: Exception | None


def seed_of(seed: int, task: str, trial: int) -> int:
    """The seed of an episode: the same whatever is played beside it."""
    content = json.dumps([seed, task, trial]).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:4], "big")


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
    driver = _Driver(make, iter(tries), _Rules(policy, seed, limits or Limits(), asking or Asking()), at_once)
    try:
        yield from driver.run(engine)
    finally:
        driver.close()


class _Driver:
    """Keeps episodes going between an engine and their environments."""

    def __init__(self, make: Callable[[], Environment], tries: Iterator[Try], rules: _Rules, at_once: int) -> None:
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
            self._resume(playing, _Answered(outcome, latency_ms), None)
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
            playing = _Playing(_episode(drawn, self._rules), seat)
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
        if isinstance(wanted, _Ask):
            self._ready.append((playing, wanted.request))
            return
        assert playing.seat is not None
        playing.deadline = time.monotonic() + self._rules.limits.call_s
        playing.seat.do(wanted.operation, playing)


@dataclass(frozen=True)
class _Rules:
    """What all episodes of a call have in common."""

    policy: str
    seed: int
    limits: Limits
    asking: Asking
    check: CallChecker = field(default_factory=CallChecker)


class _Broken(Exception):
    """The environment cannot go on."""


@dataclass
class _Record:
    """What an episode has come to so far."""

    messages: list[Message] = field(default_factory=list)
    tools: tuple[dict[str, Any], ...] = ()
    steps: list[Step] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    environment: str = ""


def _episode(tried: Try, rules: _Rules) -> _Plan:
    """One episode, from its start to its outcome."""
    record = _Record()
    seed = seed_of(rules.seed, tried.task.id, tried.trial)
    stopped: Stopped
    try:
        record.environment = yield from _do(lambda environment: environment.name)
        record.messages, record.tools = yield from _do(lambda environment: _begun(environment, tried.task))
        stopped = yield from _act(record, rules, tried.trial, seed)
        messages = tuple(record.messages)
        outcome: Outcome = yield from _do(lambda environment: environment.finish(messages))
        if not isinstance(outcome, Outcome):
            raise _Broken(f"finish gave a {type(outcome).__name__}, wanted attar.data.episodes.Outcome")
    except _Broken as broken:
        stopped, outcome = "environment", Outcome(False, 0.0, str(broken))
    return Episode(
        environment=record.environment,
        task=tried.task.id,
        family=tried.task.family,
        policy=rules.policy,
        trial=tried.trial,
        seed=seed,
        messages=tuple(record.messages),
        tools=record.tools,
        outcome=outcome,
        stopped=stopped,
        steps=tuple(record.steps),
        meta={"counts": dict(record.counts)} if record.counts else {},
    )


def _begun(environment: Environment, task: Task) -> tuple[list[Message], tuple[dict[str, Any], ...]]:
    beginning = environment.start(task)
    check_tools(beginning.tools, environment.name)
    return list(beginning.messages), tuple(beginning.tools)


def _do(operation: Callable[[Environment], Any]) -> Generator[_Do, Any, Any]:
    """Have something done without which the episode cannot go on."""
    try:
        return (yield _Do(operation))
    except Hung as hung:
        raise _Broken(f"the environment hung: {hung}") from hung
    except Exception as error:
        raise _Broken(f"the environment failed: {_one_line(error)}") from error


def _act(record: _Record, rules: _Rules, trial: int, seed: int) -> Generator[_Ask | _Do, Any, Stopped]:
    """Ask and call until the agent is done or a limit is reached."""
    limits, started, spent = rules.limits, time.monotonic(), 0.0
    while True:
        written = sum(step.completion_tokens for step in record.steps)
        if len(record.steps) >= limits.steps:
            return "steps"
        if limits.tokens is not None and written >= limits.tokens:
            return "tokens"
        if limits.seconds is not None and time.monotonic() - started >= limits.seconds:
            return "time"
        if limits.usd is not None and spent >= limits.usd:
            return "money"
        room = limits.answer_tokens if limits.tokens is None else min(limits.answer_tokens, limits.tokens - written)
        answered: _Answered = yield _Ask(
            ChatRequest(
                messages=tuple(record.messages),
                max_tokens=room,
                tools=record.tools,
                tool_choice=rules.asking.tool_choice,
                temperature=rules.asking.temperature,
                top_p=rules.asking.top_p,
                seed=(seed + len(record.steps)) % 2**31,
                sample=trial,
            )
        )
        answer = answered.outcome
        if isinstance(answer, Failure):
            record.counts[answer.reason] += 1
            spent += answer.usd or 0.0
            return "bad call" if answer.final and answer.reason in ("bad tool call", "no tool call") else "engine"
        spent += answer.usd or 0.0
        message = _numbered(answer.message, len(record.steps))
        record.messages.append(message)
        record.steps.append(
            Step(
                message=len(record.messages) - 1,
                prompt_tokens=answer.prompt_tokens,
                completion_tokens=answer.completion_tokens,
                latency_ms=round(answered.latency_ms, 3),
                finish_reason=answer.finish_reason,
                usd=answer.usd,
            )
        )
        if answer.finish_reason in ("length", "content_filter"):
            return "tokens" if answer.finish_reason == "length" else "engine"
        if message.tool_calls:
            errors = yield from _call_all(record, rules, message.tool_calls)
            record.steps[-1] = replace(record.steps[-1], tool_errors=errors)
            continue
        said = yield from _do(partial(_said, messages=tuple(record.messages)))
        if not said:
            return "finished"
        record.messages += said


def _said(environment: Environment, *, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    return tuple(environment.answer(messages)) if isinstance(environment, Conversing) else ()


def _numbered(message: Message, step: int) -> Message:
    """The message with an id for every call that has none, so that results can name it."""
    calls = tuple(
        call if call.id is not None else replace(call, id=f"call_{step}_{number}")
        for number, call in enumerate(message.tool_calls)
    )
    return replace(message, tool_calls=calls)


def _call_all(record: _Record, rules: _Rules, calls: tuple[ToolCall, ...]) -> Generator[_Do, Any, int]:
    """Make the calls of one answer in order; returns how many failed."""
    errors = 0
    for call in calls:
        misfit = rules.check(call, record.tools)
        result: Any
        reason: str | None
        if misfit is not None:
            result, reason = f"error: {misfit.detail}", misfit.reason
        else:
            result, reason = yield from _call(call)
        written = write_result(result, rules.limits.result_characters)
        if written.fault:
            reason = reason or f"result {written.fault}"
        if reason is not None:
            errors += 1
            record.counts[reason] += 1
        if written.left_out:
            record.counts["result cut"] += 1
        record.messages.append(Message("tool", written.text, tool_call_id=call.id, name=call.name))
    return errors


def _call(call: ToolCall) -> Generator[_Do, Any, tuple[Any, str | None]]:
    """What a call returned, or the text that says why it failed, and that in a word or two."""
    try:
        result = yield _Do(lambda environment: environment.call(call.name, call.arguments))
    except Hung as hung:
        raise _Broken(f"the environment hung in {call.name}: {hung}") from hung
    except EnvironmentLost as lost:
        raise _Broken(f"the environment is lost: {_one_line(lost, named=False)}") from lost
    except ToolError as error:
        return f"error: {_one_line(error, named=False)}", "tool error"
    except Exception as error:
        return f"error: {_one_line(error)}", "tool raised"
    return result, None


def _one_line(error: BaseException, *, named: bool = True) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if named else text

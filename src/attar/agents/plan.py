"""One episode, from its start to its outcome: a generator that asks the engine and has its environment do things.

Who runs it (:mod:`attar.agents.episodes`) hands in what came of each.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from attar.agents.environments import Conversing, Environment, Task, ToolError
from attar.agents.limits import write_result
from attar.agents.seats import Hung
from attar.data.episodes import Episode, Outcome, Step, Stopped
from attar.data.schemas import check_tools
from attar.data.tools import CallChecker
from attar.data.types import Message, ToolCall
from attar.engines.base import Answer, ChatRequest, Failure
from attar.errors import EnvironmentLost

__all__ = ["Answered", "Ask", "Asking", "Do", "Limits", "Plan", "Rules", "Try", "plan_episode", "seed_of"]


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


class Ask(NamedTuple):
    """Wanted: an answer of the engine. An :class:`Answered` is handed in."""

    request: ChatRequest


class Do(NamedTuple):
    """Wanted: something that the environment does. Its result is handed in, or what it raised is thrown."""

    operation: Callable[[Environment], Any]


class Answered(NamedTuple):
    """What came of a request, and when."""

    outcome: Answer | Failure
    latency_ms: float


Plan = Generator[Ask | Do, Any, Episode]


def seed_of(seed: int, task: str, trial: int) -> int:
    """The seed of an episode: the same whatever is played beside it."""
    content = json.dumps([seed, task, trial]).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:4], "big")


@dataclass(frozen=True)
class Rules:
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


def plan_episode(tried: Try, rules: Rules) -> Plan:
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


def _do(operation: Callable[[Environment], Any]) -> Generator[Do, Any, Any]:
    """Have something done without which the episode cannot go on."""
    try:
        return (yield Do(operation))
    except Hung as hung:
        raise _Broken(f"the environment hung: {hung}") from hung
    except Exception as error:
        raise _Broken(f"the environment failed: {_one_line(error)}") from error


def _act(record: _Record, rules: Rules, trial: int, seed: int) -> Generator[Ask | Do, Any, Stopped]:
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
        answered: Answered = yield Ask(
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


def _call_all(record: _Record, rules: Rules, calls: tuple[ToolCall, ...]) -> Generator[Do, Any, int]:
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


def _call(call: ToolCall) -> Generator[Do, Any, tuple[Any, str | None]]:
    """What a call returned, or the text that says why it failed, and that in a word or two."""
    try:
        result = yield Do(lambda environment: environment.call(call.name, call.arguments))
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

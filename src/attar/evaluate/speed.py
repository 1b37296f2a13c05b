"""Latency, throughput and memory of one arm, in a process of its own.

Every arm is measured by the same code: a warm-up, requests one at a time, then whole batches in rounds. A process of
its own keeps one arm's memory out of another's.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

from attar.errors import RunError
from attar.recipe import Evaluate

__all__ = ["Subject", "measure"]


class Subject(Protocol):
    """What is measured."""

    @property
    def parameters(self) -> int | None:
        """Number of parameters, where it is known."""

    def answer(self, requests: Sequence[Any]) -> list[float]:
        """Answer requests; returns the milliseconds to the first token of each, nothing where they have no tokens."""


def measure(
    settings: Evaluate, name: str, opener: str, arguments: dict[str, Any], requests: list[Any], *, warm_up: int
) -> dict[str, Any]:
    """Measure an arm.

    Args:
        settings: how many requests and rounds.
        name: of the arm, for messages.
        opener: ``module:function`` that makes a ``Subject`` of the arguments.
        arguments: plain data.
        requests: plain data; they are repeated in order as often as needed.
        warm_up: how many requests are answered first and not counted.

    Returns:
        ``latency_ms`` (one value a request), ``first_token_ms`` (the same, empty where answers have no tokens),
        ``seconds_a_request`` (one value a round of batches), ``memory_mb`` (resident, after answering) and
        ``parameters``.

    Raises:
        RunError: the process failed; its last lines are in the message.
    """
    job = {
        "opener": opener,
        "arguments": arguments,
        "requests": requests,
        "warm_up": warm_up,
        "latency_requests": settings.latency_requests,
        "throughput_requests": settings.throughput_requests,
        "throughput_rounds": settings.throughput_rounds,
    }
    # A fixed string: the job itself comes on standard input.
    done = subprocess.run(
        [sys.executable, "-c", "from attar.evaluate.speed import _worker; _worker()"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    if done.returncode:
        raise RunError(f"measuring {name} failed: {done.stderr.strip()[-500:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _resident_mb() -> float:
    import psutil

    resident = psutil.Process().memory_info().rss / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return round(min(resident, peak), 1)


def _worker() -> None:
    job = json.load(sys.stdin)
    module, _, function = job["opener"].partition(":")
    subject: Subject = getattr(importlib.import_module(module), function)(job["arguments"])
    requests = job["requests"]

    def cycle(n: int, start: int = 0) -> list[Any]:
        return [requests[(start + i) % len(requests)] for i in range(n)]

    for request in cycle(job["warm_up"]):
        subject.answer([request])
    latency, first_token = [], []
    for request in cycle(job["latency_requests"]):
        start = time.perf_counter()
        first_token += subject.answer([request])
        latency.append((time.perf_counter() - start) * 1000)
    batch = job["throughput_requests"]
    rounds = []
    for number in range(job["throughput_rounds"]):
        several = cycle(batch, number * batch)
        start = time.perf_counter()
        subject.answer(several)
        rounds.append((time.perf_counter() - start) / batch)
    result = {
        "latency_ms": latency,
        "first_token_ms": first_token,
        "seconds_a_request": rounds,
        "memory_mb": _resident_mb(),
        "parameters": subject.parameters,
    }
    sys.stdout.write(json.dumps(result) + "\n")

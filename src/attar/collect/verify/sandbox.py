"""A process of its own, with limits, for Python that a model wrote.

What holds on Linux where a user may make namespaces: no network, no sight of other processes, every file read-only but
for a folder in memory that is gone at the end, no privileges, and a limit of processes, none of which outlives it.
What holds everywhere: an environment without the caller's variables, limits of time, memory, output, open files and
their sizes. It keeps accidents and lazy cheats away. A model that attacks the machine it runs on belongs in a virtual
machine.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from attar.errors import RunError

__all__ = ["Limits", "Ran", "isolation_problem", "run_python"]

_CONFINED = Path(__file__).with_name("confined.py")
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# Until the process has started and isolated itself; the code's own time counts from there.
_START_S = 60.0
_PIECE = 1 << 16


@dataclass(frozen=True)
class Limits:
    """What a process may use."""

    timeout_s: float
    memory_mb: int
    """of address space"""
    output_kb: int
    """of standard output, and as much of standard error and of results"""
    file_mb: int = 64
    processes: int = 64
    required: bool = True
    """whether to refuse where the machine grants no isolation"""


@dataclass
class Ran:
    """What became of a process."""

    ended: Literal["done", "crashed", "timeout", "too much output"]
    """``done``: a program ended without an error; with calls or tests, all of them were reached"""
    output: str = ""
    """standard output"""
    errors: str = ""
    """standard error"""
    results: list[dict[str, Any]] = field(default_factory=list)
    """``{"value": ..}`` or ``{"error": ..}`` of each call"""


def run_python(
    source: str,
    limits: Limits,
    *,
    stdin: str = "",
    calls: list[dict[str, Any]] | None = None,
    tests: str | None = None,
) -> Ran:
    """Run Python in a process of its own.

    Args:
        source: the code; a program, unless there are calls or tests.
        limits: what it may use.
        stdin: what it reads.
        calls: functions of it to call then, ``{"call": name, "args": [..], "kwargs": {..}}``, as JSON.
        tests: code that runs after it, among its names.

    Raises:
        RunError: the machine grants no isolation, and the limits require it.
    """
    nonce = secrets.token_hex(16)
    job = {
        "source": source,
        "calls": calls,
        "tests": tests,
        "nonce": nonce,
        "timeout_s": limits.timeout_s,
        "memory_mb": limits.memory_mb,
        "file_mb": limits.file_mb,
        "processes": limits.processes,
        "required": limits.required,
    }
    with tempfile.TemporaryDirectory(prefix="attar-", ignore_cleanup_errors=True) as folder:
        task = Path(folder) / "job.json"
        task.write_text(json.dumps(job), "utf-8")
        told, tell = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(_CONFINED), str(task), str(tell)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env=_ENVIRONMENT,
                start_new_session=True,
                pass_fds=(tell,),
            )
        finally:
            os.close(tell)
        with process, os.fdopen(told, "rb") as results:
            try:
                ran, lines = _followed(process, results, stdin.encode("utf-8", "surrogatepass"), limits)
            finally:
                # Also what it left behind in its session.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    ran = _read(ran, lines, nonce, limits)
    # A program may end where it likes; what counts is what it wrote.
    if ran.ended == "crashed" and calls is None and tests is None and process.returncode == 0:
        ran.ended = "done"
    return ran


def _followed(process: subprocess.Popen[bytes], results: IO[bytes], stdin: bytes, limits: Limits) -> tuple[Ran, bytes]:
    """Feed a process and take what it writes until it ends or a limit is met."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    taken: dict[int, bytearray] = {}
    deadline, started = time.monotonic() + _START_S, False
    ran = Ran("crashed")
    with selectors.DefaultSelector() as selector:
        for pipe in (process.stdout, process.stderr, results):
            os.set_blocking(pipe.fileno(), False)
            taken[pipe.fileno()] = bytearray()
            selector.register(pipe, selectors.EVENT_READ)
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        rest = memoryview(stdin)
        # The pipes end with the process and all that it began, or not at all where one of those holds them.
        while selector.get_map() and process.poll() is None:
            left = deadline - time.monotonic()
            if left <= 0:
                ran.ended = "timeout"
                break
            for key, _ in selector.select(min(left, 0.05)):
                if key.fileobj is process.stdin:
                    rest = _fed(process.stdin, rest, selector)
                elif not _took(key.fd, taken[key.fd]):
                    selector.unregister(key.fileobj)
            if not started and taken[results.fileno()]:
                deadline, started = time.monotonic() + limits.timeout_s, True
            if any(len(held) > limits.output_kb << 10 for held in taken.values()):
                ran.ended = "too much output"
                break
        if ran.ended == "crashed" and not selector.get_map():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            ran.ended = "crashed" if process.poll() is not None else "timeout"
        for fd, held in taken.items():
            while len(held) <= limits.output_kb << 10 and _took(fd, held):
                pass
    if process.poll() is None:
        process.kill()
    ran.output = taken[process.stdout.fileno()].decode("utf-8", "replace")
    ran.errors = taken[process.stderr.fileno()].decode("utf-8", "replace")
    return ran, bytes(taken[results.fileno()])


def _fed(pipe: IO[bytes], rest: memoryview, selector: selectors.BaseSelector) -> memoryview:
    """Write what the pipe takes; a process that reads nothing is no error."""
    try:
        rest = rest[os.write(pipe.fileno(), rest[:_PIECE]) :] if rest else rest
    except BlockingIOError:
        return rest
    except BrokenPipeError:
        rest = rest[:0]
    if not rest:
        selector.unregister(pipe)
        with suppress(BrokenPipeError):
            pipe.close()
    return rest


def _took(fd: int, held: bytearray) -> bool:
    """Read what is there; False at the pipe's end, or where nothing is there now."""
    try:
        piece = os.read(fd, _PIECE)
    except BlockingIOError:
        return False
    held += piece
    return bool(piece)


def _read(ran: Ran, lines: bytes, nonce: str, limits: Limits) -> Ran:
    told = []
    for line in lines.splitlines():
        with suppress(ValueError):
            value = json.loads(line)
            told += [value] if isinstance(value, dict) else []
    if limits.required and told and told[0].get("isolation") is not None:
        raise RunError(
            f"what a model wrote is not run: this machine grants no isolation ({told[0]['isolation']}); run on Linux "
            "with user namespaces, or set isolation: limits, with which it runs with your rights"
        )
    ran.results = [value for value in told[1:] if "value" in value or "error" in value]
    if ran.ended == "crashed" and told and told[-1].get("done") == nonce:
        ran.ended = "done"
    return ran


@functools.cache
def isolation_problem() -> str | None:
    """Why this machine grants no isolation; None where it does."""
    try:
        ran = run_python("", Limits(timeout_s=10, memory_mb=1024, output_kb=64))
    except RunError as error:
        return str(error)
    return None if ran.ended == "done" else f"a process that does nothing ended in {ran.ended}: {ran.errors[-200:]}"

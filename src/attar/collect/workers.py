"""Processes of our own that work on parts of a file, in order.

A worker is a fresh interpreter that imports functions by name, so that a user's script need not guard its main module
and nothing of the parent (threads of torch among it) is inherited.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

from attar.errors import RunError

__all__ = ["Map", "Setup", "Task", "ordered"]

_COMMAND = "from attar.collect.workers import serve; serve()"

Task = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function of a module, called with the context of its process first, and its further arguments"""

Setup = tuple[Callable[..., Any], tuple[Any, ...]]
"""Makes the context of a process: called with these arguments and the number of the process"""

Map = Callable[[Iterable[Task]], Iterator[Any]]
"""Results of tasks, in their order"""


class _Worker:
    """One process, fed through pipes with pickles that only the two of them write."""

    def __init__(self, setup: Setup, number: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        self._setup: Any = (setup, number)

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        pickle.dump(message, self._process.stdin, pickle.HIGHEST_PROTOCOL)
        self._process.stdin.flush()

    def call(self, task: Task) -> Any:
        """The task's result; its exception is raised here."""
        assert self._process.stdout is not None
        try:
            if self._setup is not None:
                self._send(self._setup)
                self._setup = None
            self._send(task)
            failed, result = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise RunError(
                f"a process that curates died (exit code {self._process.wait()}); if memory ran out, set run.threads "
                "to a smaller number and run again"
            ) from error
        if failed:
            raise result
        return result

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                # A pipe may hold what its reader will never take.
                with contextlib.suppress(OSError):
                    pipe.close()


def serve() -> None:
    """What a worker does until its parent is gone: answer calls."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, sink = sys.stdin.buffer, _own_output()
    (function, arguments), number = pickle.load(source)
    context = function(*arguments, number)
    while True:
        try:
            function, arguments = pickle.load(source)
        except EOFError:
            return
        try:
            answer = (False, function(context, *arguments))
        except Exception as error:
            answer = (True, error)
        pickle.dump(answer, sink, pickle.HIGHEST_PROTOCOL)
        sink.flush()


def _own_output() -> BinaryIO:
    """Standard output, for us alone: what a library prints goes to standard error."""
    own = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(own, "wb")


@contextlib.contextmanager
def ordered(setup: Setup, count: int) -> Iterator[Map]:
    """Start workers and yield a function that maps tasks to their results, in the order of the tasks.

    Args:
        setup: makes the context of each process; it has a `close`, which is called where work is done in this process.
        count: of processes; 0 works in this one.

    Raises:
        RunError: a process died.
    """
    if count == 0:
        context = setup[0](*setup[1], 0)
        try:
            yield lambda tasks: (function(context, *arguments) for function, arguments in tasks)
        finally:
            context.close()
        return
    workers = [_Worker(setup, number) for number in range(count)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def call(task: Task) -> Any:
        worker = idle.get()
        try:
            return worker.call(task)
        finally:
            idle.put(worker)

    def results(tasks: Iterable[Task]) -> Iterator[Any]:
        # Few tasks are taken ahead, as each may hold rows.
        waiting: deque[Future[Any]] = deque()
        for task in tasks:
            waiting.append(threads.submit(call, task))
            if len(waiting) > 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    threads = ThreadPoolExecutor(count)
    try:
        yield results
    finally:
        for worker in workers:
            worker.close()
        threads.shutdown(cancel_futures=True)

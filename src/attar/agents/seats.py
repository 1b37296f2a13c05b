"""A place in which an environment plays, in a thread of its own, so that one that hangs holds up nobody else."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from attar.agents.environments import Environment

__all__ = ["Hung", "Seat"]


class Hung(Exception):
    """An environment did not come back in time; its seat is lost."""


class Seat:
    """Does an environment's operations one after another.

    A thread cannot be ended from outside. One whose environment hangs is left behind, and ends with the process.

    Args:
        make: makes the environment; called in the seat's thread, before its first operation.
        on_done: called in the seat's thread with whatever an operation was given for it, and its result or what it
            raised.
    """

    def __init__(self, make: Callable[[], Environment], on_done: Callable[[Any, Any, Exception | None], None]) -> None:
        self._make, self._on_done = make, on_done
        self._tasks: queue.SimpleQueue[tuple[Callable[[Environment], Any], Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="attar environment", daemon=True)
        self._thread.start()

    def do(self, operation: Callable[[Environment], Any], token: Any) -> None:
        """Have an operation done; ``on_done`` gets the token with what came of it."""
        self._tasks.put((operation, token))

    def close(self) -> None:
        """End the thread once it has nothing to do."""
        self._tasks.put(None)

    def _run(self) -> None:
        environment: Environment | None = None
        while (task := self._tasks.get()) is not None:
            operation, token = task
            error: Exception | None
            try:
                environment = environment or self._make()
                result, error = operation(environment), None
            except Exception as raised:
                result, error = None, raised
            except BaseException as raised:
                # Such as SystemExit: a world does not end the process.
                result, error = None, RuntimeError(f"{type(raised).__name__}: {raised}")
            self._on_done(token, result, error)
        close = getattr(environment, "close", None)
        if close is not None:
            close()

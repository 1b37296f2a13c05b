"""What keeps an environment from stopping a run: calls that end in time, and results that can be written."""

from __future__ import annotations

import dataclasses
import json
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import pydantic
import pydantic_core

from attar.errors import RunError

__all__ = ["EnvironmentLost", "Limited", "Written", "write_result"]

_T = TypeVar("_T")


class EnvironmentLost(RunError):
    """An instance of an environment that plays no more: a call of it did not come back, or its server is gone."""


class Limited:
    """Runs the calls of one instance in a thread of its own, one after the other, each for so long at most.

    It is the same thread every time, so that what is bound to one (an SQLite connection) may be made and used through
    it. A thread cannot be ended from outside: one that hangs is left behind, ends with the process, and its instance is
    lost, since nobody knows what it still does.

    Args:
        owner: the instance, for messages.
        timeout_s: the longest that a call may take, in seconds.
    """

    def __init__(self, owner: str, timeout_s: float) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s is {timeout_s}; wanted a positive number of seconds")
        self._owner, self._timeout_s = owner, timeout_s
        self.lost: str | None = None
        """why the instance plays no more"""
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._turn = threading.Lock()
        # A daemon: a call that hangs must not keep the process from ending.
        threading.Thread(target=self._work, name=f"attar {owner}", daemon=True).start()

    def __call__(self, step: str, function: Callable[..., _T], *args: Any) -> _T:
        """What ``function(*args)`` returns.

        Args:
            step: what is done, for messages: ``call of 'send_mail'``.
            function: called in the instance's thread.
            args: for the function.

        Raises:
            EnvironmentLost: it took too long, or the instance was lost before.
            RunError: it tried to end the process.
            Exception: whatever else it raised.
        """
        with self._turn:
            if self.lost is not None:
                raise EnvironmentLost(f"{self._owner} plays no more ({self.lost}); start another instance of it")
            job = _Job(lambda: function(*args))
            self._jobs.put(job)
            try:
                job.done.wait(self._timeout_s)
            finally:
                # Interrupted, too, the thread is busy with what nobody waits for.
                if not job.done.is_set():
                    self.lost = f"{step} did not come back"
            if self.lost is not None:
                raise EnvironmentLost(
                    f"{self._owner}: {step} took more than {self._timeout_s:g} s and was left behind; this instance "
                    "plays no more. Mend what hangs, or raise the time limit of a call"
                )
        if job.error is None:
            return job.result  # type: ignore[no-any-return]
        if isinstance(job.error, Exception):
            raise job.error
        raise RunError(f"{self._owner}: {step} raised {type(job.error).__name__}; raise an Exception") from job.error

    def close(self) -> None:
        """Let the thread end when it is done; calls after that are refused."""
        with self._turn:
            if self.lost is None:
                self.lost = "it was closed"
                self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()


class _Job:
    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = threading.Event()

    def run(self) -> None:
        try:
            self.result = self._function()
        except BaseException as error:
            self.error = error
        self.done.set()


class Written(NamedTuple):
    """A tool's result as the agent reads it."""

    text: str
    left_out: int = 0
    """characters cut from its middle"""
    fault: str = ""
    """why the text is not what the tool returned, for counting: ``circular``, ``too deep``, ``no json`` or
    ``half a surrogate pair``; a cut is no fault"""


def write_result(result: Any, max_chars: int) -> Written:
    """A tool's result as text.

    A string stays as it is, anything else becomes JSON: dataclasses and pydantic models as objects, sets in sorted
    order, dates, paths and the like as pydantic writes them. What is no JSON (NaN, an open file, a circle) becomes a
    text that says so, without the object's own repr, which may hold addresses that differ from run to run. Of a text
    longer than ``max_chars`` the first and the last half of ``max_chars`` are kept, and a line between them says how
    many characters were left out.

    Args:
        result: what the tool returned.
        max_chars: characters kept at most, the line that tells of the cut not counted.

    Raises:
        ValueError: max_chars is below 2.
    """
    if max_chars < 2:
        raise ValueError(f"max_chars is {max_chars}; wanted 2 or more, one for each end of a long result")
    fault = ""
    if isinstance(result, str):
        text = str(result)
    else:
        try:
            text = json.dumps(result, ensure_ascii=False, allow_nan=False, default=_plain)
        except RecursionError:
            fault, text = "too deep", "[result not shown: it is nested too deep to be written as JSON]"
        except Exception as error:
            # An object of the environment's own may raise anything when it is looked at.
            fault = "circular" if "ircular reference" in str(error) else "no json"
            why = "it contains itself" if fault == "circular" else f"it is no JSON ({_why(error)})"
            text = f"[result not shown: {why}]"
    if not _encodable(text):
        # Such a string cannot be written to any file; U+FFFD is what decoders put in its place.
        fault = fault or "half a surrogate pair"
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    left_out = max(0, len(text) - max_chars)
    if left_out:
        tail = max_chars // 2
        text = f"{text[: max_chars - tail]}\n[... {left_out} characters left out ...]\n{text[-tail:]}"
    return Written(text, left_out, fault)


def _plain(value: Any) -> Any:
    """A value that is nearer to JSON."""
    if isinstance(value, pydantic.BaseModel):
        return value.model_dump()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (set, frozenset)):
        # Their own order differs from run to run.
        return sorted(value, key=repr)
    if isinstance(value, Iterator):
        raise TypeError(f"{type(value).__name__}, which may have no end; return a list")
    return pydantic_core.to_jsonable_python(value)


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

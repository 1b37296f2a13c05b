"""An event loop in a thread of its own, for asynchronous code behind a synchronous door."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, TypeVar

__all__ = ["Background", "Held"]

_T = TypeVar("_T")


class Background:
    """One event loop that outlives a call, so that what is bound to a loop (a connection, a lock) lives on.

    Args:
        owner: for the thread's name.
    """

    def __init__(self, owner: str) -> None:
        self._loop = asyncio.new_event_loop()
        # A daemon: what hangs in it must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"attar {owner}", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _T], timeout_s: float | None = None) -> _T:
        """What the coroutine returns; from another thread than the loop's.

        Args:
            work: runs in the loop.
            timeout_s: cancelled after this, in seconds; None waits without end.

        Raises:
            TimeoutError: it took too long.
        """
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, timeout_s), self._loop)
        try:
            return future.result()
        except BaseException:
            # Where the caller was interrupted, the work must not go on alone.
            future.cancel()
            raise

    def enter(self, context: AbstractAsyncContextManager[_T], timeout_s: float | None = None) -> Held[_T]:
        """Enter a context and keep it, in a task of its own: those of anyio must be left by the task that entered.

        Raises:
            TimeoutError: it took too long; what was entered by then is left.
        """
        held = Held(self, context)
        try:
            self.run(held.enter(), timeout_s)
        except BaseException:
            held.leave()
            raise
        return held

    def close(self) -> None:
        """Cancel what runs, and end the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _work(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


class Held(Generic[_T]):
    """A context that was entered."""

    def __init__(self, background: Background, context: AbstractAsyncContextManager[_T]) -> None:
        self._background, self._context = background, context
        self._entered, self._enough = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def value(self) -> _T:
        """What the context gave."""
        return self._value

    def leave(self) -> None:
        """Leave the context; one that broke may break again when it is left, which is of no interest."""
        self._background.run(self._leave())

    async def enter(self) -> None:
        """Start the task that enters; in the loop."""
        self._task = asyncio.create_task(self._hold())
        entered = asyncio.create_task(self._entered.wait())
        try:
            await asyncio.wait({entered, self._task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            entered.cancel()
        if self._task.done():
            self._task.result()

    async def _hold(self) -> None:
        async with self._context as self._value:
            self._entered.set()
            await self._enough.wait()

    async def _leave(self) -> None:
        self._enough.set()
        if self._task is not None:
            if not self._entered.is_set():
                self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

"""An event loop in a thread of its own, for asynchronous code behind a synchronous door."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["Background"]

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

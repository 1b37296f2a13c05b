"""What a long step says while it works. The library calls; ``cli`` draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["Progress", "Silent", "Step"]


class Step(Protocol):
    """One long step in progress."""

    def advance(self, n: int = 1) -> None:
        """Say that ``n`` more units are done."""


class Progress(Protocol):
    """Where a run reports what it does. A user's own class may stand in for it."""

    def note(self, message: str) -> None:
        """Say one line."""

    def step(self, name: str, total: int) -> Iterator[Step]:
        """Enter a long step of ``total`` units (use ``track``, which makes this a context manager)."""


class _Nothing:
    def advance(self, n: int = 1) -> None:
        del n


class Silent:
    """Reports nothing: the default when attar is used as a library."""

    def note(self, message: str) -> None:
        """Say nothing."""
        del message

    def step(self, name: str, total: int) -> Iterator[Step]:
        """Draw nothing."""
        del name, total
        yield _Nothing()


@contextmanager
def track(progress: Progress, name: str, total: int) -> Iterator[Step]:
    """Report a long step of ``total`` units for as long as the block lasts."""
    yield from progress.step(name, total)

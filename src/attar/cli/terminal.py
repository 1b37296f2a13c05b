"""Progress in a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

__all__ = ["Terminal"]


class Terminal:
    """Progress on stderr: a live bar in a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()

    def note(self, message: str) -> None:
        """Print one line."""
        print(message, file=sys.stderr, flush=True)

    def step(self, name: str, total: int) -> Iterator[Any]:
        """Yield what a step of ``total`` parts reports its advance to."""
        if self._live:
            yield from _bar(name, total)
        else:
            yield _Lines(name, total)


class _Lines:
    """A line at most every ten seconds, and one at the end."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._done = name, total, 0
        self._start = self._said = time.monotonic()

    def advance(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._said >= 10 or self._done >= self._total:
            self._said = now
            rate = self._done / max(now - self._start, 1e-9)
            left = (self._total - self._done) / rate if rate else 0.0
            print(
                f"  {self._name}: {self._done}/{self._total}, {rate:.1f}/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )


def _bar(name: str, total: int) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    class Bar:
        def advance(self, n: int = 1) -> None:
            progress.advance(task, n)

    class Speed(Progress):
        """A progress bar whose speed column is 0 until one is known."""

        def get_renderables(self) -> Iterator[Any]:
            for item in self.tasks:
                item.fields["rate"] = item.speed or 0.0
            yield from super().get_renderables()

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f}/s"),
        TimeRemainingColumn(),
    )
    with Speed(*columns, console=Console(stderr=True), transient=False) as progress:
        task = progress.add_task(name, total=total, rate=0.0)
        yield Bar()

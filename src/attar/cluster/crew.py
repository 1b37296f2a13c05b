"""Workers of a Ray cluster that stay, for tasks that come one by one and may depend on what came of earlier ones.

A data set is no such thing (see :mod:`attar.cluster.machines` for those), so the tasks go to Ray's actors directly. An
actor that dies is started again and does its tasks again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from attar.cluster.machines import Cluster, add_to_path, driver_path, first_line, told
from attar.errors import AttarError, require

__all__ = ["Crew", "hire"]

Open = Callable[[int], Callable[[Any], Any]]
"""Called once in each worker, with its CPU threads; returns what is done with a task"""

# Times that a task is done again because its worker died.
_RETRIES = 3
# Tasks that a worker has, one of them at work; and those that may be done while an earlier one is not.
_EACH = 2
_AHEAD = 8
_LOG = logging.getLogger("attar")


@dataclass(frozen=True)
class _Problem:
    kind: str
    message: str


class _Member:
    """One of the crew, in an actor of Ray's."""

    def __init__(self, open_work: Open, threads: int, path: tuple[str, ...]) -> None:
        add_to_path(path)
        self._open, self._threads = open_work, threads
        self._work: Callable[[Any], Any] | None = None

    def do(self, task: Any) -> Any:
        """What comes of a task, or what was raised."""
        try:
            if self._work is None:
                self._work = self._open(self._threads)
            return self._work(task)
        except AttarError as error:
            return _Problem(type(error).__name__, str(error))
        except Exception as error:
            _LOG.exception("a worker failed")
            return _Problem("RunError", f"a worker failed: {type(error).__name__}: {error}")


class Crew:
    """Get one from :func:`hire`."""

    def __init__(self, members: list[Any]) -> None:
        self._members = members

    def run(self, tasks: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Do tasks, drawn one by one as workers get free.

        An iterator that is closed draws no more and waits for what is at work, so that nothing paid for is lost.

        Args:
            tasks: anything that can be pickled.

        Yields:
            (number of the task, counted from 0, and what came of it), in the order of completion.

        Raises:
            AttarError: what a worker raised first; what was at work by then is yielded before.
            RunError: a task's workers died again and again.
        """
        yield from self._run(tasks, lambda flying: flying < _EACH * len(self._members))

    def ordered(self, tasks: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """The same in the order of the tasks. What is done too early waits in memory, and little is begun meanwhile.

        Raises:
            AttarError, RunError: as :meth:`run`; what is done by then is yielded before, also behind one that failed.
        """
        waiting: dict[int, Any] = {}
        wanted = 0

        def room(flying: int) -> bool:
            members = len(self._members)
            return flying < _EACH * members and flying + len(waiting) < _AHEAD * members

        try:
            for number, result in self._run(tasks, room):
                waiting[number] = result
                while wanted in waiting:
                    yield wanted, waiting.pop(wanted)
                    wanted += 1
        except AttarError:
            yield from ((number, waiting[number]) for number in sorted(waiting))
            raise

    def _run(self, tasks: Iterable[Any], room: Callable[[int], bool]) -> Iterator[tuple[int, Any]]:
        """As :meth:`run`; one more is drawn where there is room beside so many that are at work."""
        ray = require("ray", "ray")
        source = enumerate(tasks)
        flying: dict[Any, tuple[int, int]] = {}
        loads = [0] * len(self._members)
        more, problem = True, None
        try:
            while True:
                while more and problem is None and room(len(flying)):
                    drawn = next(source, None)
                    if drawn is None:
                        more = False
                        break
                    member = loads.index(min(loads))
                    flying[self._members[member].do.remote(drawn[1])] = (drawn[0], member)
                    loads[member] += 1
                if not flying:
                    break
                [ready], _ = ray.wait(list(flying), num_returns=1)
                number, member = flying.pop(ready)
                loads[member] -= 1
                result = self._result(ray, ready)
                if isinstance(result, _Problem):
                    problem = problem or result
                else:
                    yield number, result
        except GeneratorExit:
            if flying:
                ray.wait(list(flying), num_returns=len(flying))
            raise
        if problem is not None:
            raise told(problem.kind, problem.message)

    @staticmethod
    def _result(ray: Any, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayError as error:
            return _Problem(
                "RunError",
                f"workers died {_RETRIES + 1} times at one task ({first_line(error)}); if they lacked memory, set "
                "run.shard_rows or run.workers to less, and run the same command again",
            )


@contextmanager
def hire(cluster: Cluster, open_work: Open) -> Iterator[Crew]:
    """Start as many workers as the cluster has room for, for as long as the block lasts.

    Args:
        cluster: from :func:`attar.cluster.machines.start_cluster`.
        open_work: it is pickled and sent to every worker, so it holds settings, not models.
    """
    ray = require("ray", "ray")
    actor = ray.remote(
        num_cpus=cluster.cpus, num_gpus=cluster.gpus, max_restarts=-1, max_task_retries=_RETRIES, max_concurrency=1
    )(_Member)
    members = [actor.remote(open_work, cluster.cpus, driver_path()) for _ in range(cluster.workers)]
    try:
        yield Crew(members)
    finally:
        for member in members:
            ray.kill(member)

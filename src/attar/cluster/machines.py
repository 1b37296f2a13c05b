"""Workers of a Ray cluster, one engine each, that work through shards as a Ray Data pipeline.

Ray starts a worker again when it dies, and gives it what it was at. What a worker makes of a shard is a file; it counts
once this process, the only one to do so, has written its mark (see :mod:`attar.cluster.shards`). So however often Ray
does a shard, it counts once, and a run that was cut off goes on with the shards that have no mark.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from attar import errors
from attar.cluster.shards import Mark, Shards
from attar.errors import AttarError, RunError, require
from attar.recipe.base import RunPart

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Cluster", "Work", "add_to_path", "driver_path", "first_line", "start_cluster", "told"]

_LOG = logging.getLogger("attar")
# Workers that may die at one shard: one that is too much for any of them would go round for ever.
_DEATHS = 3
# What Ray Data shows on a terminal is the caller's business, and a shard may take as long as it needs.
_SETTINGS = {"enable_progress_bars": False, "print_on_execution_start": False, "execution_no_progress_timeout_s": -1}
# Of a cluster of our own, read when Ray is imported. The second has it take 127.0.0.1 for its address, as it does on
# desktops. gRPC's event engine was seen to lose wake-ups on Linux 6.18, so that Ray never came up.
_LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener",
}
_OBJECT_STORE_BYTES = 100 * 2**20


class Work(Protocol):
    """What is done with shards. It is pickled and sent to every worker, so it holds settings, not models."""

    def open(self, threads: int) -> Callable[[pa.Table], pa.Table]:
        """Load what the work needs, an engine; called once in each worker.

        Args:
            threads: of the CPU, for this worker.

        Returns:
            What makes a table of a table. It depends on the table alone, so that it does not matter which worker gets
            it, or how often.
        """


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that this process is connected to."""

    workers: int
    """engines at work at a time"""
    cpus: int
    """of each"""
    gpus: int
    """of each"""

    def map(self, work: Work, tables: Iterable[pa.Table], shards: Shards) -> Iterator[pa.Table]:
        """Work on tables, many at a time, and yield what was made of them in the order in which they were given.

        Tables that the folder holds results of are not worked on again. Results are read from the folder as they are
        drawn; how far the work is ahead of the caller takes no memory. An iterator that is closed early leaves a folder
        that the same call goes on from.

        Args:
            work: what to do.
            tables: each a shard: what a worker that dies has to do again.
            shards: where tables and results are written. It belongs to this work with these settings alone.

        Raises:
            AttarError: what a worker raised first; shards that were at work by then are done and counted.
            RunError: a worker died again and again.
        """
        marks = shards.marks()
        shards.sweep(marks.values())
        shards.resume()
        sources = [shards.put(table, done=marks) for table in tables]
        todo = [source for source in dict.fromkeys(sources) if source not in marks]
        with ExitStack() as stack:
            made = stack.enter_context(self._results(work, todo, shards))
            for source in sources:
                while source not in marks:
                    mark = _next(made, source)
                    # A result that was lost on its way is made again.
                    if mark.source not in marks:
                        shards.commit(mark)
                        marks[mark.source] = mark
                yield shards.read(marks[source])

    @contextmanager
    def _results(self, work: Work, todo: list[str], shards: Shards) -> Iterator[Iterator[Mark]]:
        """Attempts at the sources, in the order of completion."""
        if not todo:
            yield iter(())
            return
        data = require("ray.data", "ray")
        context = data.DataContext.get_current()
        before = {name: getattr(context, name) for name in _SETTINGS}
        for name, value in _SETTINGS.items():
            setattr(context, name, value)
        pipeline = data.from_items([{"source": source} for source in todo], override_num_blocks=len(todo)).map(
            _Worker,
            fn_constructor_args=(work, shards.url, self.cpus, _DEATHS, driver_path()),
            compute=data.ActorPoolStrategy(size=min(self.workers, len(todo)), max_tasks_in_flight_per_actor=2),
            num_cpus=self.cpus,
            num_gpus=self.gpus,
        )
        # Batches are blocks here, and blocks are rows: nothing is held back.
        batches = pipeline.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        try:
            yield self._marks((row for batch in batches for row in batch.to_pylist()), shards)
        finally:
            for name, value in before.items():
                setattr(context, name, value)

    @staticmethod
    def _marks(rows: Iterator[dict[str, Any]], shards: Shards) -> Iterator[Mark]:
        first: AttarError | None = None
        try:
            for row in rows:
                if row["error"] and first is None:
                    first = told(row["error"], row["message"])
                    shards.stop()
                elif row["file"]:
                    yield Mark(**{name: row[name] for name in Mark.__dataclass_fields__})
        except require("ray.exceptions", "ray").RayError as error:
            raise RunError(
                f"the workers of run.on: ray failed ({first_line(error)}); what they had done is kept, and the same "
                "command goes on from there"
            ) from error
        if first is not None:
            raise first


class _Worker:
    """One engine, in an actor of Ray's."""

    def __init__(self, work: Work, url: str, cpus: int, deaths: int, path: tuple[str, ...] = ()) -> None:
        add_to_path(path)
        self._work, self._url, self._cpus, self._deaths = work, url, cpus, deaths
        self._shards: Shards | None = None
        self._function: Callable[[pa.Table], pa.Table] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """An attempt at a source; what it raises on purpose is told, for Ray to pass on as it is."""
        nothing = {**asdict(Mark("", "", 0, "", 0)), "error": "", "message": ""}
        try:
            # Here and not in the constructor, whose exceptions Ray takes for a death.
            shards = self._shards = self._shards or Shards(self._url)
            if shards.stopped():
                return nothing
            source = str(row["source"])
            note = shards.begin(source, self._deaths)
            if self._function is None:
                self._function = self._work.open(self._cpus)
            made = asdict(shards.attempt(source, self._function(shards.take(source))))
            shards.end(note)
            return nothing | made
        except AttarError as error:
            return {**nothing, "error": type(error).__name__, "message": str(error)}
        except Exception as error:
            _LOG.exception("a worker failed")
            return {**nothing, "error": "RunError", "message": f"a worker failed: {type(error).__name__}: {error}"}


def _next(made: Iterator[Mark], wanted: str) -> Mark:
    mark = next(made, None)
    if mark is None:
        raise RunError(f"the workers of run.on: ray ended without shard {wanted}; run the same command again")
    return mark


def driver_path() -> tuple[str, ...]:
    """Where this process imports from: what stands beside a recipe may be its teacher."""
    return tuple(os.path.abspath(place) for place in sys.path)


def add_to_path(places: tuple[str, ...]) -> None:
    """Have a worker import from those places too, after its own, where its machine has them."""
    sys.path += [place for place in places if place not in sys.path and os.path.exists(place)]


def told(name: str, message: str) -> AttarError:
    """The exception that a worker raised, of its class's name and its message."""
    kind = getattr(errors, name, RunError)
    made: AttarError = kind(message)
    return made


def first_line(error: BaseException) -> str:
    """What an exception of Ray's says before it shows the worker's stack."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def start_cluster(where: RunPart) -> Iterator[Cluster]:
    """Connect to the recipe's Ray cluster, or start one on this machine, for as long as the block lasts.

    A process that is connected already stays as it is. A cluster of our own shows no dashboard, sends nothing, listens
    on this machine only, and is stopped at the end.

    Raises:
        MissingExtra: Ray is not installed.
        RunError: there is no cluster at the address, or it has too little for the workers.
    """
    if where.address == "local":
        for name, value in _LOCAL.items():
            os.environ.setdefault(name, value)
    ray = require("ray", "ray")
    require("ray.data", "ray")
    with ExitStack() as stack:
        if not ray.is_initialized():
            _connect(ray, where, stack)
        yield _shares(ray, where)


def _connect(ray: Any, where: RunPart, stack: ExitStack) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if where.address != "local":
        try:
            ray.init(address=where.address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RunError(
                f"run.address: no Ray cluster answers at {where.address} ({first_line(error)}); start one with `ray "
                "start --head` on a machine and `ray start --address HOST:PORT` on the others, and run this on one of "
                "them; or set run.address: local"
            ) from error
        stack.callback(ray.shutdown)
        return
    # Sockets stand in it, whose paths may have about 100 characters.
    folder = stack.enter_context(
        tempfile.TemporaryDirectory(prefix="attar-ray-", dir="/tmp", ignore_cleanup_errors=True)
    )
    wanted = (where.workers or 1) * (where.threads or 1)
    ray.init(
        address="local",
        num_cpus=max(wanted, os.cpu_count() or 1),
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
        **quiet,
    )
    stack.callback(ray.shutdown)
    if not all(node["NodeManagerAddress"].startswith("127.") for node in ray.nodes()):
        raise RunError(
            "run.address: local would be open to other machines, as Ray was imported before attar could say otherwise; "
            f"set {' '.join(f'{name}={value}' for name, value in _LOCAL.items())} in the environment"
        )


def _shares(ray: Any, where: RunPart) -> Cluster:
    """What each worker gets: its share of cores, and a GPU if there are any and the recipe does not say cpu."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cores = int(sum(node.get("CPU", 0) for node in nodes))
    each = 1 if gpus and where.device in ("auto", "cuda") else 0
    if where.device == "cuda" and not gpus:
        raise RunError(f"run.device: cuda, and the {len(nodes)} machine(s) of the Ray cluster have no GPU")
    workers = where.workers or (gpus if each else len(nodes))
    cpus = where.threads or max(1, min(cores // workers, int(max(node.get("CPU", 0) for node in nodes))))
    room = sum(min(int(node.get("CPU", 0)) // cpus, int(node.get("GPU", 0)) if each else workers) for node in nodes)
    if room < workers:
        raise RunError(
            f"run.workers: {workers}, each with {cpus} CPU(s) and {each} GPU(s), and the Ray cluster has room for "
            f"{room}: {cores} CPUs and {gpus} GPUs on {len(nodes)} machine(s); set run.workers or run.threads to less"
        )
    return Cluster(workers, cpus, each)

"""The first pass by workers on other machines: parts of files go out as shards, what is left of them comes back.

What compares rows stays where the run is; so do lines and words, as if a process of this machine had written them.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attar import __version__
from attar.cluster.machines import start_cluster
from attar.cluster.shards import Shards
from attar.collect.reading import ROWS, Batch, Context, Dropped, Unit, content_of, read
from attar.errors import require
from attar.recipe import ChatRecipe, ClassifyRecipe

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "ReadWork",
    "Reading",
    "batch_of",
    "batch_table",
    "reading_fingerprint",
    "spread_reading",
    "unit_of",
    "unit_table",
]

Reading = Callable[[Iterable[Unit]], Generator[Batch]]
"""What is left of parts of files, in their order"""

AnyRecipe = ChatRecipe | ClassifyRecipe

_UNIT = b"attar.unit"


def reading_fingerprint(recipe: AnyRecipe) -> dict[str, Any]:
    """All that decides what is left of a part of a file."""
    dumped = recipe.dump()
    return {key: dumped[key] for key in ("task", "data", "curate")} | {"version": __version__}


@contextmanager
def spread_reading(recipe: AnyRecipe, parts: Path, shards: Shards) -> Iterator[Reading]:
    """Have the workers of the recipe's cluster read, for as long as the block lasts.

    Args:
        recipe: says where the cluster is, and what is filtered.
        parts: folder for lines and words, as that of a :class:`attar.collect.reading.Context`.
        shards: what is on its way; to be removed once the splits are written.

    Raises:
        MissingExtra: Ray is not installed.
        RunError: there is no cluster, or it has too little for the workers.
    """
    context = Context(recipe, parts, 0)

    def reading(units: Iterable[Unit]) -> Generator[Batch]:
        for table in cluster.map(ReadWork(recipe), map(unit_table, units), shards):
            batch, lines, words = batch_of(table)
            batch.rows["start"] += np.uint64(context.lines.tell())
            batch.rows["words"] += np.uint64(context.words.tell() // 4)
            for handle, content in ((context.lines, lines), (context.words, words)):
                handle.write(content)
                handle.flush()
            yield batch

    with start_cluster(recipe.run) as cluster:
        try:
            yield reading
        finally:
            context.close()


@dataclass(frozen=True)
class ReadWork:
    """The first pass in a worker; see :class:`attar.cluster.machines.Work`."""

    recipe: AnyRecipe

    def open(self, threads: int) -> Callable[[pa.Table], pa.Table]:
        """Build the filters; returns a part of a file -> what is left of it."""
        del threads
        context = _InMemory(self.recipe)

        def work(table: pa.Table) -> pa.Table:
            batch = read(context, unit_of(table))
            lines, words = context.take()
            return batch_table(batch, lines, words)

        return work


class _InMemory(Context):
    """Keeps what it would write, and is number 0, as the one that writes it in its place."""

    _kept: tuple[io.BytesIO, ...] = ()

    def __init__(self, recipe: AnyRecipe) -> None:
        super().__init__(recipe, Path(), 0)
        self.take()

    def take(self) -> tuple[bytes, ...]:
        """Lines and words since the last time."""
        taken = tuple(kept.getvalue() for kept in self._kept)
        self.lines, self.words = self._kept = io.BytesIO(), io.BytesIO()
        return taken


def unit_table(unit: Unit) -> pa.Table:
    """A part of a file as a table: a JSONL file's bytes, a CSV file's rows as JSON, a Parquet file's as they are."""
    pa = require("pyarrow", "ray")
    about: dict[str, Any] = {"key": unit.key, "file": unit.file, "path": str(unit.path)}
    if unit.table is not None:
        table, about["first"] = unit.table, unit.first
    elif unit.end:
        table = pa.table({"content": pa.array([content_of(unit)], pa.large_binary())})
        about |= {"start": unit.start, "end": unit.end}
    else:
        # The cells that a row has beyond the header have no name that JSON allows.
        rows = [[number, list(row.items())] for number, row in unit.rows]
        table = pa.table({"rows": pa.array([json.dumps(rows)], pa.large_string())})
    return table.replace_schema_metadata({**(table.schema.metadata or {}), _UNIT: json.dumps(about)})


def unit_of(table: pa.Table) -> Unit:
    """What :func:`unit_table` made a table of."""
    about = json.loads(table.schema.metadata[_UNIT])
    about["path"] = Path(about["path"])
    if "first" in about:
        return Unit(**about, table=table)
    if "end" in about:
        return Unit(**about, content=table["content"][0].as_py())
    rows = json.loads(table["rows"][0].as_py())
    return Unit(**about, rows=tuple((number, dict(row)) for number, row in rows))


def batch_table(batch: Batch, lines: bytes, words: bytes) -> pa.Table:
    """What is left of a part of a file, its lines and its words, as a table of one row."""
    pa = require("pyarrow", "ray")
    arrays = {"rows": batch.rows.tobytes(), "signatures": batch.signatures.tobytes(), "lines": lines, "words": words}
    about = {
        "lines": batch.lines,
        "minima": batch.signatures.shape[1],
        "dropped": batch.dropped,
        "stop": batch.stop,
        "redacted": batch.redacted,
        "names": list(batch.names.items()),
    }
    columns = {name: pa.array([content], pa.large_binary()) for name, content in arrays.items()}
    return pa.table(columns | {"about": pa.array([json.dumps(about)], pa.large_string())})


def batch_of(table: pa.Table) -> tuple[Batch, bytes, bytes]:
    """What :func:`batch_table` made a table of."""
    [row] = table.to_pylist()
    about = json.loads(row["about"])
    rows = np.frombuffer(row["rows"], ROWS).copy()
    batch = Batch(
        about["lines"],
        rows,
        np.frombuffer(row["signatures"], np.uint16).reshape(len(rows), about["minima"]),
        [Dropped(*drop) for drop in about["dropped"]],
        None if about["stop"] is None else tuple(about["stop"]),
        Counter(about["redacted"]),
        dict(about["names"]),
    )
    return batch, row["lines"], row["words"]

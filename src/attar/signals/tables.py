"""Records of signals, and the examples that they are made of, as Parquet tables, for workers on other machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attar.errors import require
from attar.signals.store import Record
from attar.tokens import TokenizedExample

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["examples_of", "examples_table", "records_of", "records_table", "requests_table"]


def _arrow() -> Any:
    return require("pyarrow", "ray")


def examples_table(examples: Sequence[TokenizedExample]) -> pa.Table:
    """Columns ``id``, ``ids`` and ``supervised``, a row for each example."""
    pa = _arrow()
    return pa.table(
        {
            "id": [example.id for example in examples],
            "ids": pa.array([example.ids for example in examples], pa.list_(pa.int32())),
            "supervised": pa.array([example.supervised for example in examples], pa.list_(pa.bool_())),
        }
    )


def examples_of(table: pa.Table) -> list[TokenizedExample]:
    """What :func:`examples_table` made a table of."""
    return [
        TokenizedExample(name, np.array(ids, dtype=np.int32), np.array(supervised, dtype=np.bool_))
        for name, ids, supervised in zip(
            *(table[column].to_pylist() for column in ("id", "ids", "supervised")), strict=True
        )
    ]


def requests_table(requests: Sequence[tuple[str, str]]) -> pa.Table:
    """Columns ``id`` and ``text``."""
    return _arrow().table({"id": [name for name, _ in requests], "text": [text for _, text in requests]})


def records_table(ids: Sequence[str], records: Sequence[Record], tokens: int) -> pa.Table:
    """Columns ``id`` and one for each array, its bytes; dtypes, shapes and ``tokens`` stand in the schema.

    Args:
        ids: of the examples.
        records: one for each, as a :class:`attar.signals.store.SignalStore` takes them.
        tokens: how many prompt tokens the teacher read for them.
    """
    pa = _arrow()
    fields = [pa.field("id", pa.string())]
    columns = [pa.array(ids, pa.string())]
    for name, first in records[0].items():
        about = {"dtype": first.dtype.str, "shape": json.dumps(first.shape[1:])}
        fields.append(pa.field(name, pa.large_binary(), metadata=about))
        columns.append(pa.array([record[name].tobytes() for record in records], pa.large_binary()))
    return pa.Table.from_arrays(columns, schema=pa.schema(fields, metadata={"tokens": str(tokens)}))


def records_of(table: pa.Table) -> tuple[list[str], list[dict[str, np.ndarray[Any, Any]]], int]:
    """The ids, records and tokens that :func:`records_table` made a table of."""
    ids: list[str] = table["id"].to_pylist()
    records: list[dict[str, np.ndarray[Any, Any]]] = [{} for _ in ids]
    for field in table.schema:
        if field.name == "id":
            continue
        dtype = np.dtype(field.metadata[b"dtype"].decode())
        shape = (-1, *json.loads(field.metadata[b"shape"]))
        for record, cell in zip(records, table[field.name], strict=True):
            record[field.name] = np.frombuffer(cell.as_buffer(), dtype).reshape(_rows(cell, dtype, shape))
    return ids, records, int(table.schema.metadata[b"tokens"])


def _rows(cell: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    # An empty array leaves no room for -1.
    width = int(np.prod(shape[1:])) * dtype.itemsize
    return (cell.as_buffer().size // width if width else 0, *shape[1:])

"""Signals on disk: what a teacher said, in append-only shards that are checked and memory-mapped.

A record is what is kept of one example: arrays by name, each with as many rows as it needs (tokens, bytes, one). A
shard holds some examples: for each name one ``.npy`` file, the records' rows one below the other, and a description
that says where each example's begin and what their CRC-32 is. The shard counts once its description is written, last
of all, so that a killed run loses at most the shard in work.

A store belongs to one fingerprint; another one is refused by name, never mixed.
"""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attar.errors import WorkspaceError
from attar.workspace import canonical, digest, write_atomic, write_json

__all__ = ["Record", "SignalStore"]

Record = Mapping[str, npt.NDArray[Any]]
"""Arrays by name, [rows, ...] each."""

NAME = re.compile(r"[A-Za-z0-9_-]+")


class SignalStore:
    """Records by example id.

    Opening reads the descriptions and checks that every file has its size; reading an example touches its bytes alone
    and checks them. Several processes may read at once. A store may be handed to a worker process, by fork or pickled:
    memory maps are opened where they are used. One process at a time may append, which the run's lock sees to.

    Args:
        folder: where the shards are.
        fingerprint: what made them, plain data: teacher, revision, tokenizer, template, temperature, kind, settings.
            Compared key by key with what the folder holds.

    Raises:
        WorkspaceError: the folder holds signals of another fingerprint, or a shard is damaged.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder = folder
        self.fingerprint: dict[str, Any] = json.loads(canonical(dict(fingerprint)))
        meta = folder / "meta.json"
        if meta.exists():
            self._compare(meta)
        else:
            write_json(meta, self.fingerprint)
        self._shards: list[_Shard] = []
        self._places: dict[str, tuple[_Shard, int]] = {}
        for path in sorted(folder.glob("shard-*.json")):
            self._add(_Shard(path))

    def _compare(self, meta: Path) -> None:
        try:
            found = dict(json.loads(meta.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise WorkspaceError(f"{meta} is damaged ({error}); delete {self.folder}") from error
        wanted = self.fingerprint
        different = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
        if different:
            raise WorkspaceError(
                f"the signals in {self.folder} were made with another {', '.join(different)}; "
                "they are not mixed: run `attar score` in another run.folder"
            )

    def _add(self, shard: _Shard) -> None:
        self._shards.append(shard)
        self._places.update((name, (shard, place)) for place, name in enumerate(shard.ids))

    def __contains__(self, example: str) -> bool:
        return example in self._places

    @property
    def ids(self) -> list[str]:
        """Ids of all stored examples, in order."""
        return list(self._places)

    @property
    def tokens(self) -> int:
        """Prompt tokens that the teacher read for these signals."""
        return sum(shard.tokens for shard in self._shards)

    def append(self, ids: Sequence[str], records: Sequence[Record], tokens: int) -> None:
        """Add one shard. It is in memory once more while it is written.

        Args:
            ids: of examples that are not stored yet.
            records: one for each, all with the same names, dtypes and shapes but for the number of rows. Numpy has no
                bfloat16: see ``attar.signals.hidden.to_array``.
            tokens: how many prompt tokens the teacher read for them.

        Raises:
            ValueError: the records do not fit each other or the ids, or an id is stored already.
            NoSpaceError: the disk is full.
        """
        _check(ids, records, self._places)
        # Not the number of shards: a damaged one may have been deleted.
        number = 1 + max((shard.number for shard in self._shards), default=-1)
        stem = self.folder / f"shard-{number:05d}"
        arrays = {}
        for name, first in records[0].items():
            parts = [np.ascontiguousarray(record[name]) for record in records]
            rows = [len(part) for part in parts]
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                header, {"descr": first.dtype.str, "fortran_order": False, "shape": (sum(rows), *first.shape[1:])}
            )
            content = b"".join([header.getvalue(), *(part.data for part in parts if part.size)])
            write_atomic(stem.with_suffix(f".{name}.npy"), content)
            arrays[name] = {
                "dtype": first.dtype.str,
                "shape": list(first.shape[1:]),
                "bytes": len(content),
                "rows": rows,
                "crc32": [_checksum(part) for part in parts],
            }
        about = {"ids": list(ids), "tokens": tokens, "arrays": arrays}
        description = stem.with_suffix(".json")
        write_atomic(description, canonical({**about, "sha256": digest(about)}))
        self._add(_Shard(description))

    def read(self, ids: Sequence[str], names: Sequence[str] | None = None) -> list[dict[str, npt.NDArray[Any]]]:
        """Records of some examples, in the order asked; the arrays are copies.

        Args:
            ids: of stored examples.
            names: which of their arrays; None for all.

        Raises:
            WorkspaceError: an example has no signal, or no array of that name, or its bytes are damaged.
        """
        missing = [name for name in ids if name not in self._places]
        if missing:
            raise WorkspaceError(
                f"{len(missing)} of {len(ids)} examples have no signal (first: {missing[0]}); run `attar score`"
            )
        return [shard.read(place, names) for shard, place in (self._places[name] for name in ids)]

    def verify(self) -> None:
        """Check every byte, one example at a time.

        Raises:
            WorkspaceError: a shard is damaged; it is named.
        """
        for shard in self._shards:
            for place in range(len(shard.ids)):
                shard.read(place, None)


class _Shard:
    """The description of a shard, and maps of its files once they are used."""

    def __init__(self, description: Path) -> None:
        self._description = description
        try:
            about = json.loads(description.read_bytes())
            whole = about.pop("sha256") == digest(about)
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise self._damaged(description, "it")
        self.number = int(description.stem.removeprefix("shard-"))
        self.ids: list[str] = about["ids"]
        self.tokens: int = about["tokens"]
        self._arrays: dict[str, dict[str, Any]] = about["arrays"]
        self._ends = {name: np.cumsum([0, *array["rows"]]) for name, array in self._arrays.items()}
        for name, array in self._arrays.items():
            path = self._path(name)
            if not path.is_file() or path.stat().st_size != array["bytes"]:
                raise self._damaged(path, "its size")
        self._maps: dict[str, npt.NDArray[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map is its content.
        return {**self.__dict__, "_maps": {}}

    def read(self, place: int, names: Sequence[str] | None) -> dict[str, npt.NDArray[Any]]:
        """The arrays of the example at that place."""
        record = {}
        for name in self._arrays if names is None else names:
            if name not in self._arrays:
                raise WorkspaceError(
                    f"{self._description} has no {name} of example {self.ids[place]}; wanted one of "
                    f"{', '.join(self._arrays)}: score again with {name}"
                )
            begin, end = self._ends[name][place : place + 2]
            # Checked as a copy: what is used is what was checked.
            record[name] = np.array(self._map(name)[begin:end])
            if _checksum(record[name]) != self._arrays[name]["crc32"][place]:
                raise self._damaged(self._path(name), f"example {self.ids[place]}")
        return record

    def _path(self, name: str) -> Path:
        return self._description.with_suffix(f".{name}.npy")

    def _map(self, name: str) -> npt.NDArray[Any]:
        if name not in self._maps:
            array = self._arrays[name]
            shape = (int(self._ends[name][-1]), *array["shape"])
            if 0 in shape:  # nothing that could be mapped
                self._maps[name] = np.empty(shape, array["dtype"])
            else:
                size = np.dtype(array["dtype"]).itemsize * int(np.prod(shape))
                self._maps[name] = np.memmap(
                    self._path(name), array["dtype"], mode="r", offset=array["bytes"] - size, shape=shape
                )
        return self._maps[name]

    def _damaged(self, path: Path, what: str) -> WorkspaceError:
        return WorkspaceError(
            f"{path} is damaged: {what} is not what was written; delete {self._description.stem}.* in "
            f"{path.parent} and run `attar score` again"
        )


def _checksum(array: npt.NDArray[Any]) -> int:
    return zlib.crc32(array.data) if array.size else 0


def _check(ids: Sequence[str], records: Sequence[Record], stored: Mapping[str, object]) -> None:
    if not ids or len(ids) != len(records):
        raise ValueError(f"{len(ids)} ids and {len(records)} records; wanted as many of both, and at least one")
    seen: set[str] = set()
    for name in ids:
        if name in stored or name in seen:
            raise ValueError(f"example {name} has a signal already; wanted each example once")
        seen.add(name)
    first = records[0]
    bad = [name for name in first if not NAME.fullmatch(name)]
    if bad or not first:
        raise ValueError(f"arrays are named {', '.join(map(repr, first))}; wanted names of letters, digits, _ and -")
    for name, record in zip(ids, records, strict=True):
        if set(record) != set(first):
            raise ValueError(f"example {name} has arrays {', '.join(record)}; wanted {', '.join(first)}, as the first")
        for key, array in record.items():
            like = first[key]
            if (
                array.ndim == 0
                or array.dtype.hasobject
                or (array.dtype, array.shape[1:]) != (like.dtype, like.shape[1:])
            ):
                raise ValueError(
                    f"{key} of example {name} has dtype {array.dtype} and shape {array.shape}; wanted {like.dtype} and "
                    f"[rows, {', '.join(map(str, like.shape[1:]))}], as the first"
                )

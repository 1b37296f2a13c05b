"""Tables in a folder that many machines see, on any path that fsspec knows: each counts whole and once, or not at all.

::

    <source>.parquet             a table to work on; <source> is the hash of these bytes
    <source>.<attempt>.parquet   what one attempt made of it
    <source>.json                the mark: which attempt counts, its size and its hash
    <source>.<number>.begun      a worker is at it, or died of it

Object stores cannot rename, and a worker that was given up may still be writing. So every attempt has a name of its
own, nothing is moved or written over, and an attempt counts once its mark is written: by the one process that hands the
work out, for the first attempt that it hears of. A mark says its own hash, so that half a mark is none.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import uuid
from collections.abc import Collection, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attar.errors import AttarError, MissingExtra, RecipeError, RunError, WorkspaceError, require
from attar.recipe.base import Recipe
from attar.workspace import canonical, digest, write_atomic

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Mark", "Shards", "stage_shards"]

_STOP = "stop"


@dataclass(frozen=True)
class Mark:
    """Which attempt at a table counts."""

    source: str
    """hash of the table that it was made of"""
    file: str
    size: int
    """bytes"""
    sha256: str
    rows: int


class Shards:
    """A folder of tables to work on and of what was made of them.

    Args:
        url: a path, or what fsspec takes for one (``s3://bucket/folder``). Keys and endpoints are the file system's own
            business: its environment variables, or fsspec's (``FSSPEC_S3_ENDPOINT_URL``).

    Raises:
        RecipeError: fsspec knows no such file system.
        MissingExtra: it needs a package that is not installed.
    """

    def __init__(self, url: str) -> None:
        core = require("fsspec.core", "ray")
        self.url = url
        try:
            self._fs, self._root = core.url_to_fs(url)
        except ImportError as error:
            raise MissingExtra(f"run.shards: {url} needs a package that is not installed: {error}") from error
        except ValueError as error:
            raise RecipeError(f"run.shards: {url} is on no file system that fsspec knows ({error})") from error
        protocols = self._fs.protocol
        self._local = "file" in ((protocols,) if isinstance(protocols, str) else protocols)
        if self._local:
            # Workers may stand in another folder.
            self.url = self._root

    def put(self, table: pa.Table, done: Container[str] = ()) -> str:
        """Keep a table to work on, unless it is done; returns its name, the hash of its content."""
        content = _to_bytes(table)
        source = _name(content)
        if source not in done:
            self._write(f"{source}.parquet", content)
        return source

    def take(self, source: str) -> pa.Table:
        """A table to work on.

        Raises:
            WorkspaceError: it is not there, or not what was put there.
        """
        content = self._read(f"{source}.parquet")
        if _name(content) != source:
            raise self._damaged(f"{source}.parquet")
        return _from_bytes(content)

    def begin(self, source: str, most: int) -> str:
        """Note that a worker begins with a table; returns the note, for :meth:`end`.

        Raises:
            RunError: so many workers have begun with it already, and none has ended.
        """
        for number in range(1, most + 1):
            note = f"{source}.{number}.begun"
            if not self._exists(note):
                self._write(note, b"\n")
                return note
        raise RunError(
            f"{most} workers died at shard {source}, one after another; if they lacked memory, set run.shard_rows or "
            "run.workers to less. What others had done is kept, and the same command goes on from there"
        )

    def end(self, note: str) -> None:
        """Take back what :meth:`begin` noted: the worker has not died."""
        self._delete(note)

    def attempt(self, source: str, table: pa.Table) -> Mark:
        """Write what was made of a table, under a name that no other attempt has. It does not count yet."""
        content = _to_bytes(table)
        name = f"{source}.{uuid.uuid4().hex[:12]}.parquet"
        self._write(name, content)
        return Mark(source, name, len(content), hashlib.sha256(content).hexdigest(), table.num_rows)

    def commit(self, mark: Mark) -> None:
        """Let an attempt count. One process does this, once for a source."""
        about = asdict(mark)
        self._write(f"{mark.source}.json", canonical({**about, "digest": digest(about)}))

    def marks(self) -> dict[str, Mark]:
        """Source -> the attempt that counts, where there is one and its file has its size.

        Raises:
            WorkspaceError: the folder cannot be read.
        """
        sizes = self._sizes()
        names = [name for name in sizes if name.endswith(".json")]
        # All at once, which object stores take far less time for.
        with self._errors("read"):
            contents = self._fs.cat([self._path(name) for name in names]) if names else {}
        marks = map(_parse, contents.values())
        return {mark.source: mark for mark in marks if mark is not None and sizes.get(mark.file) == mark.size}

    def read(self, mark: Mark) -> pa.Table:
        """What an attempt made.

        Raises:
            WorkspaceError: its bytes are not what it wrote.
        """
        content = self._read(mark.file)
        if hashlib.sha256(content).hexdigest() != mark.sha256:
            raise self._damaged(mark.file)
        return _from_bytes(content)

    def sweep(self, marks: Collection[Mark]) -> int:
        """Delete attempts that do not count, and notes; returns how many there were. No worker may be at work."""
        kept = {mark.file for mark in marks}
        left = [name for name in self._sizes() if name.count(".") >= 2 and name not in kept]
        for name in left:
            self._delete(name)
        return len(left)

    def stop(self) -> None:
        """Ask the workers to begin nothing new."""
        self._write(_STOP, b"\n")

    def resume(self) -> None:
        """Take :meth:`stop` back."""
        self._delete(_STOP)

    def stopped(self) -> bool:
        """Whether the workers are asked to begin nothing new."""
        return self._exists(_STOP)

    def remove(self) -> None:
        """Delete the folder, all that is in it included."""
        with self._errors("deleted"), suppress(FileNotFoundError):
            self._fs.rm(self._root, recursive=True)

    def _exists(self, name: str) -> bool:
        with self._errors("read"):
            self._fs.invalidate_cache()
            return bool(self._fs.exists(self._path(name)))

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name)

    def _sizes(self) -> dict[str, int]:
        with self._errors("read"):
            self._fs.invalidate_cache()
            try:
                entries = self._fs.ls(self._root, detail=True)
            except FileNotFoundError:
                return {}
        return {posixpath.basename(entry["name"]): entry["size"] for entry in entries if entry["type"] == "file"}

    def _write(self, name: str, content: bytes) -> None:
        path = self._path(name)
        if self._local:
            # Other file systems write an object whole or not at all, or leave one that its hash gives away.
            write_atomic(Path(path), content)
            return
        with self._errors("written"):
            self._fs.pipe_file(path, content)

    def _read(self, name: str) -> bytes:
        with self._errors("read"):
            content: bytes = self._fs.cat_file(self._path(name))
        return content

    def _delete(self, name: str) -> None:
        with self._errors("deleted"), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Each file system has exceptions of its own."""
        try:
            yield
        except AttarError:
            raise
        except Exception as error:
            raise WorkspaceError(
                f"run.shards: {self.url} cannot be {what} ({type(error).__name__}: {error}); every machine needs its "
                "address, keys and permissions"
            ) from error

    def _damaged(self, name: str) -> WorkspaceError:
        return WorkspaceError(
            f"{self.url}/{name} is damaged: it is not what was written; delete it and run the same command again"
        )


def stage_shards(recipe: Recipe, stage: str, folder: Path, fingerprint: Mapping[str, Any]) -> Shards:
    """The folder of a stage's shards: in ``run.shards`` where it is set, else in a folder of the stage's own.

    Args:
        recipe: the job.
        stage: its name.
        folder: the stage's own.
        fingerprint: all that decides what is made of a table: what was made under another one is not taken for it.
    """
    name = f"shards-{digest(dict(fingerprint))[:16]}"
    if recipe.run.shards is None:
        return Shards(str(folder / name))
    return Shards(posixpath.join(recipe.run.shards, recipe.name, stage, name))


def _parse(content: bytes) -> Mark | None:
    """A mark; None where it is not whole."""
    try:
        about: dict[str, Any] = json.loads(content)
        whole = about.pop("digest") == digest(about)
        return Mark(**about) if whole else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _to_bytes(table: pa.Table) -> bytes:
    parquet = require("pyarrow.parquet", "ray")
    content = io.BytesIO()
    parquet.write_table(table, content, compression="zstd")
    return content.getvalue()


def _from_bytes(content: bytes) -> pa.Table:
    return require("pyarrow.parquet", "ray").read_table(io.BytesIO(content))

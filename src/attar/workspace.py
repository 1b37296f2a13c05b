"""The run folder: manifest, fingerprints, atomic writes, lock.

A run folder holds everything that one recipe produced. ``manifest.json`` says, for each stage, from which part of the
recipe, which inputs and which version of the code its files came, so that a stage is run again exactly when one of
these changed. Every file is written under a temporary name, synced and renamed: a killed run leaves no half file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from attar.errors import NoSpaceError, WorkspaceError
from attar.progress import Progress, Silent

__all__ = [
    "Run",
    "append_synced",
    "canonical",
    "digest",
    "file_digest",
    "open_atomic",
    "open_run",
    "replace_folder",
    "write_atomic",
    "write_json",
]

MANIFEST_SCHEMA = 1
TEMPORARY_SUFFIX = ".partial"


def canonical(value: Any) -> bytes:
    """Bytes that are equal exactly when two JSON values are equal."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(canonical(value)).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"no space left while writing {path}; free some and run the same command again, it goes on from there"
            ) from error
        raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Write a file piece by piece so that it is either whole or not there: it gets its name when the block ends.

    Raises:
        NoSpaceError: the disk is full; what stood at ``path`` before is untouched.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_atomic(path: Path, content: bytes) -> None:
    """Write a whole file as :func:`open_atomic` does.

    Raises:
        NoSpaceError: the disk is full; what stood at ``path`` before is untouched.
    """
    with open_atomic(path) as handle:
        handle.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value atomically, keys in their own order, one trailing newline."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def append_synced(path: Path, content: bytes) -> None:
    """Add to the end of a file, which is made where there is none; on the disk when this returns.

    Raises:
        NoSpaceError: the disk is full; a part of the content may stand in the file.
    """
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("ab") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        if new:
            _sync_folder(path.parent)


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder so that it is either whole or not there: yields a temporary one and renames it at the end."""
    temporary = folder.with_name(folder.name + TEMPORARY_SUFFIX)
    with _disk_errors(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
        _sync_folder(folder.parent)


class Run:
    """An open run folder. Get one from :func:`open_run`."""

    def __init__(self, folder: Path, progress: Progress, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.progress = progress
        self._manifest = manifest

    def path(self, *parts: str) -> Path:
        """A path inside the run folder."""
        return self.folder.joinpath(*parts)

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """What the manifest holds of each stage that has ended."""
        stages: dict[str, dict[str, Any]] = self._manifest["stages"]
        return stages

    def _save(self) -> None:
        write_json(self.folder / "manifest.json", self._manifest)

    def fingerprint_file(self, path: Path) -> str:
        """SHA-256 of a file outside or inside the run; remembered by size and time of change, so that a large file
        is read once.
        """
        memory: dict[str, list[Any]] = self._manifest["files"]
        status = path.stat()
        key = str(path.resolve())
        known = memory.get(key)
        if known and known[:2] == [status.st_size, status.st_mtime_ns]:
            return str(known[2])
        value = file_digest(path)
        memory[key] = [status.st_size, status.st_mtime_ns, value]
        return value

    def fingerprint_path(self, path: Path) -> str:
        """SHA-256 over the names and contents of a file or of all files of a folder."""
        if path.is_file():
            return self.fingerprint_file(path)
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return digest({str(p.relative_to(path)): self.fingerprint_file(p) for p in files})

    def outputs_of(self, stage: str) -> dict[str, str]:
        """Path -> SHA-256 of what a finished stage wrote."""
        outputs: dict[str, str] = self.stages[stage]["outputs"]
        return outputs

    def changes(self, stage: str, fingerprint: Mapping[str, Any]) -> list[str]:
        """Why a stage has to run: empty if it need not."""
        done = self.stages.get(stage)
        if done is None:
            return ["not done yet"]
        reasons = [
            f"{key}: {_short(done['fingerprint'][part].get(key))} -> {_short(fingerprint[part].get(key))}"
            for part in ("recipe", "inputs")
            for key in sorted({*done["fingerprint"][part], *fingerprint[part]})
            if done["fingerprint"][part].get(key) != fingerprint[part].get(key)
        ]
        if done["fingerprint"]["version"] != fingerprint["version"]:
            reasons.append(f"attar {done['fingerprint']['version']} -> {fingerprint['version']}")
        for name, expected in done["outputs"].items():
            path = self.folder / name
            if not path.is_file():
                reasons.append(f"{name} is gone")
            elif self.fingerprint_file(path) != expected:
                reasons.append(f"{name} was changed by hand")
        return reasons

    def begin(self, stage: str, fingerprint: Mapping[str, Any], folders: Iterable[str]) -> bool:
        """Prepare a stage's folders; True if it goes on with work that was cut off under the same fingerprint."""
        value = digest(fingerprint)
        resumed: bool = self._manifest["begun"].get(stage) == value
        if not resumed:
            self.stages.pop(stage, None)
            # First forget, then delete: a kill in between leaves files that nothing believes in.
            self._manifest["begun"].pop(stage, None)
            self._save()
            for name in folders:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            self._manifest["begun"][stage] = value
            self._save()
        return resumed

    def finish(
        self,
        stage: str,
        fingerprint: Mapping[str, Any],
        folders: Iterable[str],
        counts: Mapping[str, Any],
        started: float,
    ) -> None:
        """Record a stage as done, with the hashes of everything in its folders."""
        outputs = {
            str(path.relative_to(self.folder)): self.fingerprint_file(path)
            for name in folders
            for path in sorted((self.folder / name).rglob("*"))
            if path.is_file()
        }
        self.stages[stage] = {
            "fingerprint": dict(fingerprint),
            "outputs": outputs,
            "counts": dict(counts),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(time.time() - started, 3),
        }
        self._manifest["begun"].pop(stage, None)
        self._save()


def _short(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:12] + "…" + text[-12:]


def _read_manifest(path: Path, name: str) -> dict[str, Any]:
    empty = {"schema": MANIFEST_SCHEMA, "name": name, "stages": {}, "begun": {}, "files": {}}
    if not path.exists():
        return empty
    try:
        manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
        schema, owner = manifest["schema"], manifest["name"]
        complete = all(isinstance(manifest[key], dict) for key in ("stages", "begun", "files"))
    except (ValueError, KeyError, TypeError) as error:
        raise WorkspaceError(
            f"{path} is damaged ({error}); nothing was changed. Delete it to run every stage again in this folder, "
            "or restore it from a copy"
        ) from error
    if schema != MANIFEST_SCHEMA or not complete:
        raise WorkspaceError(
            f"{path} has schema {schema!r}, this attar reads {MANIFEST_SCHEMA}; use another run.folder"
        )
    if owner != name:
        raise WorkspaceError(
            f"{path.parent} belongs to the recipe {owner!r}, this one is {name!r}; set run.folder to another folder"
        )
    return manifest


@contextmanager
def open_run(folder: Path, name: str, progress: Progress | None = None) -> Iterator[Run]:
    """Open (or make) a run folder for the recipe called ``name`` and hold its lock.

    Raises:
        WorkspaceError: another process works in the folder, it belongs to another recipe, or its manifest is damaged.
        NoSpaceError: the disk is full.
    """
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise WorkspaceError(f"another run is at work in {folder}; wait for it or set run.folder to another") from error
    try:
        for leftover in folder.rglob("*" + TEMPORARY_SUFFIX):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield Run(folder, progress or Silent(), _read_manifest(folder / "manifest.json", name))
    finally:
        lock.release()

"""The user's files -> data/{train,val,...,test}.jsonl, a data card, and a list of what was dropped and why.

Three passes, none of which holds the rows in memory: parts of the files are parsed, filtered and stored in parallel;
what compares rows with each other works on numbers of them; what stays is written in its order.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attar.cluster.shards import Shards, stage_shards
from attar.collect.card import Card, write_card
from attar.collect.comparing import Comparison
from attar.collect.origin import counted, models, require_acknowledged
from attar.collect.reading import TRAINED, UNIT, Batch, Context, Unit, files_of, read, units
from attar.collect.splitting import hold_out
from attar.collect.spread import Reading, reading_fingerprint, spread_reading
from attar.collect.tables import Indices, Table
from attar.collect.workers import Map, ordered
from attar.errors import DataError
from attar.progress import Progress, Silent, track
from attar.recipe import ChatRecipe, ClassifyRecipe
from attar.workspace import TEMPORARY_SUFFIX, Run, open_atomic

__all__ = ["CARD", "DROPPED", "curate", "preview"]

DROPPED = "dropped.jsonl"
CARD = "README.md"
# Fewer bytes are not worth the start of processes.
_ALONE = 32 << 20
_LINES = 4096

AnyRecipe = ChatRecipe | ClassifyRecipe


def curate(recipe: AnyRecipe, run: Run) -> dict[str, Any]:
    """Read, check, filter and split.

    Raises:
        DataError: a file cannot be used, or there is too little to hold any out.
        PreflightRefused: a test case stands in what is trained on, and the recipe wants a refusal; or rows name a model
            whose terms restrict training on its answers, and the recipe does not acknowledge that.
    """
    folder = run.path("data")
    shards = None
    if recipe.run.on == "ray":
        shards = stage_shards(recipe, "curate", folder, reading_fingerprint(recipe))
    counts = _curated(recipe, folder, run.progress, shards)
    if shards is not None:
        shards.remove()
    return counts


@contextmanager
def preview(recipe: AnyRecipe) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Curate into a folder that is gone when the block ends; yields it, and the counts.

    Raises:
        DataError, PreflightRefused: as :func:`curate`.
    """
    with tempfile.TemporaryDirectory(prefix="attar-") as folder:
        yield Path(folder), _curated(recipe, Path(folder), Silent())


def _files(recipe: AnyRecipe) -> dict[str, Path]:
    """The user's files by their keys, in the order in which they are read."""
    keys = ("train", "val", "test") if isinstance(recipe, ChatRecipe) else ("pool", "dev", "calibration", "test")
    found = {key: getattr(recipe.data, key) for key in keys}
    return {key: path for key, path in found.items() if path is not None}


def _sizes(recipe: AnyRecipe, files: dict[str, Path]) -> dict[str, int]:
    """What is held out of the file that is trained on."""
    if isinstance(recipe, ClassifyRecipe):
        return {"val": recipe.curate.val_size}
    settings = recipe.curate
    sizes = {"val": settings.val_size, "test": settings.test_size, "calibration": settings.calibration_size}
    return {name: size for name, size in sizes.items() if name not in files and size}


def _curated(recipe: AnyRecipe, folder: Path, progress: Progress, shards: Shards | None = None) -> dict[str, Any]:
    parts = folder / ("parts" + TEMPORARY_SUFFIX)
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    try:
        files = _files(recipe)
        size = sum(file.stat().st_size for key, path in files.items() for file in files_of(key, path))
        workers = 0 if size < _ALONE else recipe.run.threads or os.cpu_count() or 1
        with ExitStack() as stack:
            each = stack.enter_context(ordered((Context, (recipe, parts)), workers))
            reading = _reading_here(each)
            if workers and shards is not None:
                reading = stack.enter_context(spread_reading(recipe, parts, shards))
            return _passes(recipe, folder, parts, files, reading, each, progress)
    finally:
        shutil.rmtree(parts, ignore_errors=True)
        # Where nothing was written, nothing is left.
        with suppress(OSError):
            folder.rmdir()


def _reading_here(each: Map) -> Reading:
    def reading(parts_of_files: Iterable[Unit]) -> Generator[Batch]:
        yield from each((read, (unit,)) for unit in parts_of_files)

    return reading


def _passes(
    recipe: AnyRecipe,
    folder: Path,
    parts: Path,
    files: dict[str, Path],
    reading: Reading,
    each: Map,
    progress: Progress,
) -> dict[str, Any]:
    redacted: Counter[str] = Counter()
    tables = _first_pass(files, parts, reading, progress, redacted)
    if isinstance(recipe, ClassifyRecipe):
        _require_two_labels(tables["test"])
    pool = tables[next(key for key in TRAINED if key in tables)]
    context = Context(recipe, parts, -1)
    try:
        compared = Comparison(recipe, tables, pool, context, each)
        compared.alone()
        splits = _held_out(recipe, pool, _sizes(recipe, files))
        splits["train"] = compared.with_test(splits["train"], splits.get("test"))
        _require_enough(recipe, splits)
        chosen = _chosen(recipe, tables, pool, splits)
        learned = [part for name, part in chosen.items() if name in ("train", "val")]
        card = Card(models=models(learned), sources=counted(learned, "source"), redacted=dict(redacted))
        require_acknowledged(recipe, card.models)
        return _write(recipe, folder, context, chosen, tables, card)
    finally:
        context.close()


def _first_pass(
    files: dict[str, Path], parts: Path, reading: Reading, progress: Progress, redacted: Counter[str]
) -> dict[str, Table]:
    """Read the files of all keys, in one go: workers are not started anew for each.

    Raises:
        DataError: a row cannot be used, or none of a key can.
    """
    pending: deque[Unit] = deque()

    def remembered() -> Iterator[Unit]:
        for key, path in files.items():
            for unit in units(key, path):
                # Not its rows, which may be read far ahead.
                pending.append(replace(unit, rows=(), table=None))
                yield unit

    tables = {}
    with closing(reading(remembered())) as batches:
        by_key = groupby(((pending.popleft(), batch) for batch in batches), lambda pair: pair[0].key)
        found = next(by_key, None)
        for key, path in files.items():
            # An empty file has no part.
            own = found[1] if found is not None and found[0] == key else iter(())
            tables[key] = _filled(Table(key, files_of(key, path), parts / f"{key}.dropped"), own, progress, redacted)
            if not len(tables[key].rows):
                counted = f" ({dict(tables[key].counts)} dropped)" if tables[key].counts else ""
                raise DataError(f"data.{key}: {path} holds no usable row{counted}")
            found = next(by_key, None)
    return tables


def _filled(table: Table, pairs: Iterator[tuple[Unit, Batch]], progress: Progress, redacted: Counter[str]) -> Table:
    """The table, with what is left of its files."""
    size = sum(file.stat().st_size for file in table.files)
    batches: list[Batch] = []
    base, file = 0, 0
    with (
        table.spool.open("w", encoding="utf-8") as spool,
        track(progress, f"read {table.key}", -(-size // UNIT)) as step,
    ):
        for unit, batch in pairs:
            if unit.file != file:
                base, file = 0, unit.file
            first = base if unit.end else 0
            if batch.stop is not None:
                line, message = batch.stop
                raise DataError(f"data.{table.key}: {unit.path.name} line {line + first}: {message}")
            for drop in batch.dropped:
                table.counts[drop.reason] += 1
                record = [unit.file, drop.line + first, drop.id, drop.reason, drop.detail]
                spool.write(json.dumps(record, ensure_ascii=False) + "\n")
            batch.rows["line"] += np.uint64(first)
            base += batch.lines
            redacted += batch.redacted
            table.names |= batch.names
            batches.append(batch)
            step.advance()
    table.fill(batches)
    return table


def _require_two_labels(test: Table) -> None:
    labels = np.unique(test.rows["label"])
    if len(labels) < 2:
        only = test.names[int(labels[0])]
        raise DataError(f"data.test: every case has the label {only!r}; an accuracy on one class shows nothing")


def _held_out(recipe: AnyRecipe, pool: Table, sizes: dict[str, int]) -> dict[str, Indices]:
    """Rows of the pool by split.

    Raises:
        DataError: there are too few.
    """
    indices = pool.indices
    settings = recipe.curate
    if isinstance(recipe, ClassifyRecipe) and len(indices) < 2 * sizes["val"]:
        raise DataError(
            f"data.pool: {len(indices)} different requests are too few for curate.val_size {sizes['val']}; "
            f"add requests or set curate.val_size to at most {len(indices) // 2}"
        )
    splits = hold_out(
        pool.rows[indices],
        sizes,
        by=settings.split.by,
        seed=recipe.run.seed,
        order="file" if isinstance(recipe, ClassifyRecipe) else "shuffled",
    )
    return {name: indices[chosen] for name, chosen in splits.items()}


def _require_enough(recipe: AnyRecipe, splits: dict[str, Indices]) -> None:
    held = sum(len(rows) for name, rows in splits.items() if name != "train")
    if isinstance(recipe, ChatRecipe) and (len(splits["train"]) < held or not len(splits["train"])):
        raise DataError(
            f"data.train: holding {held} conversations out leaves {len(splits['train'])} to learn from; add some, or "
            "lower curate.val_size, curate.test_size and curate.calibration_size"
        )


def _lines(context: Context, rows: NDArray[Any]) -> Iterator[bytes]:
    places = zip(rows["worker"].tolist(), rows["start"].tolist(), rows["size"].tolist(), strict=True)
    for worker, start, size in places:
        yield context.pread(f"{worker}.jsonl", start, size)


def _chosen(
    recipe: AnyRecipe, tables: dict[str, Table], pool: Table, splits: dict[str, Indices]
) -> dict[str, tuple[Table, Indices]]:
    """The rows of every split that the task has."""
    names: tuple[str, ...] = ("train", "val", "dev", "calibration", "test")
    if isinstance(recipe, ChatRecipe):
        names = tuple(name for name in names if name in splits or name in tables)
    own = {name: (table, table.indices) for name, table in tables.items()}
    return {name: (pool, splits[name]) if name in splits else own.get(name, (pool, pool.indices[:0])) for name in names}


def _write(
    recipe: AnyRecipe,
    folder: Path,
    context: Context,
    chosen: dict[str, tuple[Table, Indices]],
    tables: dict[str, Table],
    card: Card,
) -> dict[str, Any]:
    """Write every split, what was dropped, and the card."""
    for name, (table, indices) in chosen.items():
        rows = table.rows[indices]
        card.sizes[name] = len(rows)
        card.hashes[name] = _write_lines(folder / f"{name}.jsonl", _lines(context, rows))
        if recipe.curate.split.by == "time" and table.key in TRAINED and len(rows):
            card.times[name] = (float(rows["time"].min()), float(rows["time"].max()))
    with open_atomic(folder / DROPPED) as handle:
        for table in tables.values():
            for drop in table.dropped():
                handle.write((json.dumps(drop, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
    for key, table in tables.items():
        card.dropped |= {f"{reason} ({key})": n for reason, n in table.counts.items()}
        card.read[key] = len(table.rows) + sum(table.counts.values()) - int((~table.kept).sum())
    write_card(folder / CARD, recipe, card)
    told = {"redacted": card.redacted, "models": {model.name: model.rows for model in card.models}}
    return {**card.sizes, "dropped": card.dropped} | {key: counts for key, counts in told.items() if counts}


def _write_lines(path: Path, lines: Iterator[bytes]) -> str:
    """Write a split; its SHA-256."""
    digest = hashlib.sha256()
    with open_atomic(path) as handle:
        while waiting := list(islice(lines, _LINES)):
            content = b"".join(waiting)
            digest.update(content)
            handle.write(content)
    return digest.hexdigest()

"""`attar curate` by two workers of a Ray cluster, one killed in mid-run: byte for byte the files of one process."""

import csv
import os
import random
import signal
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from attar.collect import curate, reading, spread
from attar.collect.reading import ROWS, Batch, Dropped, Unit
from attar.errors import DataError
from clusters import WARNINGS
from curating import chat, classify, curated, sentence, talk, talks

pytestmark = WARNINGS
RAY = {"on": "ray", "workers": 2, "threads": 1}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Parts of some rows, and a cluster for any number of them."""
    monkeypatch.setattr(reading, "UNIT", 2000)
    monkeypatch.setattr(reading, "_TABLE_ROWS", 7)


@dataclass(frozen=True)
class MortalWork(spread.ReadWork):
    """The same work, but one worker dies at its second shard."""

    def open(self, threads):
        work, begun = super().open(threads), []
        died = Path(self.recipe.run.folder).parent / "died"

        def mortal(table):
            begun.append(table)
            if len(begun) == 2 and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return work(table)

        return mortal


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def many_of(recipe, monkeypatch, shards):
    """The same recipe by workers, of whom one dies; its counts and its folder."""
    monkeypatch.setattr(curate, "_ALONE", 0)
    monkeypatch.setattr(spread, "ReadWork", MortalWork)
    run = recipe.run.model_copy(update={**RAY, "folder": recipe.folder.parents[1] / "many", "shards": shards})
    return curated(recipe.model_copy(update={"run": run}))


def test_splits_drops_and_card_are_those_of_one_process_though_a_worker_is_killed(
    cluster, bucket, tmp_path, monkeypatch
):
    rng = random.Random(1)
    rows = talks(60)
    rows[7] = rows[3]
    rows[20] = talk(rows[4]["messages"][0]["content"], rows[4]["messages"][1]["content"] + " copper")
    rows[25] = talk("write to me", "at jo@example.org, key sk-" + "a1B2" * 10)
    rows[30] = {"messages": []}
    rows[31] = talk("büro 東京", "ünïcode ﬀ")
    test = talks(8, seed=5)
    rows[40] = talk(test[2]["messages"][0]["content"], sentence(rng, 20))
    settings = {
        "near_duplicates": {"threshold": 0.8},
        "private": {"emails": "redact"},
        "balance": {"source_key": "source", "per_source": 50},
        "val_size": 5,
        "calibration_size": 3,
    }
    recipe = chat(tmp_path, rows, test, {"on_bad_line": "skip"}, **settings)
    (tmp_path / "train.jsonl").open("a").write("no json\n\n")
    shards = f"{bucket}/{uuid.uuid4().hex}"
    counts, one = curated(recipe)
    found, many = many_of(recipe, monkeypatch, shards)
    assert (tmp_path / "died").exists()
    assert found == counts
    assert {"duplicate (train)", "near duplicate (train)", "leak (train)", "malformed (train)"} <= set(found["dropped"])
    assert found["redacted"] == {"email": 1, "key": 1}
    assert files_of(many) == files_of(one)
    # What was on its way is gone.
    assert s3fs.S3FileSystem().find(shards, withdirs=False, refresh=True) == []


def test_tables_go_out_and_come_back_as_they_are(cluster, tmp_path, monkeypatch):
    rng = random.Random(2)
    start = datetime(2026, 1, 1, tzinfo=UTC)
    texts = [sentence(rng, 4) for _ in range(30)]
    folder = tmp_path / "pool"
    folder.mkdir()
    times = [start + timedelta(days=n) for n in range(30)]
    pq.write_table(pa.table({"text": texts[:15], "at": times[:15], "user": list(range(15))}), folder / "a.parquet")
    with (folder / "b.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["text", "at", "user"])
        writer.writerows(
            [t, at.isoformat(), "u", "beyond the header"] for t, at in zip(texts[15:], times[15:], strict=True)
        )
    split = {"by": "time", "time_key": "at", "group_key": "user"}
    recipe = classify(tmp_path, [], data={"pool": "pool"}, split=split)
    counts, one = curated(recipe)
    found, many = many_of(recipe, monkeypatch, None)
    assert (tmp_path / "died").exists()
    assert found == counts
    assert found["train"] + found["val"] == 30
    assert files_of(many) == files_of(one)


def test_a_row_that_ends_the_run_ends_it_with_its_line(cluster, tmp_path, monkeypatch):
    rows = talks(40)
    recipe = chat(tmp_path, [*rows[:33], {"messages": "none"}, *rows[33:]])
    with pytest.raises(DataError) as alone:
        curated(recipe)
    with pytest.raises(DataError) as spread_out:
        many_of(recipe, monkeypatch, None)
    assert str(spread_out.value) == str(alone.value)
    assert "train.jsonl line 34:" in str(alone.value)


def test_few_rows_are_read_here(tmp_path, monkeypatch):
    recipe = chat(tmp_path, talks(20))
    run = recipe.run.model_copy(update=RAY)
    monkeypatch.setattr(curate, "spread_reading", None)
    assert curated(recipe.model_copy(update={"run": run}))[0]["train"] == 16


def test_a_part_of_a_file_and_what_is_left_of_it_survive_as_tables():
    beyond = Unit("pool", 3, Path("/x/a.csv"), rows=((2, {"text": "a", None: ["b", "c"]}), (3, {"text": None})))
    assert spread.unit_of(spread.unit_table(beyond)) == beyond
    rows = np.zeros(2, ROWS)
    rows["id"] = [2**64 - 1, 5]
    batch = Batch(4, rows, np.arange(6, dtype=np.uint16).reshape(2, 3), [Dropped(1, None, "r", "d\ud800")], (4, "m"))
    batch.names = {2**64 - 1: "n"}
    batch.redacted.update({"key": 2})
    again, lines, words = spread.batch_of(spread.batch_table(batch, b"l\n", b"wwww"))
    assert (lines, words) == (b"l\n", b"wwww")
    for field in ("rows", "signatures"):
        assert np.array_equal(getattr(again, field), getattr(batch, field))
    for field in ("lines", "dropped", "stop", "redacted", "names"):
        assert getattr(again, field) == getattr(batch, field)
    empty = spread.batch_of(spread.batch_table(Batch(), b"", b""))[0]
    assert (empty.rows.shape, empty.signatures.shape, empty.stop) == ((0,), (0, 0), None)

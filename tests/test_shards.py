"""Shards in a folder: an attempt counts once its mark is whole, on a disk and on an object store."""

import json
import uuid

import numpy as np
import pyarrow as pa
import pytest

from attar.cluster.shards import Shards, stage_shards
from attar.errors import RecipeError, RunError, WorkspaceError
from attar.recipe import load_recipe
from attar.signals.tables import examples_of, examples_table, records_of, records_table
from attar.tokens import TokenizedExample


@pytest.fixture(params=["disk", "objects"])
def shards(request, tmp_path):
    # fsspec's memory is a store without renames, as S3 is.
    made = Shards(str(tmp_path / "shards") if request.param == "disk" else f"memory://{uuid.uuid4().hex}/shards")
    yield made
    made.remove()
    assert made.marks() == {}


def table(*values):
    return pa.table({"id": [str(value) for value in values], "value": list(values)})


def names(shards):
    return sorted(shards._sizes())


def test_a_table_comes_back_and_an_attempt_counts_once_it_is_marked(shards):
    source = shards.put(table(1, 2))
    assert shards.put(table(1, 2)) == source
    assert names(shards) == [f"{source}.parquet"]
    assert shards.take(source).equals(table(1, 2))
    mark = shards.attempt(source, table(1, 4))
    other = shards.attempt(source, table(1, 4))
    assert mark.file != other.file
    assert shards.marks() == {}
    shards.commit(mark)
    assert shards.marks() == {source: mark}
    assert shards.read(mark).equals(table(1, 4))
    assert shards.sweep([mark]) == 1
    assert names(shards) == sorted([f"{source}.parquet", f"{source}.json", mark.file])


def test_a_done_table_is_not_written_again(shards):
    source = shards.put(table(1), done=())
    shards._delete(f"{source}.parquet")
    assert shards.put(table(1), done={source}) == source
    assert names(shards) == []


def test_half_a_mark_is_none_and_a_mark_without_its_file_is_none(shards):
    whole, half, alone = (shards.put(table(n)) for n in range(3))
    marks = {source: shards.attempt(source, table(9)) for source in (whole, half, alone)}
    for mark in marks.values():
        shards.commit(mark)
    content = shards._read(f"{half}.json")
    shards._write(f"{half}.json", content[: len(content) // 2])
    shards._delete(marks[alone].file)
    assert set(shards.marks()) == {whole}
    # A mark that was written over in part is none either.
    about = json.loads(shards._read(f"{whole}.json"))
    shards._write(f"{whole}.json", json.dumps({**about, "rows": 2}).encode())
    assert shards.marks() == {}


def test_damaged_bytes_are_named(shards):
    source = shards.put(table(1, 2))
    mark = shards.attempt(source, table(1))
    shards._write(mark.file, bytes(mark.size))
    with pytest.raises(WorkspaceError, match="damaged"):
        shards.read(mark)
    shards._write(f"{source}.parquet", b"something else")
    with pytest.raises(WorkspaceError, match=f"{source}.parquet is damaged"):
        shards.take(source)


def test_workers_that_died_at_a_table_are_counted(shards):
    source = shards.put(table(1))
    shards.end(shards.begin(source, 2))
    assert names(shards) == [f"{source}.parquet"]
    assert shards.begin(source, 2) != shards.begin(source, 2)
    with pytest.raises(RunError, match=r"2 workers died at shard .* set run\.shard_rows"):
        shards.begin(source, 2)
    assert shards.sweep([]) == 2
    shards.begin(source, 1)


def test_workers_are_asked_to_stop_and_to_go_on(shards):
    assert not shards.stopped()
    shards.stop()
    assert shards.stopped()
    shards.resume()
    shards.resume()
    assert not shards.stopped()


def test_a_place_that_is_none(tmp_path):
    with pytest.raises(RecipeError, match="no file system that fsspec knows"):
        Shards("nowhere://x")
    (tmp_path / "file").write_text("")
    with pytest.raises((WorkspaceError, OSError), match="file"):
        Shards(str(tmp_path / "file/shards")).put(table(1))


def test_records_and_examples_go_through_tables_unchanged():
    examples = [
        TokenizedExample("a", np.array([1, 2, 3], np.int32), np.array([False, True, True])),
        TokenizedExample("b/1", np.array([5, 6], np.int32), np.array([False, False])),
    ]
    for example, back in zip(examples, examples_of(examples_table(examples)), strict=True):
        assert example.id == back.id
        np.testing.assert_array_equal(example.ids, back.ids, strict=True)
        np.testing.assert_array_equal(example.supervised, back.supervised, strict=True)
    records = [
        {"codes": np.arange(3, dtype=np.uint8), "states": np.ones((2, 4), np.float16), "none": np.empty((0, 5))},
        {"codes": np.empty(0, dtype=np.uint8), "states": np.full((1, 4), -2, np.float16), "none": np.ones((1, 5))},
    ]
    ids, back, tokens = records_of(records_table(["x", "y"], records, 7))
    assert (ids, tokens) == (["x", "y"], 7)
    for record, other in zip(records, back, strict=True):
        assert list(record) == list(other)
        for name, array in record.items():
            np.testing.assert_array_equal(array, other[name], strict=True)


RECIPE = """
name: job
task: chat
teacher: {model: "hf:teacher"}
data: {train: conversations.jsonl}
run: {RUN}
"""


def recipe(tmp_path, run, *changes):
    (tmp_path / "attar.yaml").write_text(RECIPE.replace("RUN", run))
    return load_recipe(tmp_path / "attar.yaml", list(changes))


def test_the_recipe_says_where_the_workers_are(tmp_path):
    assert recipe(tmp_path, "seed: 1").run.on == "here"
    for address in ("local", "auto", "10.0.0.1:6379", "head.cluster:6379"):
        found = recipe(tmp_path, f"on: ray, address: '{address}', workers: 3, shard_rows: 7").run
        assert (found.on, found.address, found.workers, found.shard_rows) == ("ray", address, 3, 7)
    assert recipe(tmp_path, "seed: 1", "run={on: ray, workers: 2}").run.workers == 2
    assert recipe(tmp_path, "on: ray", "run.on=here").run.on == "here"


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("on: spark", "run.on: 'spark' is not allowed"),
        ("workers: 2", "run.workers belongs to `run.on: ray`"),
        ("address: auto", "run.address belongs"),
        ("shards: s3://b/f", "run.shards belongs"),
        ("on: ray, address: ray://head:10001", "run.address"),
        ("on: ray, workers: 0", "run.workers"),
        ("yes: 1", "run.yes: unknown key"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, run, message):
    with pytest.raises(RecipeError, match=message) as error:
        recipe(tmp_path, run)
    assert "\n" not in str(error.value)


def test_shards_stand_in_the_run_folder_or_where_the_recipe_says(tmp_path):
    (tmp_path / "own").mkdir()
    here = recipe(tmp_path, "on: ray")
    assert stage_shards(here, "score", tmp_path / "own", {"a": 1}).url.startswith(str(tmp_path / "own/shards-"))
    local = recipe(tmp_path, "on: ray, shards: ./all")
    assert stage_shards(local, "score", tmp_path / "own", {"a": 1}).url.startswith(str(tmp_path / "all/job/score/"))
    remote = recipe(tmp_path, "on: ray, shards: memory://bucket/x")
    one, two = (stage_shards(remote, "score", tmp_path / "own", {"a": n}).url for n in (1, 2))
    assert one.startswith("memory://bucket/x/job/score/shards-")
    assert one != two

"""Files to splits: what is kept, in which order, and where."""

import json
import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml

from attar import pipeline
from attar.collect import curate as curating_stage
from attar.collect import reading
from attar.collect.rows import asked, encoded
from attar.collect.splitting import hold_out
from attar.data.conversations import parse_conversation, read_conversations, write_conversations
from attar.data.files import write_examples
from attar.data.types import Example
from attar.errors import DataError, PreflightRefused, RecipeError, RunError
from attar.workspace import open_run
from curating import WORDS, chat, classify, curated, reasons, rows_of, sentence, talk, talks, write

TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


def ids(folder, name):
    return [row["id"] for row in rows_of(folder / f"{name}.jsonl")]


def test_a_line_is_the_one_that_write_conversations_writes(tmp_path):
    call = {"id": "c", "type": "function", "function": {"name": "find", "arguments": '{"z": 1.0, "ä": [1e400, null]}'}}
    rows = [
        talk("Grüße 👍", "ok"),
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "find it"},
                {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"},
                {"role": "tool", "tool_call_id": "c", "content": "12345678901234567890123"},
                {"role": "assistant", "content": "there", "train": False},
            ],
            "tools": [TOOL | {"b": 12345678901234567890123, "a": 0.1}],
            "group": "g",
        },
    ]
    conversations = [parse_conversation(row) for row in rows]
    write_conversations(tmp_path / "a.jsonl", conversations)
    assert (tmp_path / "a.jsonl").read_bytes() == b"".join(encoded(c)[1] for c in conversations)
    assert [encoded(c)[0] for c in conversations] == [c.id for c in conversations]
    examples = [Example("ü ", None), Example("x", "yes")]
    write_examples(tmp_path / "b.jsonl", examples)
    assert (tmp_path / "b.jsonl").read_bytes() == b"".join(encoded(e)[1] for e in examples)


def held_before(conversations, seed, sizes):
    """The rule that splits of conversations have always had."""
    groups = {}
    for conversation in conversations:
        groups.setdefault(conversation.group or asked(conversation), []).append(conversation)
    order = list(groups)
    random.Random(seed).shuffle(order)
    splits = {}
    for name, size in sizes.items():
        splits[name] = []
        while order and len(splits[name]) < size:
            splits[name] += groups.pop(order.pop())
    return {**splits, "train": [c for key in order for c in groups[key]]}


def test_conversations_are_split_as_they_always_were(tmp_path):
    rng = random.Random(1)
    rows = [talk(sentence(rng, rng.randint(1, 2)), sentence(rng, 30)) for _ in range(120)]
    for n in range(0, 120, 3):
        rows[n]["messages"][0]["content"] += f" of its own {n}"
        rows[n]["group"] = f"g{n % 7}"
    recipe = chat(tmp_path, rows, val_size=9, test_size=14)
    wanted = held_before([parse_conversation(row) for row in rows], 0, {"val": 9, "test": 14})
    counts, folder = curated(recipe)
    assert counts["dropped"] == {}
    for name, conversations in wanted.items():
        assert ids(folder, name) == [c.id for c in conversations]
    kept, _ = read_conversations(folder / "train.jsonl", key="data.train", on_bad_line="stop")
    assert kept == wanted["train"]


def test_requests_are_split_as_they_always_were(tmp_path):
    pool = [{"text": f"request {word} {n}"} for n, word in enumerate(WORDS * 6)]
    pool.insert(5, {"text": pool[0]["text"].upper() + "!"})
    _, folder = curated(classify(tmp_path, pool, val_size=20))
    texts = [row["text"] for row in pool if row["text"] != pool[5]["text"]]
    order = list(range(len(texts)))
    random.Random(0).shuffle(order)
    held = set(order[:20])
    assert [row["text"] for row in rows_of(folder / "train.jsonl")] == [t for i, t in enumerate(texts) if i not in held]
    assert [row["text"] for row in rows_of(folder / "val.jsonl")] == [t for i, t in enumerate(texts) if i in held]
    assert (folder / "dev.jsonl").read_text() == ""
    assert reasons(folder) == {"duplicate": [6]}


def test_parts_and_processes_change_nothing(tmp_path, monkeypatch):
    rows = talks(90) + talks(90)[::-1]
    rows[50]["messages"][1]["content"] = rows[10]["messages"][1]["content"] + " anchor"
    rows[50]["messages"][0] = rows[10]["messages"][0]
    recipe = chat(tmp_path, rows, data={"on_bad_line": "skip"})
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + path.read_bytes().replace(b"\n", b"\n\n") + b"{oops\n")
    _, folder = curated(recipe)
    alone = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert reasons(folder)["malformed"] == [2 + 2 * 180]
    monkeypatch.setattr(reading, "UNIT", 700)
    _, folder = curated(recipe)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == alone
    monkeypatch.setattr(curating_stage, "_ALONE", 0)
    _, folder = curated(recipe.model_copy(update={"run": recipe.run.model_copy(update={"threads": 2})}))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == alone


def test_a_worker_that_dies_and_one_that_fails(tmp_path, monkeypatch):
    recipe = chat(tmp_path, talks(30))
    monkeypatch.setattr(curating_stage, "_ALONE", 0)
    real = os.environ.get("PYTHONPATH", "")
    monkeypatch.setattr("attar.collect.workers._COMMAND", "import sys; sys.exit(3)")
    with pytest.raises(RunError, match=r"died \(exit code 3\).*run.threads"):
        curated(recipe)
    monkeypatch.undo()
    monkeypatch.setenv("PYTHONPATH", real)
    monkeypatch.setattr(curating_stage, "_ALONE", 0)
    (tmp_path / "train.jsonl").write_bytes(b'{"messages": "caf\xe9"}\n')
    with pytest.raises(DataError, match="is not UTF-8"):
        curated(recipe)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_folder_of_files_is_read_in_the_order_of_names(tmp_path):
    rows = talks(12)
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw/b.jsonl", rows[:6])
    write(tmp_path / "raw/a.jsonl", [*rows[6:], rows[6]])
    recipe = chat(tmp_path, [], data={"train": "raw"})
    _, folder = curated(recipe)
    both = ids(folder, "train") + ids(folder, "val") + ids(folder, "test")
    assert sorted(both) == sorted(parse_conversation(row).id for row in rows)
    (drop,) = rows_of(folder / "dropped.jsonl")
    assert (drop["file"], drop["line"]) == ("a.jsonl", 7)
    assert pipeline.plan(recipe, "curate")[0].reasons
    pipeline.run(recipe, until="curate")
    assert not pipeline.plan(recipe, "curate")[0].reasons
    write(tmp_path / "raw/c.jsonl", talks(2, seed=9))
    assert pipeline.plan(recipe, "curate")[0].reasons
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none holds no \.jsonl"):
        curated(chat(tmp_path, [], data={"train": "none"}))


def test_parquet_is_read_in_pieces_and_its_rows_are_numbered(tmp_path, monkeypatch):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = talks(9)
    parquet.write_table(arrow.Table.from_pylist([*rows, rows[3]]), tmp_path / "train.parquet")
    monkeypatch.setattr(reading, "_TABLE_ROWS", 2)
    _, folder = curated(chat(tmp_path, [], data={"train": "train.parquet"}))
    assert reasons(folder) == {"duplicate": [10]}


def test_the_first_bad_line_stops_with_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "UNIT", 300)
    recipe = chat(tmp_path, [*talks(20), {"messages": []}, *talks(3)])
    with pytest.raises(DataError, match=r"data.train: train.jsonl line 21: messages is .*on_bad_line: skip"):
        curated(recipe)
    assert not (recipe.folder / "data/train.jsonl").exists()


def test_groups_stay_together_and_every_row_must_have_one_if_asked(tmp_path):
    rows = talks(40)
    for n, row in enumerate(rows):
        row["user"] = {"name": f"u{n % 8}"}
    _, folder = curated(chat(tmp_path, rows, split={"by": "group", "group_key": "user.name"}))
    sides = {name: {row["group"] for row in rows_of(folder / f"{name}.jsonl")} for name in ("train", "val", "test")}
    assert not sides["train"] & (sides["val"] | sides["test"])
    assert not sides["val"] & sides["test"]
    assert all(sides.values())
    rows[7].pop("user")
    with pytest.raises(DataError, match=r"line 8: user.name is None, curate.split.by: group needs one"):
        curated(chat(tmp_path, rows, split={"by": "group", "group_key": "user.name"}))


def test_by_time_nothing_in_train_is_newer_than_what_is_held_out(tmp_path):
    rows = talks(30)
    rng = random.Random(4)
    for n, row in enumerate(rows):
        row["at"] = f"2026-03-{rng.randint(1, 28):02d}T0{n % 9}:00:00+02:00"
    split = {"by": "time", "time_key": "at"}
    _, folder = curated(chat(tmp_path, rows, val_size=4, test_size=5, calibration_size=3, split=split))
    when = {parse_conversation(row).id: row["at"] for row in rows}
    times = {n: sorted(when[i] for i in ids(folder, n)) for n in ("train", "val", "calibration", "test")}
    assert [len(t) for t in times.values()] == [18, 4, 3, 5]
    assert times["train"][-1] <= times["val"][0] <= times["val"][-1] <= times["calibration"][0]
    assert times["calibration"][-1] <= times["test"][0]
    assert f"{times['test'][-1][:8]}" in (folder / "README.md").read_text()
    rows[3]["at"] = "soon"
    with pytest.raises(DataError, match=r"line 4: at is 'soon', ISO 8601 or seconds"):
        curated(chat(tmp_path, rows, split=split))


def test_a_group_is_as_old_as_its_newest_row():
    rows = np.zeros(6, reading.ROWS)
    rows["group"] = [7, 7, 8, 8, 9, 9]
    rows["time"] = [1, 9, 2, 3, 4, 5]
    held = hold_out(rows, {"val": 1, "test": 1}, by="time", seed=0, order="shuffled")
    assert {name: rows.tolist() for name, rows in held.items()} == {"test": [0, 1], "val": [4, 5], "train": [2, 3]}


def test_sources_and_classes_are_capped_by_a_sample_of_their_rows(tmp_path):
    rows = talks(60)
    for n, row in enumerate(rows):
        row["meta"] = {"from": "a" if n < 40 else "b"}
    balance = {"source_key": "meta.from", "per_source": 15}
    counts, folder = curated(chat(tmp_path, rows, balance=balance))
    assert counts["dropped"] == {"source cap (train)": 30}
    lines = reasons(folder)["source cap"]
    assert sum(line <= 40 for line in lines) == 25
    # Not the first 15 nor the last.
    assert len({line for line in range(1, 16)} - set(lines)) < 15 > len({line for line in range(26, 41)} - set(lines))
    again, _ = curated(chat(tmp_path, rows[::-1], balance=balance))
    assert again["train"] == counts["train"]
    pool = [{"text": f"number {n}", **({"label": "yes"} if n % 2 else {})} for n in range(40)]
    counts, _ = curated(classify(tmp_path, pool, balance={"per_class": 6}))
    assert counts["dropped"] == {"class cap (pool)": 14}


def test_sources_and_times_are_found_where_imports_keep_them(tmp_path):
    days = [f"2026-01-{day:02}T00:00:00Z" for day in range(1, 31)]
    rows = talks(30)
    for n, row in enumerate(rows):
        row["meta"] = {"source": "a.jsonl" if n < 25 else "b.jsonl", "timestamp": days[n], "user": f"u{n % 15}"}
    split = {"by": "time", "time_key": "timestamp"}
    counts, folder = curated(chat(tmp_path, rows, balance={"per_source": 20}, split=split))
    assert counts["dropped"] == {"source cap (train)": 5}
    newest = {parse_conversation(row).id for row in rows[28:]}
    assert {row["id"] for row in rows_of(folder / "test.jsonl")} == newest
    _, folder = curated(chat(tmp_path, rows, split={"by": "group", "group_key": "user"}))
    sides = {n: {row["group"] for row in rows_of(folder / f"{n}.jsonl")} for n in ("train", "val", "test")}
    assert sum(map(len, sides.values())) == 15


def test_a_model_that_rows_name_reaches_the_terms_and_the_card(tmp_path):
    rows = talks(40)
    for n, row in enumerate(rows):
        row["meta"] = {"source": "log.jsonl", "model": "gpt-4o-2024-08-06" if n < 30 else "qwen3-8b"}
    recipe = chat(tmp_path, rows)
    with pytest.raises(PreflightRefused, match=r"terms: .*\d\d of gpt-4o-2024-08-06 \(OpenAI API.*teacher.terms: ack"):
        curated(recipe)
    teacher = recipe.teacher.model_copy(update={"terms": "acknowledged"})
    counts, folder = curated(recipe.model_copy(update={"teacher": teacher}))
    learned = counts["train"] + counts["val"]
    assert list(counts["models"]) == ["gpt-4o-2024-08-06", "qwen3-8b"]
    assert sum(counts["models"].values()) == learned
    text = (folder / "README.md").read_text()
    assert f"| `gpt-4o-2024-08-06` | {counts['models']['gpt-4o-2024-08-06']} | restricted | OpenAI API" in text
    assert f"| log.jsonl | {learned} |" in text
    # Cases that a student is only tested on are no training; what is dropped is none either.
    for row in rows:
        row["meta"] = {"model": "m"}
    rows[0]["meta"] = {"model": "openai:gpt-4o", "finish_reason": "length"}
    counts, folder = curated(chat(tmp_path, rows, test=[talk("x", "y", model="claude-3"), talk("z", "w")]))
    assert counts["models"] == {"m": counts["train"] + counts["val"]}
    assert "claude" not in (folder / "README.md").read_text()


def test_a_column_that_is_called_model_is_none_of_ours_in_requests(tmp_path):
    pool = [{"text": f"number {n}", "model": "claude-3"} for n in range(9)]
    assert "models" not in curated(classify(tmp_path, pool))[0]
    pool[0]["meta"] = {"model": "claude-3"}
    with pytest.raises(PreflightRefused, match=r"1 of claude-3 \(Anthropic"):
        curated(classify(tmp_path, pool))


def test_what_was_dropped_is_listed_with_line_reason_and_detail(tmp_path):
    rows = talks(20)
    rows.insert(4, rows[2])
    folder = curated(chat(tmp_path, rows, test=[rows[9]]))[1]
    drops = rows_of(folder / "dropped.jsonl")
    assert [(d["line"], d["reason"], d["split"], d["file"]) for d in drops] == [
        (5, "duplicate", "train", "train.jsonl"),
        (10, "leak", "train", "train.jsonl"),
    ]
    assert [d["detail"] for d in drops] == ["the same as train.jsonl line 3", "the same prompt as test.jsonl line 1"]
    assert drops[1]["id"] == parse_conversation(rows[9]).id


def cli(folder, *arguments):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", "from attar.cli import main; main()", "curate", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_explain_lists_reasons_and_rows(tmp_path):
    rows = talks(20)
    recipe = chat(tmp_path, [*rows, rows[0], talk("hi", "yo", finish_reason="length")])
    (tmp_path / "attar.yaml").write_text(yaml.safe_dump(recipe.dump()))
    early = cli(tmp_path, "--explain")
    assert early.returncode == 2
    assert "holds no splits yet" in early.stderr
    curated(recipe)
    assert cli(tmp_path, "--explain").stdout.split("\n")[:2] == [
        "        1  duplicate (train)",
        "        1  truncated (train)",
    ]
    one = cli(tmp_path, "--explain", "truncated")
    key = parse_conversation(talk("hi", "yo")).id
    assert one.stdout == f"train.jsonl:22  {key}  finish_reason is 'length'\n"
    both = json.loads(cli(tmp_path, "--explain", "duplicate (train)", "--json").stdout)
    assert [drop["line"] for drop in both["dropped"]] == [21]
    assert json.loads(cli(tmp_path, "--explain", "--json").stdout)["dropped"]["duplicate (train)"] == 1
    wrong = cli(tmp_path, "--explain", "nonsense")
    assert wrong.returncode == 2
    assert "there are: duplicate (train), truncated (train)" in wrong.stderr


def test_the_card_has_the_hubs_head_and_says_what_was_done(tmp_path):
    rows = [*talks(30), talk("my key sk-" + "a" * 24, "thanks")]
    rows.append(rows[0])
    recipe = chat(tmp_path, rows, data={"licence": "CC-BY-4.0"})
    counts, folder = curated(recipe)
    text = (folder / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license"] == "cc-by-4.0"
    assert head["size_categories"] == ["n<1K"]
    assert head["task_categories"] == ["text-generation"]
    assert {f["split"]: f["path"] for f in head["configs"][0]["data_files"]} == {
        "train": "train.jsonl",
        "validation": "val.jsonl",
        "test": "test.jsonl",
    }
    for name in ("train", "val", "test"):
        assert f"| {name} | {counts[name]} |" in text
        assert curating_digest(folder / f"{name}.jsonl") in text
    for piece in (
        "| teacher | `hf:somewhere/apache` |",
        "| training on its answers | free |",
        "| acknowledged by the user | not stated |",
        "| duplicate (train) | 1 |",
        "| data.train | 32 |",
        "Redacted: 1 key.",
        "Jaccard similarity of 5-word shingles from 0.8",
        "no legal advice",
    ):
        assert piece in text


def curating_digest(path):
    from attar.workspace import file_digest

    return file_digest(path)


def test_what_only_people_read_makes_nothing_out_of_date(tmp_path):
    recipe = chat(tmp_path, talks(30))
    pipeline.run(recipe, until="curate")
    with open_run(recipe.folder, recipe.name) as run:
        before = pipeline._fingerprint(pipeline.STAGES["chat"][1], local(recipe, tmp_path), run)
    teacher = recipe.teacher.model_copy(update={"terms": "acknowledged"})
    changed = recipe.model_copy(update={"teacher": teacher})
    assert pipeline.plan(changed, "curate")[0].reasons
    pipeline.run(changed, until="curate")
    assert "| acknowledged by the user | acknowledged |" in (recipe.folder / "data/README.md").read_text()
    with open_run(recipe.folder, recipe.name) as run:
        assert pipeline._fingerprint(pipeline.STAGES["chat"][1], local(changed, tmp_path), run) == before


def local(recipe, folder):
    """The recipe with a teacher that is there."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model/config.json").write_text("{}")
    teacher = recipe.teacher.model_copy(update={"model": f"hf:{folder / 'model'}"})
    return recipe.model_copy(update={"teacher": teacher})


@pytest.mark.parametrize(
    ("curate", "message"),
    [
        ({"near_duplicate": None}, r"curate.near_duplicate: unknown key \(nearest: near_duplicates\)"),
        ({"decontaminate": {"actoin": "drop"}}, "nearest: action"),
        ({"refusal_patterns": ["("]}, "is no regular expression"),
        ({"length": {"min_characters": 9, "max_characters": 3}}, "is above max_characters"),
        ({"split": {"by": "group", "group_key": None}}, "needs the key of a row"),
        ({"near_duplicates": {"threshold": 0.2}}, "greater than or equal to 0.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, curate, message):
    with pytest.raises(RecipeError, match=message):
        chat(tmp_path, [], **curate)


def test_a_classifier_knows_no_tool_calls(tmp_path):
    with pytest.raises(RecipeError, match=r"curate.tool_calls: unknown key"):
        classify(tmp_path, [], tool_calls="drop")


def test_nothing_left_says_why(tmp_path):
    with pytest.raises(DataError, match=re.escape("holds no usable row ({'too short': 3} dropped)")):
        curated(chat(tmp_path, talks(3), length={"min_characters": 10_000}))


def test_leaks_can_be_refused_and_a_calibration_case_always_is(tmp_path):
    rows = talks(20)
    recipe = chat(tmp_path, rows, test=[rows[9], talk("else", "more")], decontaminate={"action": "refuse"})
    with pytest.raises(
        PreflightRefused, match=r"leak: 1 row\(s\) of data.train .*train.jsonl line 10 .*the same prompt"
    ):
        curated(recipe)
    pool = [{"text": f"number {n}"} for n in range(20)]
    write(tmp_path / "calibration.jsonl", [{"text": "Case, number 0?", "label": "yes"}])
    with pytest.raises(PreflightRefused, match=r"leak: 1 row\(s\) of data.calibration .*remove them from one side$"):
        curated(classify(tmp_path, pool, data={"calibration": "calibration.jsonl"}))

"""Calls that repeat the turns before them; files read piece by piece."""

import itertools
import json
import random

import pytest

from attar.collect.importers import records
from attar.collect.importers.merge import Merger, learn_last
from attar.collect.importers.records import read_records
from attar.data.types import Conversation, Message, ToolCall
from attar.errors import DataError

TOOLS = ({"type": "function", "function": {"name": "f"}},)


def said(*texts):
    """User and assistant in turns."""
    return tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts))


def merged(*calls, open_bytes=2**20):
    merger = Merger(open_bytes)
    done = [item for call in calls for item in merger.add(*(call if isinstance(call, tuple) else (call, {})))]
    return [*done, *merger.rest()], merger.counts


EPISODE = [Conversation(said(*"abcdef"[:n]), TOOLS, "e") for n in (2, 4, 6)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_an_episode_in_any_order_is_one_conversation(order):
    [(conversation, meta)], counts = merged(*(EPISODE[i] for i in order))
    assert conversation == EPISODE[2]
    assert meta == {"calls": 3}
    assert +counts == {"merged": 2}


@pytest.mark.parametrize(("ends", "end"), [(("stop", "tool_calls"), "tool_calls"), (("length", "stop"), "length")])
def test_an_answer_that_was_cut_is_remembered_wherever_it_stands(ends, end):
    [(_, meta)], _ = merged(*((EPISODE[i], {"finish_reason": value}) for i, value in enumerate(ends)))
    assert meta["finish_reason"] == end


def test_calls_that_are_missing_are_read_and_not_learned():
    [(conversation, _)], counts = merged(EPISODE[0], EPISODE[2])
    assert [m.train for m in conversation.messages] == [None, None, None, False, None, None]
    assert +counts == {"merged": 1, "unlogged answer": 1}


def test_two_ways_on_from_one_turn_learn_the_turn_once():
    other = Conversation(said(*"abxy"), TOOLS, "e")
    done, counts = merged(EPISODE[0], EPISODE[1], other)
    assert [m.train for m in done[0][0].messages] == [None] * 4
    assert [m.train for m in done[1][0].messages] == [None, False, None, None]
    assert +counts == {"merged": 1, "unlogged answer": 1}


@pytest.mark.parametrize(
    "later",
    [
        Conversation(said(*"aBcd"), TOOLS, "e"),
        Conversation(said(*"Abcd"), TOOLS, "e"),
        Conversation(said(*"abcd"), (), "e"),
        Conversation(said(*"abcd"), TOOLS, "another"),
        (Conversation(said(*"abcd"), TOOLS, "e"), {"model": "another"}),
    ],
)
def test_what_differs_anywhere_stays_apart(later):
    done, counts = merged(EPISODE[0], later)
    assert len(done) == 2
    assert counts["merged"] == 0


def test_the_order_of_arguments_counts():
    def called(arguments):
        return Message("assistant", "", (ToolCall("1", "f", arguments),))

    first = Conversation((Message("user", "a"), called({"x": 1, "y": 2})), TOOLS)
    told = (Message("tool", "t", tool_call_id="1"), Message("assistant", "z"))
    for arguments, expected in (({"x": 1, "y": 2}, 1), ({"y": 2, "x": 1}, 2)):
        later = Conversation((Message("user", "a"), called(arguments), *told), TOOLS)
        assert len(merged(first, later)[0]) == expected


def test_reasoning_that_a_later_call_drops_is_kept_apart_and_said():
    first = Conversation((Message("user", "a"), Message("assistant", "b", reasoning="hm")))
    done, counts = merged(first, Conversation(said(*"abcd")))
    assert [[m.train for m in c.messages] for c, _ in done] == [[None, None], [None, False, None, None]]
    assert counts["reasoning dropped"] == 1
    repeated = Conversation((*first.messages, *said(*"cd")))
    [(conversation, _)], _ = merged(first, repeated)
    assert conversation == repeated


def test_a_call_that_stands_twice_is_counted():
    done, counts = merged(EPISODE[0], EPISODE[0])
    assert len(done) == 1
    assert done[0][1] == {"calls": 1}
    assert +counts == {"repeated": 1}


def test_counts_are_added_and_the_last_call_tells_the_outcome():
    metas = [
        {"timestamp": "1", "usage": {"prompt_tokens": 3, "completion_tokens": 1}, "outcome": 0, "user": "u"},
        {"timestamp": "2", "usage": {"prompt_tokens": 5, "cached_tokens": 4}, "outcome": 1, "user": None},
    ]
    [(_, meta)], _ = merged((EPISODE[1], metas[1]), (EPISODE[0], metas[0]))
    usage = {"prompt_tokens": 8, "completion_tokens": 1, "cached_tokens": 4}
    assert meta == {"timestamp": "1", "usage": usage, "outcome": 1, "user": "u", "calls": 2}


def test_the_memory_is_bounded():
    many = [Conversation(said(f"{i} " + "x" * 1000, "b"), (), str(i)) for i in range(50)]
    merger = Merger(open_bytes=5000)
    done = []
    for call in many:
        done += merger.add(call, {})
        assert len(merger._open) <= 5
        assert len(merger._places) <= 5
    done += merger.rest()
    assert [c.group for c, _ in done] == [str(i) for i in range(50)]
    assert not merger._places
    assert not merger._bare


def test_every_answer_of_a_log_is_learned_once():
    rng = random.Random(0)
    calls = []
    for episode in range(6):
        texts = [f"{episode}.{i}" for i in range(8)]
        calls += [Conversation(said(*texts[:n]), (), None) for n in (2, 4, 6, 8) if rng.random() < 0.7]
    rng.shuffle(calls)
    for open_bytes in (100, 600, 2**20):
        done, _ = merged(*calls, open_bytes=open_bytes)
        learned = [
            tuple(m.content for m in c.messages[: i + 1])
            for c, _ in done
            for i, m in enumerate(c.messages)
            if m.role == "assistant" and m.train is not False
        ]
        assert sorted(learned) == sorted(tuple(m.content for m in call.messages) for call in calls)


def test_one_call_by_itself():
    assert [m.train for m in learn_last(EPISODE[1]).messages] == [None, False, None, None]


ROWS = [{"a": "é" * 40, "n": [1, {"b": None}]}, {"a": "]}", "b": -1.5}, {"c": {}}]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2, ensure_ascii=False),
        "\n\n".join(json.dumps(row, indent=2) for row in ROWS),
        "\ufeff" + json.dumps(ROWS),
        "".join(json.dumps(row) + "\n" for row in ROWS),
    ],
)
def test_arrays_documents_and_lines(tmp_path, monkeypatch, chunk, text):
    monkeypatch.setattr(records, "_CHUNK", chunk)
    (tmp_path / "a.json").write_text(text, "utf-8")
    assert [row for _, row in read_records(tmp_path / "a.json")] == ROWS


def test_numbers_of_rows_and_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n{oops\n{"b": 2}\n')
    (_, _), (number, broken), (last, _) = read_records(tmp_path / "a.jsonl")
    assert (number, last) == (3, 4)
    assert isinstance(broken, DataError)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"a": 1}, {"b"', "row 2 is no JSON or breaks off"),
        ('[{"a": 1}', "breaks off after row 1"),
        ('{\n  "a": 1,\n', "row 1 is no JSON or breaks off"),
        ("[{\n'a': 1}]", "row 1 is no JSON"),
    ],
)
def test_files_that_break_off(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=words):
        list(read_records(tmp_path / "a.json"))


def test_another_encoding(tmp_path):
    (tmp_path / "a.json").write_bytes('[{"a": "é"}]'.encode("latin1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        list(read_records(tmp_path / "a.json"))
    with pytest.raises(DataError, match="is no file"):
        list(read_records(tmp_path / "b.json"))


def test_a_long_cell(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n" + "x" * 200_000 + ",1\n")
    [(number, row)] = read_records(tmp_path / "a.csv")
    assert (number, len(row["a"])) == (2, 200_000)

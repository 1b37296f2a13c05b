import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.data.conversations import BadRow, parse_conversation, read_conversations, write_conversations
from attar.data.types import Conversation, Message, ToolCall
from attar.errors import DataError

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
ARGUMENTS = {"place": "Oslo", "n": [1, None]}
CALL = {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}
ROW = {
    "messages": [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "is it "}, {"type": "text", "text": "cold?"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "ask", "train": False},
        {"role": "tool", "tool_call_id": "a1", "name": "weather", "content": "3 degrees"},
        {"role": "assistant", "content": "yes"},
    ],
    "tools": [TOOL],
    "group": "episode 1",
}


def changed(path, value):
    """ROW with something else at a path."""
    row = json.loads(json.dumps(ROW))
    *way, last = path
    at = row
    for step in way:
        at = at[step]
    if value is KeyError:
        del at[last]
    else:
        at[last] = value
    return row


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_a_row_by_hand():
    assert parse_conversation(ROW) == Conversation(
        (
            Message("system", "be kind"),
            Message("user", "is it cold?"),
            Message(
                "assistant",
                "",
                (ToolCall("a1", "weather", {"place": "Oslo", "n": [1, None]}),),
                None,
                None,
                "ask",
                False,
            ),
            Message("tool", "3 degrees", tool_call_id="a1", name="weather"),
            Message("assistant", "yes"),
        ),
        (TOOL,),
        "episode 1",
    )


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_under_any_of_its_names(name):
    row = {"messages": [{"role": "assistant", "content": "yes", name: "hm"}]}
    assert parse_conversation(row).messages[0].reasoning == "hm"


def test_arguments_as_an_object_or_as_json_are_the_same():
    path = ("messages", 2, "tool_calls", 0, "function", "arguments")
    assert parse_conversation(changed(path, ARGUMENTS)) == parse_conversation(ROW)


def test_the_id_follows_the_content_and_not_the_group():
    known = parse_conversation(ROW).id
    assert parse_conversation(json.loads(json.dumps(ROW))).id == known
    assert parse_conversation(changed(("group",), "another")).id == known
    others = [
        changed(("messages", 4, "content"), "no"),
        changed(("messages", 2, "train"), True),
        changed(("tools",), None),
        changed(("messages", 2, "tool_calls", 0, "function", "arguments"), '{"n": [1, null], "place": "Oslo"}'),
    ]
    assert len({known, *(parse_conversation(row).id for row in others)}) == 5


TO_CALL = ("messages", 2, "tool_calls")
BAD = [
    ("malformed", [], "list"),
    ("no messages", {"dialog": []}, "keys here: dialog"),
    ("no messages", changed(("messages",), []), r"\[\]"),
    ("malformed", changed(("messages", 1), "hi"), r"messages\[1\] is 'hi'"),
    ("unknown role", changed(("messages", 1, "role"), "bot"), r"messages\[1\].role is 'bot', wanted one of system, "),
    ("unknown role", changed(("messages", 3, "role"), "function"), "call it 'tool'"),
    ("unknown role", changed(("messages", 3, "role"), KeyError), "absent"),
    ("no text", changed(("messages", 1, "content"), None), r"messages\[1\].content is absent or null"),
    ("no text", changed(("messages", 4, "content"), None), "only beside tool_calls"),
    ("no text", changed(("messages", 1, "content"), 5), "content is 5"),
    (
        "no text",
        changed(("messages", 1, "content", 1), {"type": "image_url"}),
        r"content\[1\] is {'type': 'im",
    ),
    ("no assistant", changed(("messages",), ROW["messages"][:2]), "nothing to learn"),
    ("bad tool call", changed(TO_CALL, {"a": 1}), "a list is wanted"),
    ("bad tool call", changed((*TO_CALL, 0), {"name": "weather", "arguments": {}}), r"tool_calls\[0\] is"),
    ("bad tool call", changed((*TO_CALL, 0, "function", "arguments"), "{oslo"), "no JSON"),
    ("bad tool call", changed((*TO_CALL, 0, "function", "arguments"), "[1]"), r"arguments is \[1\]"),
    ("bad tool call", changed((*TO_CALL, 0, "function", "arguments"), KeyError), "absent or null"),
    ("malformed", changed((*TO_CALL, 0, "id"), 5), r"tool_calls\[0\].id is 5"),
    ("bad tool call", changed(("messages", 1, "tool_calls"), [CALL]), "role 'user'"),
    ("bad tool call", changed(("messages", 2, "function_call"), {"name": "x"}), "retired"),
    ("bad tools", changed(("tools",), {"a": 1}), "list of schemas"),
    ("bad tools", changed(("tools", 0), {"name": "weather"}), r"tools\[0\] is"),
    ("bad tools", changed(("tools",), "{"), "no JSON"),
    ("malformed", changed(("messages", 1, "reasoning"), "hm"), "role 'user'"),
    ("malformed", changed(("messages", 2, "thinking"), "x" * 90), "keep one"),
    ("malformed", changed(("messages", 2, "reasoning_content"), 5), "reasoning is 5"),
    ("malformed", changed(("messages", 4, "train"), "no"), "wanted true or false"),
    ("malformed", changed(("messages", 1, "train"), True), "false or absent"),
    ("malformed", changed(("group",), 7), "group is 7"),
    ("malformed", changed(("messages", 4, "content"), "\ud83d"), "surrogate"),
]


@pytest.mark.parametrize(("reason", "row", "words"), BAD)
def test_a_row_that_cannot_be_used(tmp_path, reason, row, words):
    with pytest.raises(BadRow, match=words) as caught:
        parse_conversation(row)
    assert caught.value.reason == reason
    path = write(tmp_path / "c.jsonl", [ROW, "\n", row])
    with pytest.raises(DataError, match=rf"^data.pool: c.jsonl line 3: .*on_bad_line: skip \({reason}\)$") as stopped:
        read_conversations(path, key="data.pool", on_bad_line="stop")
    assert "\n" not in str(stopped.value)
    read, skipped = read_conversations(path, key="data.pool", on_bad_line="skip")
    assert read == [parse_conversation(ROW)]
    assert skipped == {reason: 1}


def test_two_reasonings_that_differ_late():
    row = changed(("messages", 2, "reasoning_content"), "x" * 90 + "a")
    row["messages"][2]["thinking"] = "x" * 90 + "b"
    with pytest.raises(BadRow, match="keep one"):
        parse_conversation(row)


def test_files_that_cannot_be_used(tmp_path):
    for name, content, words in [
        ("none.jsonl", None, "is no file"),
        ("a.csv", "x", "cannot hold conversations"),
        ("a.txt", "x", "is not read"),
        ("a.jsonl", "", "no usable row"),
        ("b.jsonl", "{\n", "line 1: no JSON"),
    ]:
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        with pytest.raises(DataError, match=words):
            read_conversations(path, key="data.pool", on_bad_line="stop")


def test_a_table_gives_the_same_conversations(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    plain = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    rows = [
        {**ROW, "messages": [{**m, "content": None} if m["content"] is None else m for m in ROW["messages"]]},
        plain,
    ]
    rows[0]["messages"][1] = {"role": "user", "content": "is it cold?"}  # a column has one type
    table = [{**row, "tools": json.dumps(row["tools"]) if "tools" in row else None} for row in rows]
    parquet.write_table(arrow.Table.from_pylist(table), tmp_path / "c.parquet")
    read, skipped = read_conversations(tmp_path / "c.parquet", key="data.pool", on_bad_line="stop")
    assert read == [parse_conversation(row) for row in (ROW, plain)]
    assert not skipped


def test_objects_in_a_table_have_been_mixed_up(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def row(**arguments):
        function = {"name": "f", "arguments": arguments}
        return {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": function}]}]}

    parquet.write_table(arrow.Table.from_pylist([row(a=1), row(b=2)]), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"line 1: .*'b': None.*write it as a JSON string"):
        read_conversations(tmp_path / "c.parquet", key="data.pool", on_bad_line="stop")
    tool = {"type": "function", "function": {"name": "f"}}
    parquet.write_table(
        arrow.Table.from_pylist([{"messages": [ROW["messages"][4]], "tools": [tool]}]), tmp_path / "t.parquet"
    )
    with pytest.raises(DataError, match=r"tools is .*write it as a JSON string"):
        read_conversations(tmp_path / "t.parquet", key="data.pool", on_bad_line="stop")


text = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2),
    max_leaves=5,
)
calls = st.builds(ToolCall, st.none() | text, text, st.dictionaries(text, values, max_size=2))
answers = st.builds(
    Message,
    st.just("assistant"),
    text,
    st.lists(calls, max_size=2).map(tuple),
    st.none(),
    st.none() | text,
    st.none() | text,
    st.none() | st.booleans(),
)
others = st.builds(
    Message, st.sampled_from(["system", "developer", "user", "tool"]), text, tool_call_id=st.none() | text
)
conversations = st.builds(
    lambda first, rest, tools, group: Conversation((first, *rest), tools, group),
    answers,
    st.lists(answers | others, max_size=3),
    st.sampled_from([(), (TOOL,)]),
    st.none() | text,
)


@settings(max_examples=15, deadline=None)
@given(st.lists(conversations, min_size=1, max_size=6))
def test_what_is_written_is_read(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("written") / "c.jsonl"
    write_conversations(path, written)
    read, skipped = read_conversations(path, key="data.pool", on_bad_line="stop")
    assert read == written
    assert [c.id for c in read] == [c.id for c in written]
    assert not skipped

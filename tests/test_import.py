"""Every format's fixture comes out as the conversation that it holds."""

import json
from collections import Counter
from pathlib import Path

import pytest

from attar.collect.importers import FORMATS, Found, each_row, import_files
from attar.collect.store import delete
from attar.data.conversations import BadRow, parse_conversation
from attar.data.types import Conversation, Message, ToolCall
from attar.errors import DataError, UsageError

FIXTURES = Path(__file__).parent / "fixtures" / "import"
PARAMETERS = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
FUNCTION = {"name": "get_weather", "description": "Weather at a place", "parameters": PARAMETERS}
OSLO = Conversation(
    (
        Message("system", "Answer briefly."),
        Message("user", "Is it cold in Oslo?"),
        Message("assistant", "", (ToolCall("call_a1", "get_weather", {"place": "Oslo"}),)),
        Message("tool", "3 °C, rain", tool_call_id="call_a1"),
        Message("assistant", "Yes, 3 °C with rain."),
    ),
    ({"type": "function", "function": FUNCTION},),
)
SUM = Conversation(
    (Message("user", "2 + 2?"), Message("assistant", "4", reasoning="2 and 2 make 4.")),
)


def imported(tmp_path, *names, **options):
    """The rows that come of fixtures (or paths), and the report with what was skipped, in order."""
    listed = []
    out = tmp_path / "out" / "raw.jsonl"
    out.unlink(missing_ok=True)
    paths = [name if isinstance(name, Path) else FIXTURES / name for name in names]
    result = import_files(paths, out, on_skipped=listed.append, **options)
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    for row in rows:
        assert parse_conversation(row).id == row["id"]
    assert len(rows) == result.conversations
    assert Counter(item.reason for item in listed) == result.skipped
    return rows, result, listed


def conversations(rows):
    return [parse_conversation(row) for row in rows]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "format", "group", "meta"),
    [
        ("openai.jsonl", "openai", None, {}),
        ("anthropic.jsonl", "anthropic", None, {}),
        (
            "exchanges.jsonl",
            "exchanges",
            "ep-1",
            {
                "id": "chatcmpl-985",
                "workload": "weather",
                "user": "u-7",
                "timestamp": "2025-11-24T10:00:00Z",
                "outcome": {"solved": True},
                "finish_reason": "stop",
                "calls": 2,
            },
        ),
        (
            "langfuse.json",
            "langfuse",
            "s-1",
            {
                "id": "ob-2",
                "workload": "openai-chat",
                "user": "u-7",
                "timestamp": "2025-11-24T10:00:00.000Z",
                "outcome": {"helpful": 1},
                "calls": 2,
            },
        ),
        (
            "langfuse-trace.json",
            "langfuse",
            "s-1",
            {
                "id": "ob-2",
                "workload": "openai-chat",
                "user": "u-7",
                "timestamp": "2025-11-24T10:00:00.000Z",
                "outcome": {"helpful": "yes"},
                "calls": 2,
            },
        ),
        (
            "langfuse.csv",
            "langfuse",
            "s-1",
            {
                "id": "ob-2",
                "workload": "openai-chat",
                "timestamp": "2025-11-24T10:00:00.000Z",
                "outcome": {"helpful": 1},
                "calls": 2,
            },
        ),
        (
            "litellm.jsonl",
            "litellm",
            "s-1",
            {
                "id": "chatcmpl-2",
                "workload": "gpt-4o",
                "user": "u-7",
                "timestamp": "2025-11-24T10:00:00",
                "finish_reason": "stop",
                "calls": 2,
            },
        ),
        (
            "otel.jsonl",
            "otel",
            "conv-1",
            {"timestamp": "2025-11-24T10:00:00Z", "finish_reason": "stop", "calls": 2},
        ),
        (
            "atif.json",
            "atif",
            "s-1",
            {
                "id": "t-1",
                "workload": "weather-agent",
                "timestamp": "2025-11-24T10:00:00Z",
                "outcome": {"reward": 1.0},
            },
        ),
    ],
)
def test_one_conversation_in_every_format(tmp_path, name, format, group, meta):
    rows, result, _ = imported(tmp_path, name)
    assert result.formats == {str(FIXTURES / name): format}
    row = next(row for row in rows if row["id"] == OSLO.id)
    assert row.get("group") == group
    told = {"model": "gpt-4o-2024-08-06", "usage": {"prompt_tokens": 145, "completion_tokens": 24}} if meta else {}
    assert row["meta"] == {"source": name, "format": format} | told | meta


def test_reasoning_stays_apart_in_every_format_that_has_it(tmp_path):
    for name in ("openai.jsonl", "anthropic.jsonl", "exchanges.jsonl", "otel.jsonl"):
        rows, _, _ = imported(tmp_path, name)
        assert SUM.id in {row["id"] for row in rows}, name


def test_fine_tuning_files(tmp_path):
    rows, result, listed = imported(tmp_path, "openai.jsonl")
    oslo, again, total, weighted, old = conversations(rows)
    assert oslo.id == again.id == OSLO.id  # arguments as a string, and as an object
    assert total == Conversation(SUM.messages, group="sums")
    assert [message.train for message in weighted.messages] == [None, False, None, True]
    assert old.messages[1].tool_calls == (ToolCall(None, "get_weather", {"place": "Oslo"}),)
    assert (old.messages[2].role, old.messages[2].name) == ("tool", "get_weather")
    assert old.tools == OSLO.tools
    assert [(item.number, item.reason) for item in listed] == [(6, "no text")]
    assert "image_url" in listed[0].detail
    assert (result.rows, result.conversations) == (6, 5)


def test_a_recorder_s_exchanges(tmp_path):
    rows, result, listed = imported(tmp_path, "exchanges.jsonl")
    assert [row["group"] for row in rows] == ["ep-1", "ep-2", "ep-3"]
    assert result.joined == {"merged": 1, "unlogged answer": 1}
    assert [(item.number, item.reason) for item in listed] == [(2, "failed call")]
    claude = rows[1]["meta"]
    assert claude["usage"] == {"prompt_tokens": 13, "completion_tokens": 14, "cached_tokens": 2}
    assert claude["model"] == "claude-sonnet-4-5-20250929"
    response = parse_conversation(rows[2])
    assert response.tools == OSLO.tools
    assert response.messages[:2] == OSLO.messages[:2]
    assert response.messages[2].tool_calls == OSLO.messages[2].tool_calls
    assert response.messages[2].train is False
    assert response.messages[3:] == (
        OSLO.messages[3],
        Message("assistant", "Yes, 3 °C with rain.", reasoning="3 is cold."),
    )
    assert rows[2]["meta"]["finish_reason"] == "stop"


def test_a_recorded_folder(tmp_path):
    folder = tmp_path / "recorded"
    folder.mkdir()
    lines = (FIXTURES / "exchanges.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) | {"id": f"x{i}", "complete": True, "problems": []} for i, line in enumerate(lines)]
    rows[3]["complete"] = False
    del rows[2]["outcome"]
    segment = write(folder / "exchanges-2025-11-24-0001.jsonl", rows)
    with segment.open("a") as handle:
        handle.write('{"id": "half')
    of_episode = {"timestamp": "2025-11-24T11:00:00Z", "episode": "ep-1", "exchange": None}
    outcomes = [of_episode | {"outcome": 0}, of_episode | {"outcome": {"solved": True}}]
    write(folder / "outcomes-2025-11-24-0001.jsonl", outcomes)
    got, result, listed = imported(tmp_path, folder)
    assert got[0]["id"] == OSLO.id
    assert got[0]["meta"]["outcome"] == {"solved": True}
    assert [row["group"] for row in got] == ["ep-1", "ep-3"]
    assert [(item.number, item.reason) for item in listed] == [
        (2, "failed call"),
        (4, "cut answer"),
        (6, "malformed"),
    ]
    assert result.formats == {str(folder): "exchanges"}
    with pytest.raises(DataError, match="is a part of a recorded folder"):
        imported(tmp_path, segment)
    delete(folder, episode="ep-1")
    assert [row["group"] for row in imported(tmp_path, folder)[0]] == ["ep-3"]


def test_calls_left_apart(tmp_path):
    rows, result, _ = imported(tmp_path, "exchanges.jsonl", merge=False)
    first, second, *_ = conversations(rows)
    assert first.messages == OSLO.messages[:3]
    assert [message.train for message in second.messages] == [None, None, False, None, None]
    assert result.joined == {}
    assert rows[0]["meta"]["usage"] == {"prompt_tokens": 60, "completion_tokens": 15}


def test_sharegpt(tmp_path):
    rows, _, listed = imported(tmp_path, "sharegpt.json")
    oslo, chat = conversations(rows)
    without_ids = [(m.role, m.content, [(c.name, c.arguments) for c in m.tool_calls]) for m in OSLO.messages]
    assert [(m.role, m.content, [(c.name, c.arguments) for c in m.tool_calls]) for m in oslo.messages] == without_ids
    assert oslo.tools == OSLO.tools
    assert [message.train for message in chat.messages] == [None, None, False, None, True]
    assert [(item.number, item.reason) for item in listed] == [(3, "unknown role")]


def test_trl_types(tmp_path):
    rows, result, listed = imported(tmp_path, "trl.jsonl")
    plain, oslo, chosen, implicit, preferred = conversations(rows)
    assert plain.messages == (Message("user", "The sky is"), Message("assistant", " blue."))
    assert [message.train for message in oslo.messages] == [None, None, False, None, None]
    assert oslo.tools == OSLO.tools
    assert [c.messages[-1].content for c in (chosen, implicit, preferred)] == ["4", "5", "7"]
    assert result.left_out == {"rejected answer": 3}
    assert [(item.number, item.reason) for item in listed] == [(5, "undesired")]


def test_a_table_s_cells_stay_what_they_are(tmp_path):
    rows, _, _ = imported(tmp_path, "prompts.csv")
    assert [row["messages"][1]["content"] for row in rows] == [" blue.", '{"capital": "Oslo"}']


def test_langfuse_says_what_is_no_call(tmp_path):
    _, result, _ = imported(tmp_path, "langfuse.json")
    assert result.skipped == {"no model call": 1, "failed call": 1}


def test_langfuse_pages_and_blob_storage(tmp_path):
    page = json.loads((FIXTURES / "langfuse.json").read_text("utf-8"))
    snake = {
        "traceId": "trace_id",
        "sessionId": "session_id",
        "usageDetails": "usage_details",
        "startTime": "start_time",
    }
    blob = [{snake.get(key, key): value for key, value in row.items()} for row in page[:2]]
    for rows in ([{"data": page, "meta": {"page": 1}}], blob):
        got, _, _ = imported(tmp_path, write(tmp_path / "x.jsonl", rows))
        assert got[0]["id"] == OSLO.id
        assert got[0]["group"] == "s-1"
        assert got[0]["meta"]["usage"] == {"prompt_tokens": 145, "completion_tokens": 24}
    ids = {"id": "tr-1", "input": {}, "output": {}, "observations": ["ob-1"]}
    with pytest.raises(DataError, match="1 no contents"):
        imported(tmp_path, write(tmp_path / "x.jsonl", [ids]))


def test_litellm_says_where_contents_are_missing(tmp_path):
    _, result, listed = imported(tmp_path, "litellm.jsonl")
    assert result.skipped == {"no contents": 1, "no model call": 1, "failed call": 1}
    assert "store_prompts_in_spend_logs" in listed[0].detail


def test_otel_attributes(tmp_path):
    _, result, listed = imported(tmp_path, "otel.jsonl")
    assert result.skipped == {"no model call": 3, "no contents": 1, "failed call": 1, "no text": 1}
    assert any("uri" in item.detail for item in listed)


def test_otel_events_of_spans_and_in_logs(tmp_path):
    rows, result, _ = imported(tmp_path, "otel-events.jsonl", merge=False)
    call, summed, numbered = conversations(rows)
    assert call.messages == OSLO.messages[:3]
    assert summed.messages == (Message("user", "2 + 2?"), Message("assistant", "4"))
    assert [m.content for m in numbered.messages] == [m.content for m in OSLO.messages]
    assert numbered.messages[2].tool_calls == OSLO.messages[2].tool_calls
    assert rows[2]["meta"]["usage"] == {"prompt_tokens": 85, "completion_tokens": 9}
    assert result.skipped == {"no answer": 1, "no model call": 1}
    # Two instrumentations of one trace: the call that an event told, and the one after it.
    rows, result, _ = imported(tmp_path, "otel-events.jsonl")
    assert OSLO.messages in [c.messages for c in conversations(rows)]
    assert result.joined == {"merged": 1}


def test_log_records_that_wait_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("attar.collect.importers.otel._WAITING", 2)

    def export(span, name, body):
        record = {"traceId": "t", "spanId": span, "eventName": name, "body": {"kvlistValue": {"values": body}}}
        return {"resourceLogs": [{"scopeLogs": [{"logRecords": [record]}]}]}

    asked = [{"key": "content", "value": {"stringValue": "?"}}]
    answer = [{"key": "message", "value": {"stringValue": json.dumps({"content": "!"})}}]
    rows = [export(str(i), "gen_ai.user.message", asked) for i in range(3)]
    rows += [export(str(i), "gen_ai.choice", answer) for i in range(3)]
    got, result, listed = imported(tmp_path, write(tmp_path / "x.jsonl", rows))
    assert len(got) == 1  # the later two are one question and one answer
    assert result.joined == {"repeated": 1}
    assert [(item.number, item.reason) for item in listed] == [(3, "no answer"), (4, "no contents")]


def test_a_printed_span(tmp_path):
    asked = [{"role": "user", "parts": [{"type": "text", "content": "2 + 2?"}]}]
    answer = [{"role": "assistant", "parts": [{"type": "text", "content": "4"}]}]
    span = {
        "name": "chat m",
        "context": {"trace_id": "0x1", "span_id": "0x2"},
        "start_time": "2025-11-24T10:00:00Z",
        "status": {"status_code": "UNSET"},
        "attributes": {"gen_ai.input.messages": json.dumps(asked), "gen_ai.output.messages": json.dumps(answer)},
        "events": [],
    }
    rows, _, _ = imported(tmp_path, write(tmp_path / "spans.jsonl", [span]))
    assert rows[0]["messages"][1]["content"] == "4"
    assert rows[0]["meta"]["timestamp"] == "2025-11-24T10:00:00Z"


def test_atif_keeps_the_agents_of_an_episode_together(tmp_path):
    rows, result, _ = imported(tmp_path, "atif.json")
    _, inner = conversations(rows)
    assert inner.group == "s-1"
    assert inner.messages == (
        Message("user", "2 + 2?"),
        Message("assistant", "3", train=False),
        Message("assistant", "ls"),
        Message("user", "no such file"),
        Message("assistant", "4", reasoning="2 and 2 make 4."),
    )
    assert result.left_out == {"metrics.completion_token_ids": 1}


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    messages = [message.wire for message in OSLO.messages]
    table = arrow.Table.from_pylist([{"messages": messages, "tools": json.dumps(list(OSLO.tools))}])
    parquet.write_table(table, tmp_path / "a.parquet")
    strings = arrow.Table.from_pylist([{"prompt": "The sky is", "completion": " blue."}] * 1500)
    parquet.write_table(strings, tmp_path / "b.parquet")
    rows, result, _ = imported(tmp_path, tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert rows[0]["id"] == OSLO.id
    assert result.conversations == 1501
    assert list(result.formats.values()) == ["openai", "trl"]
    logs = [json.loads(line) for line in (FIXTURES / "exchanges.jsonl").read_text("utf-8").splitlines()]
    cells = [{key: json.dumps(row[key]) if key in ("request", "response") else row[key] for key in row} for row in logs]
    for cell in cells:
        cell.pop("timing")
        cell.pop("outcome", None)
    parquet.write_table(arrow.Table.from_pylist(cells), tmp_path / "c.parquet")
    rows, _, _ = imported(tmp_path, tmp_path / "c.parquet")
    assert rows[0]["id"] == OSLO.id


def test_objects_of_a_table_are_refused_where_they_have_been_mixed_up(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def row(**arguments):
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}

    parquet.write_table(arrow.Table.from_pylist([row(a=1), row(b=2)]), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="2 bad tool call"):
        imported(tmp_path, tmp_path / "t.parquet")


def test_what_a_conversation_has_no_place_for_is_counted(tmp_path):
    answer = {"role": "assistant", "content": "4", "annotations": [{"type": "url_citation"}]}
    choice = {"message": answer, "finish_reason": "stop", "logprobs": {"content": []}}
    row = {"request": {"messages": [{"role": "user", "content": "2 + 2?"}]}, "response": {"choices": [choice]}}
    _, result, _ = imported(tmp_path, write(tmp_path / "x.jsonl", [row]))
    assert result.left_out == {"message.annotations": 1, "logprobs": 1}


def test_each_choice_is_a_conversation(tmp_path):
    choices = [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"} for text in "ab"]
    row = {"request": {"messages": [{"role": "user", "content": "a letter?"}]}, "response": {"choices": choices}}
    rows, _, _ = imported(tmp_path, write(tmp_path / "x.jsonl", [row]))
    assert [row["messages"][-1]["content"] for row in rows] == ["a", "b"]


def test_refusals_and_cut_answers_are_marked(tmp_path):
    def row(message, finish):
        response = {"choices": [{"message": message, "finish_reason": finish}]}
        return {"request": {"messages": [{"role": "user", "content": "?"}]}, "response": response}

    refused = row({"role": "assistant", "content": None, "refusal": "I cannot."}, "stop")
    cut = row({"role": "assistant", "content": "It was a dark and"}, "length")
    rows, _, _ = imported(tmp_path, write(tmp_path / "x.jsonl", [refused, cut]))
    assert [row["meta"]["finish_reason"] for row in rows] == ["content_filter", "length"]
    assert rows[0]["messages"][1]["content"] == "I cannot."


def test_the_meta_of_a_row_changes_nothing(tmp_path):
    row = {"messages": [message.wire for message in OSLO.messages], "tools": list(OSLO.tools)}
    assert parse_conversation(row | {"meta": {"model": "x"}, "id": "y"}).id == OSLO.id
    rows, _, _ = imported(tmp_path, write(tmp_path / "x.jsonl", [row | {"meta": {"outcome": 1}}]))
    assert rows[0]["meta"]["outcome"] == 1


def only_users(rows):
    """A user's own importer."""
    for row in rows:
        if row["who"] == "nobody":
            yield BadRow("nobody", "nobody asked")
        else:
            yield Found([{"role": "user", "content": row["who"]}, {"role": "assistant", "content": "hi"}])


@each_row
def one_at_a_time(row):
    raise BadRow("never", str(row["who"]))


def test_an_importer_of_the_user_s_own(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"who": "me"}, {"who": "nobody"}])
    rows, result, _ = imported(tmp_path, path, format=f"{__name__}:only_users")
    assert rows[0]["messages"][0]["content"] == "me"
    assert result.skipped == {"nobody": 1}
    with pytest.raises(DataError, match="2 never"):
        imported(tmp_path, path, format=f"{__name__}:one_at_a_time")
    with pytest.raises(DataError, match=r"x.jsonl line 1: the importer .*only_users failed \(KeyError: 'who'\)"):
        imported(tmp_path, write(tmp_path / "x.jsonl", [{}]), format=f"{__name__}:only_users")
    with pytest.raises(UsageError, match="is no function"):
        imported(tmp_path, path, format="tests_nowhere:read")


def test_formats_that_are_not_told(tmp_path):
    with pytest.raises(DataError, match=r"x.jsonl: its format is not known \(keys: who\); name one with --format"):
        imported(tmp_path, write(tmp_path / "x.jsonl", [{"who": "me"}]))
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    turns = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    both = write(tmp_path / "x.jsonl", [chat | turns, chat])
    with pytest.raises(DataError, match=r"it could be openai \(2 of .*\), sharegpt \(1 of"):
        imported(tmp_path, both)
    rows, result, _ = imported(tmp_path, both, format="sharegpt")
    assert (len(rows), result.skipped) == (1, {"no messages": 1})
    with pytest.raises(UsageError, match=r"'langfus' is not known \(nearest: langfuse\)"):
        imported(tmp_path, both, format="langfus")


def test_no_format_takes_another_s_fixture():
    for path in sorted(FIXTURES.iterdir()):
        if path.suffix == ".csv":
            continue
        text = path.read_text("utf-8")
        lines = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
        for row in lines if isinstance(lines, list) else [lines]:
            assert sum(known.recognise(row) for known in FORMATS.values()) == 1, path.name


def test_the_output_is_whole_or_not_there(tmp_path):
    out = tmp_path / "raw" / "a.jsonl"
    with pytest.raises(DataError, match="1 no assistant"):
        import_files([write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])], out)
    assert list(out.parent.iterdir()) == []
    out.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        import_files([FIXTURES / "openai.jsonl"], out)
    assert out.read_text() == "mine"


def run_cli(monkeypatch, capsys, *arguments):
    from attar.cli import main

    monkeypatch.setattr("sys.argv", ["attar", "import", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run_cli(monkeypatch, capsys, FIXTURES / "exchanges.jsonl", "--explain")
    assert code == 0
    assert out.splitlines()[0] == "exchanges.jsonl line 2: failed call: status is 429"
    assert "raw/exchanges.jsonl: 3 conversations from 5 rows" in out
    assert "  1 calls are further turns of a conversation" in out
    assert "  1 skipped: failed call" in out
    code, _, err = run_cli(monkeypatch, capsys, FIXTURES / "exchanges.jsonl")
    assert (code, err) == (2, "attar: --out: raw/exchanges.jsonl exists; name another file, or delete it first\n")
    trl = ("--out", "b.jsonl", "--format", "trl", "--json", "--explain", "--no-merge")
    code, out, _ = run_cli(monkeypatch, capsys, FIXTURES / "trl.jsonl", *trl)
    told = json.loads(out)
    assert (code, told["out"], told["conversations"], told["skipped"]) == (0, "b.jsonl", 5, {"undesired": 1})
    assert told["skipped_rows"] == [
        {
            "file": "trl.jsonl",
            "number": 5,
            "reason": "undesired",
            "detail": "the row's label says that its completion is not wanted",
        }
    ]

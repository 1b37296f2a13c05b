import asyncio
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx2
import pytest

from attar.collect.exchange import conversation_of
from attar.collect.streams import unpack
from attar.data.conversations import BadRow
from attar.errors import RecipeError, UsageError
from attar.recipe import Record, parse_recipe
from recording import END, STREAM, Scripted, answer, client, event, part, recording

CHAT = "/v1/chat/completions"
KEY = "sk-not-a-shape-that-rules-know"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
CALLS = [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"q": "x"}'}}]


def completion(content, **message):
    message = {"role": "assistant", "content": content} | message
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": USAGE}


def chunk(delta, finish=None, **more):
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return event({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]} | more)


def says(*steps):
    def script(*_):
        yield from steps

    return script


def everything(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file()).decode()


def ask(text="hi", **more):
    return {"model": "m", "messages": [{"role": "user", "content": text}]} | more


def test_a_call_becomes_a_row(tmp_path):
    with (
        Scripted(says(answer(completion("yo"), extra="x-request-id: r1\r\nset-cookie: c=1\r\n"))) as upstream,
        recording(upstream.url, tmp_path, workload="mail") as it,
    ):
        before = time.time()
        request = ask(tools=TOOLS, temperature=0.5)
        headers = {"x-attar-episode": "e1", "x-attar-user": "u1", "user-agent": "me"}
        got = it.http.post(CHAT + "?api-version=2&sig=abcdef", json=request, headers=headers)
        assert got.json() == completion("yo")
    (row,) = it.rows()
    assert row["id"] == got.headers["x-attar-id"]
    assert abs(time.mktime(time.strptime(row["timestamp"][:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone - before) < 60
    timing = row.pop("timing")
    assert 0 < timing["headers"] <= timing["first_byte"] <= timing["total"]
    assert timing["first_token"] is None
    fixed = {k: v for k, v in row.items() if k not in ("id", "timestamp", "request_headers")}
    assert fixed == {
        "schema": 1,
        "workload": "mail",
        "episode": "e1",
        "user": "u1",
        "provider": "openai",
        "method": "POST",
        "path": CHAT,
        "query": {"api-version": "2", "sig": "[REDACTED]"},
        "status": 200,
        "complete": True,
        "problems": [],
        "request": request,
        "response_headers": {"content-type": "application/json", "x-request-id": "r1"},
        "response": completion("yo"),
        "stream": False,
        "events_common": {},
        "events": [],
        "usage": USAGE,
        "redacted": {},
        "outcomes": [],
    }
    assert row["request_headers"] == {"accept": "*/*", "user-agent": "me", "content-type": "application/json"}


def test_a_stream_becomes_a_row_and_keeps_its_events(tmp_path):
    read = threading.Semaphore(0)
    common = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}

    def script(*_):
        yield STREAM
        for i, delta in enumerate(({"role": "assistant"}, {"content": "Hel"}, {"content": "lo"}, {})):
            yield chunk(delta, None if delta else "stop")
            # The text comes after the client has read the first byte, and so in another part.
            assert i or read.acquire(timeout=100)
        yield event(common | {"choices": [], "usage": USAGE})
        yield event("[DONE]")
        yield END

    text = ""
    with (
        Scripted(script) as upstream,
        recording(upstream.url, tmp_path) as it,
        it.http.stream("POST", CHAT, json=ask(stream=True)) as got,
    ):
        for data in got.iter_text():
            text += data
            read.release()
    (row,) = it.rows()
    assert row["response"]["choices"][0]["message"] == {"role": "assistant", "content": "Hello"}
    assert row["response"]["usage"] == row["usage"] == USAGE
    assert (row["stream"], row["complete"], row["problems"]) == (True, True, [])
    assert row["events_common"] == common
    # The stream that the client saw can be written down again from the row.
    events = unpack(row["events_common"], row["events"])
    said = [part for part in text.split("\n\n") if part]
    wanted = [part if "[DONE]" in part else json.loads(part.removeprefix("data: ")) for part in said]
    assert [e["raw"] if "raw" in e else e["data"] for e in events] == wanted
    assert row["timing"]["first_token"] > row["timing"]["first_byte"]
    assert [e["ms"] for e in events] == sorted(e["ms"] for e in events)


def test_nothing_secret_reaches_the_disk(tmp_path):
    mail, phone = "alice@example.com", "+49 151 23456789"
    pieces = ["Write to ali", "ce@exam", "ple.com or +49 15", "1 23456789."]

    def script(method, target, headers, body):
        assert headers["authorization"] == f"Bearer {KEY}"
        assert mail in body.decode()
        if json.loads(body).get("stream"):
            yield STREAM
            for text in pieces:
                yield chunk({"content": text}, logprobs={"content": [{"token": text}]})
            yield END
        else:
            message = f"Incorrect API key provided: {KEY}"
            yield answer({"error": {"message": message}}, "401 Unauthorized", extra=f"x-request-id: {mail}\r\n")

    own = {"order": r"ORD-\d+"}
    headers = {"authorization": f"Bearer {KEY}", "x-api-key": "x-key-123456", "api-key": "az-key-123456"}
    headers |= {"cookie": "session=abc123456", "x-attar-user": mail, "x-unknown-secret": "unknown-1234"}
    with Scripted(script) as upstream, recording(upstream.url, tmp_path, patterns=own) as it:
        it.http.headers.update(headers)
        text = f"I am {mail}, {phone}, order ORD-77 and {KEY}, x-key-123456"
        assert KEY in it.http.post(CHAT + "?key=query-key-123", json=ask(text)).text
        assert "ple.com" in it.http.post(CHAT, json=ask(text, stream=True)).text
        assert it.http.post("/attar/outcome", json={"episode": mail, "outcome": f"ask {mail}"}).status_code == 200
    written = everything(tmp_path)
    secrets = [mail, "ali", "ce@", "ple.com", phone, "23456789", "ORD-77", KEY]
    secrets += ["x-key", "az-key", "session", "query-key", "unknown-1234"]
    assert [secret for secret in secrets if secret in written] == []
    first, second = it.rows()
    assert first["request"]["messages"][0]["content"] == "I am [EMAIL], [PHONE], order [ORDER] and [KEY], [KEY]"
    assert first["response"]["error"]["message"] == "Incorrect API key provided: [KEY]"
    assert first["response_headers"]["x-request-id"] == "[EMAIL]"
    assert first["redacted"] == {"email": 2, "key": 3, "order": 1, "phone": 1}
    assert second["response"]["choices"][0]["message"]["content"] == "Write to [EMAIL] or [PHONE]."
    assert first["user"] == second["user"] != mail
    contents = [e["data"]["choices"][0]["delta"]["content"] for e in second["events"]]
    assert contents == ["Write to [EMAIL]", "", " or [PHONE]", "."]


def test_the_tokens_of_what_was_redacted_go_with_it(tmp_path):
    logprobs = {"content": [{"token": "a@b.co", "logprob": -1.0}]}

    def script(method, target, headers, body):
        made = completion("mail a@b.co" if "please" in body.decode() else "fine")
        made["choices"][0]["logprobs"] = logprobs if "please" in body.decode() else {"content": [{"token": "fine"}]}
        made["prompt_logprobs"] = [{"1": 0.5}]
        yield answer(made)

    with Scripted(script) as upstream, recording(upstream.url, tmp_path) as it:
        for text in ("please", "no c@d.co", "no"):
            it.http.post(CHAT, json=ask(text))
    kept = [(r["response"]["choices"][0]["logprobs"], r["response"]["prompt_logprobs"]) for r in it.rows()]
    fine = {"content": [{"token": "fine"}]}
    assert kept == [(None, None), (fine, None), (fine, [{"1": 0.5}])]


@pytest.mark.parametrize(
    ("steps", "status", "problem", "response"),
    [
        (
            [answer({"error": {"code": "rate_limit"}}, "429 Too Many Requests", extra="retry-after: 3\r\n")],
            429,
            None,
            None,
        ),
        ([answer(b"<html>bad gateway", "502 Bad Gateway", "text/html")], 502, None, "<html>bad gateway"),
        ([answer(b"{not json")], 200, "it is no JSON", "{not json"),
        ([None], None, "gave no answer", None),
        ([100], None, "did not answer within 0.4 s", None),
        ([STREAM, chunk({"content": "par"}), 0.02, None], 200, "broke off", "par"),
        ([STREAM, chunk({"content": "par"}), 100], 200, "did not answer within 0.4", "par"),
        ([STREAM, part(b"data: {oops\n\n"), chunk({"content": "par"}), END], 200, "1 event(s) of the stream", "par"),
        ([STREAM, chunk({"content": "par"}), event({"error": {"message": "x"}}), END], 200, "an error came", "par"),
        (
            [STREAM, event({"choices": [{"delta": {"content": 7}}, {"delta": [1]}]}), END],
            200,
            "do not fit together",
            None,
        ),
        ([answer(b"\xff\xd8\xff", kind="image/jpeg")], 200, None, {"omitted": "image/jpeg", "bytes": 3}),
        ([answer(b"x", extra="content-encoding: br\r\n")], 200, "content-encoding br is not read", None),
    ],
)
def test_what_goes_wrong_upstream_is_recorded_as_it_was(tmp_path, steps, status, problem, response):
    with (
        Scripted(says(*steps)) as upstream,
        recording(upstream.url, tmp_path, timeout_s=0.4 if steps[-1] == 100 else 60.0) as it,
    ):
        try:
            seen = it.http.post(CHAT, json=ask(stream=True)).status_code
        except httpx2.RemoteProtocolError:
            seen = 200
    assert seen == (status or (504 if steps == [100] else 502))
    (row,) = it.rows()
    assert row["status"] == status
    assert row["request"] == ask(stream=True)
    assert problem is None or any(problem in p for p in row["problems"])
    assert (row["problems"] == []) == (problem is None)
    assert row["complete"] == (
        status is not None and not any("broke off" in p or "within 0.4" in p for p in row["problems"])
    )
    if response == "par":
        assert row["response"]["choices"][0]["message"]["content"] == "par"
    elif response is not None:
        assert row["response"] == response
    if status == 429:
        assert row["response"] == {"error": {"code": "rate_limit"}}
        assert row["response_headers"]["retry-after"] == "3"
    with pytest.raises(BadRow):
        conversation_of(row | {"response": None})


def test_packed_answers_and_events_are_read(tmp_path):
    stream = gzip.compress(b'data: {"choices": [{"index": 0, "delta": {"content": "yo"}}]}\n\n')
    packed = "content-encoding: gzip\r\n"

    def script(method, target, headers, body):
        if json.loads(body).get("stream"):
            yield answer(stream, kind="text/event-stream", extra=packed)
        else:
            yield answer(gzip.compress(json.dumps(completion("yo")).encode()), extra=packed)

    with Scripted(script) as upstream, recording(upstream.url, tmp_path) as it:
        it.http.post(CHAT, json=ask())
        it.http.post(CHAT, json=ask(stream=True))
    assert [r["response"]["choices"][0]["message"]["content"] for r in it.rows()] == ["yo", "yo"]


def test_a_message_of_ten_megabytes(tmp_path):
    text = "word " * 2_000_000 + "a@b.co"
    with (
        Scripted(lambda m, t, h, body: [answer({"bytes": len(body)})]) as upstream,
        recording(upstream.url, tmp_path) as it,
    ):
        request = ask(text)
        assert it.http.post(CHAT, json=request).json()["bytes"] > 10_000_000
    (row,) = it.rows()
    assert row["request"]["messages"][0]["content"] == text.replace("a@b.co", "[EMAIL]")


def test_outcomes_and_health(tmp_path):
    with Scripted(says(answer(completion("yo")))) as upstream, recording(upstream.url, tmp_path) as it:
        ids = [it.http.post("/w/mail/e/7" + CHAT, json=ask()).headers["x-attar-id"] for _ in range(2)]
        assert it.http.post("/attar/outcome", json={"episode": "7", "outcome": {"solved": True}}).json() == {
            "stored": True
        }
        it.http.post("/attar/outcome", json={"exchange": ids[1], "outcome": 0.5})
        it.http.post("/attar/outcome", json={"episode": "7", "workload": "other", "outcome": 0})
        for body, said in [
            ({"episode": "7"}, "outcome is missing"),
            ({"outcome": 1}, "either the episode or the exchange"),
            ({"episode": "7", "exchange": "x", "outcome": 1}, "either the episode or the exchange"),
            ({"episode": 7, "outcome": 1}, "episode is 7"),
            ({"episode": "7", "outcome": 1, "rewrad": 1}, "rewrad: unknown"),
            ([], "wanted"),
        ]:
            response = it.http.post("/attar/outcome", json=body)
            assert (response.status_code, said in response.json()["error"]["message"]) == (400, True), said
        assert it.http.post("/attar/outcome", content=b"{").status_code == 400
        health = it.http.get("/attar/health").json()
        assert it.http.get("/attar/nothing").status_code == 404
    assert health["status"] == "ok"
    assert health["lost"] == {}
    assert health["outcomes"] == 3
    assert health["upstream"] == upstream.url
    assert [[o["outcome"] for o in row["outcomes"]] for row in it.rows()] == [
        [{"solved": True}],
        [0.5, {"solved": True}],
    ]


def test_calls_pass_when_nothing_can_be_written(tmp_path, monkeypatch):
    from attar.collect import store

    def full(*_):
        raise OSError(28, "No space left on device")

    with Scripted(says(answer(completion("yo")))) as upstream, recording(upstream.url, tmp_path) as it:
        monkeypatch.setattr(store.os, "write", full)
        for _ in range(3):
            assert it.http.post(CHAT, json=ask()).json() == completion("yo")
        deadline = time.monotonic() + 100
        while (health := it.http.get("/attar/health").json())["lost"] != {"write failed": 3}:
            assert time.monotonic() < deadline
        assert health["status"] == "losing"
        assert "No space left" in health["last_error"]
        assert it.http.post("/attar/outcome", json={"episode": "e", "outcome": 1}).status_code == 503
    assert it.writer.recorded == 0


def test_a_token_guards_all_of_it(tmp_path):
    with (
        Scripted(says(answer(completion("yo")))) as upstream,
        recording(upstream.url, tmp_path, token="0123456789abcdef") as it,
    ):
        assert it.http.get("/attar/health").status_code == 401
        assert it.http.post("/attar/outcome", json={"episode": "e", "outcome": 1}).status_code == 401
        assert it.http.post(CHAT, json=ask()).status_code == 401
        assert it.http.get("/t/0123456789abcdef/attar/health").json()["recorded"] == 0
        assert it.http.post("/t/0123456789abcdef/e/5" + CHAT, json=ask()).status_code == 200
    (row,) = it.rows()
    assert (row["episode"], row["path"]) == ("5", CHAT)
    assert "0123456789abcdef" not in everything(tmp_path)


# With the providers' own clients


def chat_script(method, target, headers, body):
    if not json.loads(body).get("stream"):
        yield answer(completion(None, tool_calls=CALLS))
        return
    yield STREAM
    yield chunk({"role": "assistant", "content": None})
    for text in ('{"q"', ': "x"}'):
        head = {"id": "c1", "type": "function"} if text == '{"q"' else {}
        function = {"arguments": text} | ({"name": "look"} if head else {})
        yield chunk({"tool_calls": [{"index": 0, "function": function} | head]})
    yield chunk({}, "tool_calls")
    yield event("[DONE]")
    yield END


def test_openais_client_sync_and_async_streaming_and_not(tmp_path):
    openai = pytest.importorskip("openai")
    request = ask("look for x") | {"tools": TOOLS}

    async def asynchronous(url):
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY) as api:
            whole = await api.chat.completions.create(**request)
            stream = await api.chat.completions.create(**request, stream=True)
            return whole, [part async for part in stream]

    with Scripted(chat_script) as upstream, recording(upstream.url, tmp_path) as it:
        with openai.OpenAI(base_url=it.url + "/w/search/e/1/v1", api_key=KEY) as api:
            whole = api.chat.completions.create(**request)
            parts = list(api.chat.completions.create(**request, stream=True))
        others = asyncio.run(asynchronous(it.url + "/w/search/e/1/v1"))
    assert whole.choices[0].message.tool_calls[0].function.arguments == '{"q": "x"}'
    assert others[0].model_dump() == whole.model_dump()
    assert "".join(p.choices[0].delta.tool_calls[0].function.arguments for p in parts if p.choices[0].delta.tool_calls)
    assert [p.model_dump() for p in others[1]] == [p.model_dump() for p in parts]
    rows = it.rows()
    assert [(r["workload"], r["episode"], r["path"], r["stream"]) for r in rows] == [
        ("search", "1", CHAT, s) for s in (False, True, False, True)
    ]
    # Streamed or not, it is the same conversation that a student learns.
    conversations = [conversation_of(row) for row in rows]
    assert len({c.id for c in conversations}) == 1
    assert conversations[0].messages[-1].tool_calls[0].arguments == {"q": "x"}
    assert conversations[0].tools == tuple(TOOLS)
    assert conversations[0].group == "1"
    assert KEY not in everything(tmp_path)


def message_script(method, target, headers, body):
    block = {"type": "tool_use", "id": "t1", "name": "look", "input": {"q": "x"}}
    message = {"id": "m", "type": "message", "role": "assistant", "model": "m", "content": [block]}
    message |= {"stop_reason": "tool_use", "stop_sequence": None, "usage": {"input_tokens": 3, "output_tokens": 5}}
    if not json.loads(body).get("stream"):
        yield answer(message)
        return
    start = message | {"content": [], "stop_reason": None, "usage": {"input_tokens": 3, "output_tokens": 1}}
    delta = {"type": "input_json_delta", "partial_json": '{"q": "x"}'}
    yield STREAM
    for data in (
        {"type": "message_start", "message": start},
        {"type": "content_block_start", "index": 0, "content_block": block | {"input": {}}},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "tool_use", "stop_sequence": None},
            "usage": {"output_tokens": 5},
        },
        {"type": "message_stop"},
    ):
        yield event(data, data["type"])
    yield END


def test_anthropics_client_sync_and_async_streaming_and_not(tmp_path):
    anthropic = pytest.importorskip("anthropic")
    tools = [{"name": "look", "input_schema": {"type": "object"}}]
    request = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "look for x"}], "tools": tools}

    async def asynchronous(url):
        async with anthropic.AsyncAnthropic(base_url=url, api_key=KEY) as api:
            await api.messages.create(**request)
            async with api.messages.stream(**request) as stream:
                return await stream.get_final_message()

    with Scripted(message_script) as upstream, recording(upstream.url, tmp_path) as it:
        with anthropic.Anthropic(base_url=it.url, api_key=KEY, default_headers={"x-attar-episode": "9"}) as api:
            whole = api.messages.create(**request)
            with api.messages.stream(**request) as stream:
                assert stream.get_final_message().content[0].input == whole.content[0].input == {"q": "x"}
        assert asyncio.run(asynchronous(it.url)).stop_reason == "tool_use"
    rows = it.rows()
    assert [(r["provider"], r["episode"], r["stream"]) for r in rows] == [
        ("anthropic", e, s) for e in ("9", None) for s in (False, True)
    ]
    assert all(row["response"] == rows[0]["response"] for row in rows)
    assert rows[1]["usage"] == {"input_tokens": 3, "output_tokens": 5}
    assert KEY not in everything(tmp_path)
    with pytest.raises(BadRow, match="no call of OpenAI's chat"):
        conversation_of(rows[0])


def test_a_clients_errors_are_the_providers_own(tmp_path):
    openai, anthropic = pytest.importorskip("openai"), pytest.importorskip("anthropic")

    def script(method, target, headers, body):
        model = json.loads(body)["model"]
        if model == "busy":
            yield answer({"error": {"message": "slow down", "type": "rate_limit"}}, "429 Too Many Requests")
        elif model == "cut":
            yield STREAM
            yield event({"type": "ping"}, "ping")
            yield 0.05
            yield None
        else:
            yield 100

    with Scripted(script) as upstream, recording(upstream.url, tmp_path, timeout_s=0.3) as it:
        with openai.OpenAI(base_url=it.url + "/v1", api_key=KEY, max_retries=0) as api:
            ask_openai = {"messages": [{"role": "user", "content": "hi"}]}
            with pytest.raises(openai.RateLimitError, match="slow down"):
                api.chat.completions.create(model="busy", **ask_openai)
            with pytest.raises(openai.InternalServerError, match="did not answer within"):
                api.chat.completions.create(model="slow", **ask_openai)
            with pytest.raises(openai.APIError, match="broke off"):
                list(api.chat.completions.create(model="cut", stream=True, **ask_openai))
        with anthropic.Anthropic(base_url=it.url, api_key=KEY, max_retries=0) as api:
            with pytest.raises(anthropic.APIStatusError, match="did not answer within"):
                api.messages.create(model="slow", max_tokens=5, **ask_openai)
            with pytest.raises(anthropic.APIStatusError, match="broke off"):
                list(api.messages.create(model="cut", max_tokens=5, stream=True, **ask_openai))
    assert [row["complete"] for row in it.rows()] == [True, False, False, False, False]


# Recipe and command line


def test_the_recipes_part():
    base = {"name": "n", "task": "chat", "teacher": {"model": "hf:x"}, "data": {"train": "t.jsonl"}}
    recipe = parse_recipe(base | {"collect": {"record": {"upstream": "https://api.example.com", "folder": "raw"}}}, "r")
    assert recipe.collect.record.port == 8100
    assert parse_recipe(base, "r").collect.record is None
    for wrong, said in [
        ({"upstream": "api.example.com"}, "is no address"),
        ({"upstream": "https://x", "prot": 1}, r"prot: unknown key.*nearest: port"),
        ({"upstream": "https://x", "patterns": {"a": "("}}, "is no regular expression"),
        ({"upstream": "https://x", "patterns": {"a": "x*"}}, "must find something"),
        ({"upstream": "https://x", "patterns": {"a b": "x"}}, "have a name of letters"),
        ({"upstream": "https://x", "port": 70000}, "port"),
        ({"upstream": "https://x", "redact": ["names"]}, "names"),
        ({}, "upstream: required"),
    ]:
        with pytest.raises(RecipeError, match=said):
            parse_recipe(base | {"collect": {"record": wrong}}, "r")


def test_a_recorder_that_others_reach_needs_a_token(tmp_path, monkeypatch):
    from attar.collect.record import record

    settings = Record(upstream="http://localhost:1", host="0.0.0.0", port=0)
    with pytest.raises(UsageError, match=r"no token is set.*--token-env"):
        record(settings, tmp_path, print)
    monkeypatch.setenv("ATTAR_TOKEN", "short")
    with pytest.raises(UsageError, match="ATTAR_TOKEN is 5 characters long"):
        record(settings.model_copy(update={"token_env": "ATTAR_TOKEN"}), tmp_path, print)
    assert not list(tmp_path.iterdir())


def command(*arguments, cwd):
    script = "import sys; sys.argv[0] = 'attar'; from attar.cli import main; main()"
    line = [sys.executable, "-c", script, "record", *arguments]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)


def test_the_command_records_until_it_is_stopped_and_deletes(tmp_path):
    with Scripted(says(answer(completion("yo")))) as upstream:
        options = (
            "--upstream",
            upstream.url + "/v1",
            "--port",
            "0",
            "--folder",
            "raw",
            "--redact",
            "staff=Jo\\w*",
            "--json",
        )
        first = command(*options, cwd=tmp_path)
        try:
            line = first.stderr.readline()
            url = line.split("base_url to ")[1].split("/v1")[0]
            with client(url) as http:
                http.post("/e/1" + CHAT, json=ask("ask Joanna"))
                http.post("/e/2" + CHAT, json=ask("ask Joanna"))
            port = url.rsplit(":", 1)[1]
            others = [
                command("--upstream", upstream.url, "--folder", "other", "--port", port, cwd=tmp_path),
                command("--upstream", upstream.url, "--folder", "raw", "--port", "0", cwd=tmp_path),
            ]
            said = [other.communicate(timeout=200)[1] for other in others]
            first.send_signal(signal.SIGTERM)
            out, rest = first.communicate(timeout=200)
        finally:
            first.kill()
    assert f"port {port} of 127.0.0.1 is taken" in said[0]
    assert "another recorder is at work in raw" in said[1]
    assert [other.returncode for other in others] == [2, 1]
    assert (first.returncode, rest) == (0, "")
    assert json.loads(out)["recorded"] == 2
    assert "Joanna" not in everything(tmp_path / "raw")

    from typer.testing import CliRunner

    from attar.cli import app

    run = CliRunner()
    os.chdir(tmp_path)
    dry = run.invoke(app, ["record", "--folder", "raw", "--delete-episode", "1", "--dry-run", "--json"])
    assert json.loads(dry.stdout) == {"would_delete": 1}
    done = run.invoke(app, ["record", "--folder", "raw", "--delete-episode", "1", "--json"])
    assert json.loads(done.stdout) == {"erased": 1}
    rows = [
        json.loads(line) for path in (tmp_path / "raw").glob("exchanges-*") for line in path.read_text().splitlines()
    ]
    assert [(r["episode"], r["request"]["messages"][0]["content"]) for r in rows] == [("2", "ask [STAFF]")]


def test_what_the_command_is_told(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from attar.cli import app

    monkeypatch.chdir(tmp_path)
    run = CliRunner()
    assert isinstance(run.invoke(app, ["record"]).exception, UsageError)
    recipe = "name: n\ntask: chat\nteacher: {model: 'hf:x'}\ndata: {train: t.jsonl}\n"
    recipe += "collect: {record: {upstream: 'https://a.example', keep_days: 7, folder: mine}}\n"
    (tmp_path / "attar.yaml").write_text(recipe)
    result = run.invoke(
        app, ["record", "attar.yaml", "--port", "1234", "--set", "collect.record.keep_days=9", "--dry-run", "--json"]
    )
    plan = json.loads(result.stdout)["plan"]
    assert (plan["port"], plan["keep_days"], plan["folder"]) == (1234, 9, str(tmp_path / "mine"))
    assert plan["upstream"] == "https://a.example"
    assert "keep_days: 7" in run.invoke(app, ["record", "--dry-run"]).stdout
    result = run.invoke(app, ["record", "--upstream", "nowhere", "--dry-run"])
    assert isinstance(result.exception, RecipeError)
    assert "is no address" in str(result.exception)
    assert "NAME=REGEX" in run.invoke(app, ["record", "--upstream", "http://x", "--redact", "x"]).output

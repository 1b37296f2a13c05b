import json

import pytest

from attar.collect.streams import assemble, fragments, pack, parse_events, parse_json, unpack


def chunks(*deltas, **more):
    return [{"ms": 0.0, "data": {"id": "c", "object": "chat.completion.chunk", "choices": [d]} | more} for d in deltas]


def delta(index=0, finish=None, **fields):
    return {"index": index, "delta": fields, "finish_reason": finish}


def call(index, name=None, arguments=None, id=None):
    function = {k: v for k, v in (("name", name), ("arguments", arguments)) if v is not None}
    return {"index": index, "function": function} | ({} if id is None else {"id": id, "type": "function"})


def test_events_whatever_the_cuts_and_line_ends():
    for end in ("\n", "\r\n"):
        lines = ["event: a", 'data: {"x":', "data: 1}", "", ": hello", "", "data:[DONE]", "", "data: [1]", "", ""]
        text = end.join(lines)
        wanted = [{"event": "a", "data": {"x": 1}}, {"raw": ": hello"}, {"raw": "data:[DONE]"}, {"data": [1]}]
        whole = text.encode()
        for size in (1, 2, 3, 7, len(whole)):
            pieces = [(float(i), whole[i : i + size]) for i in range(0, len(whole), size)]
            events = parse_events(pieces)
            assert [{k: v for k, v in event.items() if k != "ms"} for event in events] == wanted


def test_an_event_has_the_time_at_which_it_was_whole():
    events = parse_events([(1.0, b'data: {"a"'), (2.0, b': 1}\n\ndata: {"a": 2}'), (3.0, b"\n\n")])
    assert [(event["ms"], event["data"]["a"]) for event in events] == [(2.0, 1), (3.0, 2)]


@pytest.mark.parametrize(
    "text",
    ['data: {"a": ', 'data: {"a": NaN}', "data: x", "nonsense", "id: 7\ndata: {}", "data: {}\nretry: 5", "event: a"],
)
def test_what_is_no_event_of_json_stays_as_it_is(text):
    assert parse_events([(0.0, text.encode() + b"\n\n")]) == [{"ms": 0.0, "raw": text}]


def test_of_a_tail_that_was_cut_off_the_length_stays():
    assert parse_events([(0.0, b'data: {}\n\ndata: {"a'), (5.0, b"\xff")])[1:] == [{"ms": 5.0, "cut_bytes": 10}]
    assert parse_events([(0.0, b'event: x\ndata: {"a"}\n')]) == [{"ms": 0.0, "cut_bytes": 21}]


def test_packing_loses_nothing():
    events = [
        {"ms": 1.0, "data": {"id": "a", "n": 1, "m": "x", "z": None}},
        {"ms": 2.0, "raw": "data: [DONE]"},
        {"ms": 3.0, "data": {"id": "a", "n": True, "m": "x", "z": None}},
        {"ms": 4.0, "data": [1]},
    ]
    common, packed = pack(events)
    assert common == {"id": "a", "m": "x", "z": None}
    assert packed[0] == {"ms": 1.0, "data": {"n": 1}}
    assert json.dumps(unpack(common, packed), sort_keys=True) == json.dumps(events, sort_keys=True)
    assert pack(events[:2]) == ({}, events[:2])


def test_chat_is_put_together():
    events = [
        *chunks(delta(role="assistant", content=None)),
        *chunks(delta(reasoning_content="Hm"), delta(reasoning_content=", so")),
        *chunks(delta(content="Hel"), delta(role="assistant", content="lo")),
        *chunks(delta(tool_calls=[call(0, "look", "", id="c1")])),
        *chunks(delta(tool_calls=[call(1, "get_", '{"a', id="c2")]), delta(tool_calls=[call(0, None, '{"q": 1}')])),
        *chunks(delta(tool_calls=[call(1, "it", '": 2}')])),
        *chunks(delta(finish="tool_calls")),
        {
            "ms": 0.0,
            "data": {"id": "c", "object": "chat.completion.chunk", "choices": [], "usage": {"total_tokens": 3}},
        },
        {"ms": 0.0, "raw": "data: [DONE]"},
    ]
    function = {"look": '{"q": 1}', "get_it": '{"a": 2}'}
    calls = [
        {"function": {"name": name, "arguments": text}, "id": f"c{i}", "type": "function"}
        for i, (name, text) in enumerate(function.items(), start=1)
    ]
    message = {"role": "assistant", "content": "Hello", "reasoning_content": "Hm, so", "tool_calls": calls}
    assert assemble(events) == {
        "id": "c",
        "object": "chat.completion",
        "usage": {"total_tokens": 3},
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}],
    }


def test_repeated_names_ids_and_roles_stand_once():
    part = {"role": "assistant", "tool_calls": [call(0, "look", "{", id="c")]}
    rest = {"role": "assistant", "tool_calls": [call(0, "look", "}", id="c")]}
    message = assemble(chunks(delta(**part), delta(**rest)))["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["tool_calls"] == [{"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}]


def test_calls_without_an_index_stay_apart():
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in "ab"]
    assert assemble(chunks(delta(tool_calls=calls[:1]), delta(tool_calls=calls[1:])))["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": calls,
    }


def test_several_choices_and_their_logprobs():
    parts = [delta(1, content="b"), delta(0, content="a"), delta(1, content="B")]
    for part in parts:
        part["logprobs"] = {"content": [{"token": part["delta"]["content"]}]}
    choices = assemble(chunks(*parts))["choices"]
    assert [(c["message"]["content"], [t["token"] for t in c["logprobs"]["content"]]) for c in choices] == [
        ("a", ["a"]),
        ("bB", ["b", "B"]),
    ]


def test_a_completion_is_put_together():
    parts = [{"index": 0, "text": "ab", "finish_reason": None}, {"index": 0, "text": "c", "finish_reason": "stop"}]
    events = [{"ms": 0.0, "data": {"object": "text_completion", "choices": [part]}} for part in parts]
    assert assemble(events) == {
        "object": "text_completion",
        "choices": [{"index": 0, "text": "abc", "finish_reason": "stop"}],
    }


def anthropic(*datas):
    start = {"id": "m", "type": "message", "role": "assistant", "content": [], "usage": {"input_tokens": 3}}
    return [{"ms": 0.0, "event": d["type"], "data": d} for d in ({"type": "message_start", "message": start}, *datas)]


def block(index, content, *deltas):
    yield {"type": "content_block_start", "index": index, "content_block": content}
    for item in deltas:
        yield {"type": "content_block_delta", "index": index, "delta": item}
    yield {"type": "content_block_stop", "index": index}


def test_a_message_is_put_together():
    events = anthropic(
        {"type": "ping"},
        *block(
            0,
            {"type": "thinking", "thinking": "", "signature": ""},
            {"type": "thinking_delta", "thinking": "Hm"},
            {"type": "thinking_delta", "thinking": "."},
            {"type": "signature_delta", "signature": "c2ln"},
        ),
        *block(
            1, {"type": "text", "text": ""}, {"type": "text_delta", "text": "Hel"}, {"type": "text_delta", "text": "lo"}
        ),
        *block(
            2,
            {"type": "tool_use", "id": "t", "name": "look", "input": {}},
            {"type": "input_json_delta", "partial_json": '{"q"'},
            {"type": "input_json_delta", "partial_json": ": 1}"},
        ),
        *block(3, {"type": "tool_use", "id": "u", "name": "now", "input": {}}),
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 5}},
        {"type": "message_stop"},
    )
    assert assemble(events) == {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"},
            {"type": "text", "text": "Hello"},
            {"type": "tool_use", "id": "t", "name": "look", "input": {"q": 1}},
            {"type": "tool_use", "id": "u", "name": "now", "input": {}},
        ],
        "stop_reason": "tool_use",
        "usage": {"input_tokens": 3, "output_tokens": 5},
    }


def test_a_message_that_broke_off_keeps_what_came():
    events = anthropic(
        {"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use", "name": "f", "input": {}}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": '{"q'}},
        {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
    )
    message = assemble(events)
    assert message["content"] == [{"type": "tool_use", "name": "f", "input": '{"q'}]
    assert message["error"]["type"] == "overloaded_error"


def test_responses_carry_their_whole_object():
    datas = [
        {"type": "response.created", "response": {"id": "r", "output": []}},
        {"type": "response.output_text.delta", "item_id": "i", "delta": "Hi"},
        {"type": "response.completed", "response": {"id": "r", "output": [{"content": "Hi"}], "usage": {"n": 1}}},
    ]
    assert assemble([{"ms": 0.0, "data": data} for data in datas]) == datas[2]["response"]
    assert [f.holder[f.name] for f in fragments(datas[1])] == ["Hi"]


def test_errors_alone_and_nothing_at_all():
    assert assemble([{"ms": 0.0, "data": {"error": {"message": "no"}}}]) == {"error": {"message": "no"}}
    assert assemble([{"ms": 0.0, "data": {"x": 1}}, {"ms": 0.0, "data": [1]}, {"ms": 0.0, "raw": ": x"}]) is None


def test_fragments_of_one_text_share_a_key_and_others_do_not():
    datas = [
        {
            "choices": [
                {"index": 1, "delta": {"content": "a", "tool_calls": [{"index": 0, "function": {"arguments": "b"}}]}}
            ]
        },
        {"choices": [{"index": 0, "delta": {"content": "c"}}, {"index": 1, "delta": {"content": "d"}}]},
        {"choices": [{"index": 1, "delta": {"tool_calls": [{"index": 1, "function": {"arguments": "e"}}]}}]},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "f"}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "g"}},
        {"choices": [{"index": 0, "text": "h"}], "model": "m"},
        {"delta": None, "choices": None},
        7,
    ]
    texts = {}
    for data in datas:
        for part in fragments(data):
            texts.setdefault(part.key, []).append(part.holder[part.name])
    spelt = sorted("".join(parts) for parts in texts.values())
    assert spelt == ["ad", "b", "c", "e", "f", "g", "h", "text_delta", "text_delta"]


def test_json_is_strict():
    with pytest.raises(ValueError):
        parse_json("[Infinity]")
    assert parse_json(b'{"a": 12345678901234567890}') == {"a": 12345678901234567890}

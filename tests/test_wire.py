import json

import pytest

from attar.data.conversations import BadRow
from attar.data.types import Conversation, Message, ToolCall
from attar.data.wire import (
    Usage,
    anthropic_body,
    anthropic_tool,
    openai_body,
    openai_tool,
    parse_anthropic_message,
    parse_anthropic_reply,
    parse_anthropic_request,
    parse_openai_reply,
)

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
        "strict": True,
    },
}
EPISODE = (
    Message("system", "Be brief."),
    Message("user", "Rain in Oslo and Bergen?"),
    Message(
        "assistant",
        "I look.",
        (ToolCall("a", "weather", {"town": "Oslo"}), ToolCall("b", "weather", {"town": "Bergen"})),
    ),
    Message("tool", "dry", tool_call_id="a"),
    Message("tool", "wet", tool_call_id="b"),
    Message("user", "Thanks. In one word?"),
    Message("assistant", "Bergen."),
)


def test_a_conversation_goes_to_anthropic_and_back_unchanged():
    body = json.loads(json.dumps(anthropic_body("m", EPISODE, max_tokens=9, tools=[TOOL])))
    assert parse_anthropic_request(body) == Conversation(EPISODE, (TOOL,))
    assert [turn["role"] for turn in body["messages"]] == ["user", "assistant", "user", "user", "assistant"]
    assert body["system"] == "Be brief."
    assert [block["tool_use_id"] for block in body["messages"][2]["content"]] == ["a", "b"]


def test_a_tool_goes_to_anthropic_and_back_unchanged():
    assert openai_tool(anthropic_tool(TOOL)) == TOOL
    bare = {"type": "function", "function": {"name": "now"}}
    assert anthropic_tool(bare) == {"name": "now", "input_schema": {"type": "object", "properties": {}}}


def test_a_tool_that_the_provider_runs_is_no_schema():
    with pytest.raises(BadRow, match="no tool with a schema"):
        openai_tool({"type": "web_search_20250305", "name": "web_search"})


@pytest.mark.parametrize(
    ("choice", "openai", "anthropic"),
    [
        ("auto", "auto", {"type": "auto"}),
        ("none", "none", {"type": "none"}),
        ("required", "required", {"type": "any"}),
        (
            "weather",
            {"type": "function", "function": {"name": "weather"}},
            {"type": "tool", "name": "weather"},
        ),
    ],
)
def test_the_choice_of_a_tool(choice, openai, anthropic):
    asked = {"max_tokens": 1, "tools": [TOOL], "tool_choice": choice}
    assert openai_body("m", EPISODE, **asked)["tool_choice"] == openai
    assert anthropic_body("m", EPISODE, **asked)["tool_choice"] == anthropic


def test_every_field_of_a_request_is_sent_and_no_other():
    schema = {"type": "object"}
    plain = openai_body("m", [Message("user", "hi")], max_tokens=5)
    assert plain == {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    full = openai_body(
        "m",
        [Message("user", "hi")],
        max_tokens=5,
        limit="max_completion_tokens",
        temperature=0.0,
        top_p=0.5,
        stop=["x"],
        seed=0,
        schema=schema,
        top_logprobs=0,
    )
    assert full == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 5,
        "temperature": 0.0,
        "top_p": 0.5,
        "stop": ["x"],
        "seed": 0,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        },
        "logprobs": True,
        "top_logprobs": 0,
    }
    theirs = anthropic_body(
        "m", [Message("user", "hi")], max_tokens=5, temperature=0.0, top_p=0.5, stop=["x"], schema=schema
    )
    assert theirs == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 5,
        "temperature": 0.0,
        "top_p": 0.5,
        "stop_sequences": ["x"],
        "output_config": {"format": {"type": "json_schema", "schema": schema}},
    }


def test_reasoning_and_marks_for_training_are_not_sent():
    thought = Message("assistant", "4", reasoning="2 and 2", train=False)
    assert openai_body("m", [thought], max_tokens=1)["messages"] == [{"role": "assistant", "content": "4"}]
    assert anthropic_body("m", [thought], max_tokens=1)["messages"] == [{"role": "assistant", "content": "4"}]


def test_calls_without_ids_get_them_and_so_do_their_answers():
    call = Message("assistant", "", (ToolCall(None, "weather", {}), ToolCall(None, "weather", {})))
    sent = openai_body("m", [call, Message("tool", "1"), Message("tool", "2")], max_tokens=1)["messages"]
    ids = [made["id"] for made in sent[0]["tool_calls"]]
    assert len(set(ids)) == 2
    assert [message["tool_call_id"] for message in sent[1:]] == ids


def _openai(message, finish="stop", **rest):
    return {"model": "m-1", "choices": [{"message": message, "finish_reason": finish, **rest}]}


def test_an_openai_reply():
    body = _openai({"role": "assistant", "content": "4", "reasoning_content": "2 and 2", "annotations": []})
    body["usage"] = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
    reply = parse_openai_reply(body)
    assert reply.message == Message("assistant", "4", reasoning="2 and 2")
    assert (reply.finish_reason, reply.usage, reply.model) == ("stop", Usage(7, 3, 4), "m-1")


@pytest.mark.parametrize(
    ("message", "finish", "reason", "content"),
    [
        ({"content": None, "refusal": "I cannot."}, "stop", "content_filter", "I cannot."),
        ({"content": None}, "content_filter", "content_filter", ""),
        ({"content": None, "reasoning": "so long"}, "length", "length", ""),
        ({"content": "a", "reasoning_content": None}, "length", "length", "a"),
        (
            {"content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
            "stop",
            "tool_calls",
            "",
        ),
    ],
)
def test_how_an_openai_reply_ends(message, finish, reason, content):
    reply = parse_openai_reply(_openai(message, finish))
    assert (reply.finish_reason, reply.message.content, reply.usage) == (reason, content, None)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("<html>", "malformed"),
        ({"error": "x"}, "malformed"),
        ({"choices": []}, "malformed"),
        ({"choices": [{}]}, "malformed"),
        (_openai({"content": "x"}, None), "unknown finish reason"),
        (_openai({"content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}), "bad tool call"),
        (_openai({"content": "x"}) | {"usage": {"prompt_tokens": -1}}, "malformed"),
    ],
)
def test_what_is_no_openai_reply(body, reason):
    with pytest.raises(BadRow) as caught:
        parse_openai_reply(body)
    assert caught.value.reason == reason


def test_an_anthropic_reply():
    body = {
        "model": "c-1",
        "stop_reason": "tool_use",
        "content": [
            {"type": "thinking", "thinking": "Oslo?", "signature": "s"},
            {"type": "redacted_thinking", "data": "xx"},
            {"type": "text", "text": "I ", "citations": None},
            {"type": "text", "text": "look."},
            {"type": "tool_use", "id": "a", "name": "weather", "input": {"town": "Oslo"}},
        ],
        "usage": {
            "input_tokens": 5,
            "cache_creation_input_tokens": 2,
            "cache_read_input_tokens": 3,
            "output_tokens": 4,
        },
    }
    reply = parse_anthropic_reply(body)
    assert reply.message == Message(
        "assistant", "I look.", (ToolCall("a", "weather", {"town": "Oslo"}),), reasoning="Oslo?"
    )
    assert (reply.finish_reason, reply.usage) == ("tool_calls", Usage(10, 4, 3, 2))


@pytest.mark.parametrize(
    ("stop", "reason"),
    [("end_turn", "stop"), ("stop_sequence", "stop"), ("max_tokens", "length"), ("refusal", "content_filter")],
)
def test_how_an_anthropic_reply_ends(stop, reason):
    assert parse_anthropic_reply({"content": [], "stop_reason": stop}).finish_reason == reason


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([{"type": "server_tool_use", "name": "web_search"}], "no text"),
        ([{"type": "tool_use", "name": "f", "input": "{}"}], "bad tool call"),
        ("text", "malformed"),
    ],
)
def test_what_is_no_anthropic_reply(content, reason):
    with pytest.raises(BadRow) as caught:
        parse_anthropic_reply({"content": content, "stop_reason": "end_turn"})
    assert caught.value.reason == reason


def test_an_anthropic_message_with_a_picture_is_no_text():
    with pytest.raises(BadRow, match="only blocks of text"):
        parse_anthropic_message({"role": "user", "content": [{"type": "image", "source": {}}]})


def test_results_of_tools_come_before_the_words_beside_them():
    row = {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "dry"}]},
            {"type": "tool_result", "tool_use_id": "b"},
            {"type": "text", "text": "Well?"},
        ],
    }
    assert parse_anthropic_message(row) == [
        Message("tool", "dry", tool_call_id="a"),
        Message("tool", "", tool_call_id="b"),
        Message("user", "Well?"),
    ]

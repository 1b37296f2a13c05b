import json

import pytest

import chats
from attar.data.conversations import parse_conversation
from attar.tokens import (
    encode_conversation,
    highlight,
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello there"},
    {"role": "user", "content": "is it cold in Oslo?"},
    {"role": "assistant", "content": "it is 3 degrees"},
]
CALL = {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": {"place": "Oslo", "n": 3}}}
TOOL_TALK = [
    {"role": "user", "content": "is it cold in Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a1", "content": "3 degrees"},
    {"role": "assistant", "content": "it is cold"},
]
THOUGHT_TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello", "reasoning_content": "be nice"},
    {"role": "user", "content": "is it cold?"},
    {"role": "assistant", "content": "yes", "reasoning_content": "it is 3 degrees"},
]
PLAIN_TEMPLATES = {
    "chatml": chats.CHATML,
    "marked": chats.CHATML_MARKED,
    "llama": chats.LLAMA,
    "qwen": chats.QWEN,
    "gemma": chats.GEMMA,
    "mistral": chats.MISTRAL,
}


@pytest.fixture(scope="module")
def byte_level():
    return chats.byte_level(chats.CHATML)


@pytest.fixture(scope="module")
def metaspace():
    return chats.metaspace(chats.MISTRAL, bos="<s>", eos="</s>")


@pytest.fixture(scope="module")
def tokenizers(byte_level):
    return {name: chats.with_template(byte_level, template) for name, template in PLAIN_TEMPLATES.items()}


def encode(tokenizer, messages, tools=(), max_tokens=10_000, **options):
    row = {"messages": messages, "tools": list(tools)}
    return encode_conversation(tokenizer, parse_conversation(row), max_tokens=max_tokens, **options)


def learned(tokenizer, example):
    return [text for text, supervised in highlight(tokenizer, example) if supervised]


def theirs(tokenizer, messages, tools=(), **options):
    return tokenizer.apply_chat_template(messages, tools=list(tools) or None, return_dict=False, **options)


def pairs(tokenizer, example):
    tokens = [tokenizer.decode([i]) for i in example.ids]
    return list(zip(tokens, example.supervised.tolist(), strict=True))


# what is learned, token by token


def test_mask_of_several_turns_token_by_token(byte_level):
    (example,) = encode(byte_level, TALK)
    flags = pairs(byte_level, example)
    expected = []
    for text, supervised in [
        ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
        ("hello there<|im_end|>", True),
        ("\n<|im_start|>user\nis it cold in Oslo?<|im_end|>\n<|im_start|>assistant\n", False),
        ("it is 3 degrees<|im_end|>", True),
        ("\n", False),
    ]:
        ids = byte_level(text, add_special_tokens=False).input_ids
        expected += [(byte_level.decode([i]), supervised) for i in ids]
    assert flags == expected


def test_mask_of_a_tool_conversation_token_by_token(tokenizers):
    tokenizer = tokenizers["qwen"]
    (example,) = encode(tokenizer, TOOL_TALK, [WEATHER], template_kwargs={"enable_thinking": True})
    expected = []
    for text, supervised in [
        (f"<|im_start|>system\n# Tools\n\n<tools>\n{json.dumps(WEATHER)}\n</tools>\n", False),
        (
            "Call one within <tool_call></tool_call>.<|im_end|>\n<|im_start|>user\nis it cold in Oslo?<|im_end|>\n",
            False,
        ),
        ("<|im_start|>assistant\n", False),
        ('<tool_call>\n{"name": "weather", "arguments": {"place": "Oslo", "n": 3}}\n</tool_call><|im_end|>', True),
        ("\n<|im_start|>user\n<tool_response>\n3 degrees\n</tool_response><|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>\n\n</think>\n\nit is cold<|im_end|>", True),
        ("\n", False),
    ]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        expected += [(tokenizer.decode([i]), supervised) for i in ids]
    # the first turn, at its own moment the last, opens an empty reasoning that is gone once an answer follows
    first, last = encode(tokenizer, TOOL_TALK, [WEATHER])
    assert learned(tokenizer, first)[0].startswith("<think>\n\n</think>\n\n<tool_call>\n")
    assert learned(tokenizer, last) == ["<think>\n\n</think>\n\nit is cold<|im_end|>"]
    del example, expected


@pytest.mark.parametrize("name", PLAIN_TEMPLATES)
def test_answers_and_their_ends_are_learned_and_nothing_else(tokenizers, name):
    tokenizer = tokenizers[name]
    examples = encode(tokenizer, TALK)
    end = {"llama": "<|eot|>", "gemma": "</turn>", "mistral": "<eos>"}.get(name, "<|im_end|>")
    space = " " if name == "mistral" else ""
    opening = "<think>\n\n</think>\n\n" if name == "qwen" else ""
    texts = [text for example in examples for text in learned(tokenizer, example)]
    assert texts == [f"{opening}{space}hello there{end}", f"{opening}{space}it is 3 degrees{end}"]
    assert len(examples) == (2 if name == "qwen" else 1)
    assert not any(example.supervised[0] for example in examples)

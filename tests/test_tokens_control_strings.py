"""Content that spells control tokens."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chats
from attar.errors import DataError
from attar.tokens.controls import coder
from chats import ENDS, TALK, TEMPLATES, TOKENIZERS, TOOL_TALK, encode, learned

CHATML = TOKENIZERS["chatml"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "spelled", ["<|im_end|>", "a <|im_end|>", "<|im_end|> a", " <turn></turn> <eos>[/INST]<|eot|>x", "<eos>"]
)
def test_content_is_never_a_control_token(name, spelled):
    tokenizer = TOKENIZERS[name]
    messages = [{"role": "user", "content": spelled}, {"role": "assistant", "content": spelled}]
    (example,) = encode(tokenizer, messages)
    (harmless,) = encode(tokenizer, TALK[:2])
    specials = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    assert [i for i in example.ids if i in specials] == [i for i in harmless.ids if i in specials]
    assert tokenizer.decode(example.ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    (text,) = learned(tokenizer, example)
    opening = "<think>\n\n</think>\n\n" if name == "qwen" else " " if name == "mistral" else ""
    assert text == opening + (spelled.strip() if name in ("llama", "gemma") else spelled) + ENDS[name]


def test_a_tool_and_its_arguments_cannot_close_a_call():
    tokenizer = TOKENIZERS["qwen"]
    messages = json.loads(json.dumps(TOOL_TALK))
    messages[1]["reasoning_content"] = "ask"
    messages[1]["tool_calls"][0]["function"]["arguments"] = {"place": "</tool_call><|im_end|>"}
    messages[2]["content"] = "</tool_response><|im_end|><tool_call>"
    tool = {"type": "function", "function": {"name": "weather", "description": "<tool_call>", "parameters": {}}}
    (example,) = encode(tokenizer, messages, [tool])
    counts = Counter(tokenizer.convert_ids_to_tokens(example.ids.tolist()))
    assert counts["<tool_call>"] == 2  # the instruction's and the call's
    assert counts["</tool_call>"] == 2
    assert counts["</tool_response>"] == 1
    assert counts["<|im_end|>"] == 5
    assert tokenizer.decode(example.ids) == tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False)


def test_a_user_who_quotes_a_tool_response_as_the_template_looks_for_it():
    # the template tests how the content begins and ends, so marks around it would change what is rendered
    messages = [{"role": "user", "content": "<tool_response>x</tool_response>"}, TALK[1]]
    (example,) = encode(TOKENIZERS["qwen"], [TALK[0], TALK[1], *messages])[-1:]
    assert TOKENIZERS["qwen"].convert_tokens_to_ids("<tool_response>") not in example.ids
    assert TOKENIZERS["qwen"].decode(example.ids).count("<tool_response>x</tool_response>") == 1


def test_a_message_that_is_a_tool_response_and_nothing_else():
    # not a question to the template, which would be one if marks stood around the tags
    messages = [{"role": "user", "content": "<tool_response></tool_response>"}, TALK[1]]
    (example,) = encode(TOKENIZERS["qwen"], messages)
    assert learned(TOKENIZERS["qwen"], example) == ["hello there<|im_end|>"]
    assert TOKENIZERS["qwen"].convert_tokens_to_ids("<tool_response>") not in example.ids


def test_control_strings_in_what_the_template_leaves_out():
    messages = [
        TALK[0],
        {**TALK[1], "reasoning_content": "<|im_end|>"},
        {"role": "user", "content": "a <|im_end|>"},
        TALK[1],
    ]
    examples = encode(TOKENIZERS["qwen"], messages)
    end = TOKENIZERS["qwen"].convert_tokens_to_ids("<|im_end|>")
    assert [(example.ids == end).sum() for example in examples] == [2, 4]
    assert learned(TOKENIZERS["qwen"], examples[0]) == ["<think>\n<|im_end|>\n</think>\n\nhello there<|im_end|>"]


def test_control_tokens_within_the_vocabulary():
    tokenizer = chats.byte_level(chats.CHATML, in_vocabulary=["<|im_start|>", "<|im_end|>"])
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 1
    (example,) = encode(tokenizer, [{"role": "user", "content": "<|im_end|>"}, TALK[1]])
    assert (example.ids == 1).sum() == 3
    assert learned(tokenizer, example) == ["hello there<|im_end|>"]


def test_the_longest_control_token_is_read():
    tokenizer = chats.with_template(CHATML, chats.CHATML)
    tokenizer.add_tokens(["<|im_end|>!"], special_tokens=True)
    assert coder(tokenizer, chats.CHATML).occurrences("<|im_end|>! <|im_end|>") == [(0, 11), (12, 22)]


def test_an_assistants_own_markup_is_its_token():
    # a recorded text holds <think> where the model emitted that token, for it is not special
    messages = [
        {"role": "user", "content": "what is <think>?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nok"},
    ]
    (example,) = encode(TOKENIZERS["qwen"], messages)
    assert learned(TOKENIZERS["qwen"], example) == ["<think>\nhm\n</think>\n\nok<|im_end|>"]
    think = TOKENIZERS["qwen"].convert_tokens_to_ids("<think>")
    assert example.supervised[example.ids == think].tolist() == [True]


def test_private_use_characters_in_content_forge_nothing():
    tokenizer = TOKENIZERS["llama"]
    content = "\ue000<|eot|>\ue001 " + "".join(map(chr, range(0xF0000, 0xF0040)))
    (example,) = encode(tokenizer, [{"role": "user", "content": content}, TALK[1]])
    assert (example.ids == tokenizer.convert_tokens_to_ids("<|eot|>")).sum() == 2
    assert content in tokenizer.decode(example.ids)


def test_a_template_that_cannot_be_told_from_the_content_is_refused():
    template = chats.CHATML.replace("m.content", "m.content.replace('<|im_end|>', '<|im_end|>' * 2)[:14]", 1)
    tokenizer = chats.with_template(CHATML, template)
    with pytest.raises(DataError, match="cannot be told from the template's own"):
        encode(tokenizer, [{"role": "user", "content": "<|im_end|>x"}, TALK[1]])


pieces = st.sampled_from(
    ["<|im_end|>", "<|im_start|>", "<|eot|>", "[INST]", "[/INST]", "<eos>", "</s>", "<tool_call>", "</tool_call>",
     "<tool_response>", "</tool_response>", "<turn>", "hi", " ", "\n", "<", "|>", "é🎉", "\ue000", "assistant",
     '"', "{}"]
)  # fmt: skip
contents = st.lists(pieces, max_size=6).map("".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(contents, contents), min_size=1, max_size=3), st.sampled_from(list(TEMPLATES)))
def test_fuzzed_contents(turns, name):
    tokenizer = TOKENIZERS[name]
    roles = ("user", "assistant")
    messages = [{"role": role, "content": c} for turn in turns for role, c in zip(roles, turn, strict=True)]
    own = coder(tokenizer, tokenizer.chat_template)
    controls = {own.added[content] for content in own.controls}
    example = encode(tokenizer, messages)[-1]
    assert tokenizer.decode(example.ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    # with every word harmless, the template's own control tokens are what is left; in the Qwen-like one the assistant's
    # markup stays its own, and a user's message that looks like a tool's answer is not taken for a question
    harmless = [{**m, "content": "x"} for m in messages]
    if name == "qwen":
        for own_words, m in zip(harmless, messages, strict=True):
            if m["role"] == "assistant":
                own_words["content"] = markup(m["content"])
            elif m["content"].startswith("<tool_response>") and m["content"].endswith("</tool_response>"):
                return
    plain = encode(tokenizer, harmless)[-1]
    assert [i for i in example.ids if i in controls] == [i for i in plain.ids if i in controls]
    (last,) = learned(tokenizer, example)[-1:]
    answer = turns[-1][1]
    assert (answer.strip() if name in ("llama", "gemma", "qwen") else answer) in last


def markup(content):
    return "x".join(["", *re.findall("|".join(chats.NOT_SPECIAL), content), ""])

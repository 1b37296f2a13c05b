import json
from collections import Counter

import numpy as np
import pytest

import chats
from attar.errors import DataError, ModelError
from attar.tokens.controls import Encoded, coder
from chats import ENDS, TALK, TEMPLATES, TOKENIZERS, TOOL_TALK, WEATHER, encode, learned, theirs

CHATML = TOKENIZERS["chatml"]
METASPACE = chats.metaspace(chats.MISTRAL, bos="<s>", eos="</s>")
THOUGHT_TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello", "reasoning_content": "be nice"},
    {"role": "user", "content": "is it cold?"},
    {"role": "assistant", "content": "yes", "reasoning_content": "it is 3 degrees"},
]


# what is learned, token by token


def flagged(tokenizer, stretches):
    """Each token of the stretches, with the stretch's flag; a stretch must begin and end where tokens do."""
    tokens = [(i, flag) for text, flag in stretches for i in tokenizer(text, add_special_tokens=False).input_ids]
    return [i for i, _ in tokens], [flag for _, flag in tokens]


def test_mask_of_several_turns_token_by_token():
    (example,) = encode(CHATML, TALK)
    ids, flags = flagged(
        CHATML,
        [
            ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
            ("hello there<|im_end|>", True),
            ("\n<|im_start|>user\nis it cold in Oslo?<|im_end|>\n<|im_start|>assistant\n", False),
            ("it is 3 degrees<|im_end|>", True),
            ("\n", False),
        ],
    )
    assert example.ids.tolist() == ids
    assert example.supervised.tolist() == flags


def test_mask_of_a_tool_conversation_token_by_token():
    tokenizer = TOKENIZERS["qwen"]
    messages = [dict(message) for message in TOOL_TALK]
    messages[1]["reasoning_content"] = "ask the tool"
    (example,) = encode(tokenizer, messages, [WEATHER])
    ids, flags = flagged(
        tokenizer,
        [
            (f"<|im_start|>system\n# Tools\n\n<tools>\n{json.dumps(WEATHER)}\n</tools>\n", False),
            ("Call one within <tool_call></tool_call>.<|im_end|>\n", False),
            ("<|im_start|>user\nis it cold in Oslo?<|im_end|>\n<|im_start|>assistant\n", False),
            ("<think>\nask the tool\n</think>\n\n", True),
            ('<tool_call>\n{"name": "weather", "arguments": {"place": "Oslo", "n": 3}}\n</tool_call><|im_end|>', True),
            ("\n<|im_start|>user\n<tool_response>\n3 degrees\n</tool_response><|im_end|>\n", False),
            ("<|im_start|>assistant\n", False),
            ("<think>\n\n</think>\n\nit is cold<|im_end|>", True),
            ("\n", False),
        ],
    )
    assert example.ids.tolist() == ids
    assert example.supervised.tolist() == flags
    assert tokenizer.convert_tokens_to_ids("<tool_call>") in np.array(ids)[np.array(flags)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_ends_are_learned_and_nothing_else(name):
    tokenizer = TOKENIZERS[name]
    examples = encode(tokenizer, TALK)
    space = " " if name == "mistral" else ""
    opening = "<think>\n\n</think>\n\n" if name == "qwen" else ""
    texts = [text for example in examples for text in learned(tokenizer, example)]
    assert texts == [f"{opening}{space}hello there{ENDS[name]}", f"{opening}{space}it is 3 degrees{ENDS[name]}"]
    assert len(examples) == (2 if name == "qwen" else 1)
    assert not any(example.supervised[0] for example in examples)


@pytest.mark.parametrize("name", ["llama", "qwen", "mistral"])
def test_calls_are_learned_and_tool_results_are_not(name):
    tokenizer = TOKENIZERS[name]
    texts = [text for example in encode(tokenizer, TOOL_TALK, [WEATHER]) for text in learned(tokenizer, example)]
    assert len(texts) == 2
    assert '"place": "Oslo"' in texts[0]
    assert texts[0].endswith({"llama": "}<|eom|>", "qwen": "</tool_call><|im_end|>", "mistral": "]<eos>"}[name])
    assert texts[1].strip().removeprefix("<think>\n\n</think>\n\n").startswith("it is cold<")
    assert not any("3 degrees" in text for text in texts)


def test_a_control_token_that_opens_a_call_is_learned_without_a_generation_prompt():
    (example,) = encode(TOKENIZERS["mistral"], TOOL_TALK, [WEATHER])
    assert learned(TOKENIZERS["mistral"], example)[0].startswith("[TOOL_CALLS] [")


def test_train_false_is_read_but_not_learned():
    messages = [TALK[0], {**TALK[1], "train": False}, *TALK[2:]]
    (example,) = encode(CHATML, messages)
    assert learned(CHATML, example) == ["it is 3 degrees<|im_end|>"]
    assert example.ids.tolist() == theirs(CHATML, TALK)


def test_what_follows_the_last_answer_to_be_learned_is_left_out():
    (example,) = encode(CHATML, [*TALK[:3], {**TALK[3], "train": False}])
    assert example.ids.tolist() == theirs(CHATML, TALK[:2])
    assert encode(CHATML, [TALK[0], {**TALK[1], "train": False}]) == []


def test_the_end_of_turn_is_learned_where_it_also_pads():
    tokenizer = chats.with_template(CHATML, chats.MISTRAL)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (example,) = encode(tokenizer, TALK)
    assert example.supervised[example.ids == tokenizer.eos_token_id].tolist() == [True, True]


# ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_transformers_own(name):
    assert encode(TOKENIZERS[name], TALK)[-1].ids.tolist() == theirs(TOKENIZERS[name], TALK)


@pytest.mark.parametrize("name", ["llama", "qwen", "mistral"])
def test_ids_with_tools_are_transformers_own(name):
    example = encode(TOKENIZERS[name], TOOL_TALK, [WEATHER])[-1]
    assert example.ids.tolist() == theirs(TOKENIZERS[name], TOOL_TALK, [WEATHER])


@pytest.mark.parametrize("name", ["chatml", "marked", "llama", "mistral"])
def test_one_message_at_a_time_is_a_prefix(name):
    (example,) = encode(TOKENIZERS[name], TALK)
    (first,) = encode(TOKENIZERS[name], TALK[:2])
    assert example.ids[: len(first)].tolist() == first.ids.tolist()


def test_words_with_a_space_before():
    messages = [{"role": "system", "content": "be nice"}, *TALK[:2]]
    (example,) = encode(METASPACE, messages)
    assert example.ids.tolist() == theirs(METASPACE, messages)
    assert learned(METASPACE, example) == [" hello there</s>"]
    assert METASPACE.convert_ids_to_tokens(example.ids[example.supervised].tolist())[0].startswith("▁")


@pytest.mark.parametrize("name", ["llama", "gemma", "mistral", "chatml"])
def test_bos_is_written_once_or_not_at_all(name):
    tokenizer = TOKENIZERS[name]
    assert tokenizer("hi").input_ids[0] == tokenizer.bos_token_id  # of itself it adds one
    (example,) = encode(tokenizer, TALK)
    assert (example.ids == tokenizer.bos_token_id).sum() == (0 if name == "chatml" else 1)


@pytest.mark.parametrize("name", TEMPLATES)
def test_stand_ins_change_nothing_around_them(name):
    # the encoder for text that quotes control strings, on text that quotes none
    tokenizer = TOKENIZERS[name]
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    own = coder(tokenizer, tokenizer.chat_template)
    whole, quoting = own.encode(text), own.encode(text, frozenset([10**9]))
    assert quoting.ids == whole.ids
    assert quoting.offsets == whole.offsets


def test_a_token_must_lie_within_the_answer():
    own = coder(CHATML, CHATML.chat_template)
    encoded = Encoded([1, 1, 1, 1, 1], [(0, 2), (1, 3), (2, 4), (3, 6), (4, 4)])
    assert own.inside(encoded, "abcdefgh", [(2, 5)]) == [False, False, True, False, False]


def test_an_added_token_that_the_template_never_writes_is_ordinary_text():
    messages = [{"role": "user", "content": "a <table> <tool_call>"}, TALK[1]]
    (example,) = encode(CHATML, messages)  # the template has no tools either
    assert example.ids.tolist() == theirs(CHATML, messages)
    assert CHATML.convert_tokens_to_ids("<table>") in example.ids


# templates that change what came before


def test_reasoning_that_the_template_drops_later_is_learned_at_its_own_moment():
    tokenizer = TOKENIZERS["qwen"]
    counts = Counter()
    first, last = encode(tokenizer, THOUGHT_TALK, counts=counts)
    assert learned(tokenizer, first) == ["<think>\nbe nice\n</think>\n\nhello<|im_end|>"]
    assert learned(tokenizer, last) == ["<think>\nit is 3 degrees\n</think>\n\nyes<|im_end|>"]
    assert "be nice" not in tokenizer.decode(last.ids)
    assert first.ids.tolist() == theirs(tokenizer, THOUGHT_TALK[:2])
    assert last.ids.tolist() == theirs(tokenizer, THOUGHT_TALK)
    assert first.id == last.id.removesuffix("3") + "1"
    assert counts["examples"] == 2
    assert counts["reasoning left out"] == 0


def test_the_template_without_reasoning_says_so():
    counts = Counter()
    encode(CHATML, THOUGHT_TALK, counts=counts)
    assert counts["reasoning left out"] == 2


def test_system_text_that_moves_gives_one_example_a_turn():
    tokenizer = TOKENIZERS["mistral"]
    messages = [{"role": "system", "content": "be nice"}, *TALK]
    examples = encode(tokenizer, messages)
    assert [learned(tokenizer, e) for e in examples] == [[" hello there<eos>"], [" it is 3 degrees<eos>"]]
    assert examples[0].ids.tolist() == theirs(tokenizer, messages[:3])
    assert examples[1].ids.tolist() == theirs(tokenizer, messages)


def test_an_end_that_only_the_last_answer_has():
    tokenizer = chats.with_template(CHATML, chats.HARMONY)
    examples = encode(tokenizer, THOUGHT_TALK)
    opening = "<|channel|>analysis<|message|>be nice<|end|><|start|>assistant"
    assert learned(tokenizer, examples[0]) == [opening + "<|channel|>final<|message|>hello<|return|>"]
    assert len(examples) == 2


@pytest.mark.parametrize("rstrip", [(), ("<|end|>", "<|user|>", "<|assistant|>")])
def test_the_end_of_the_text_is_not_the_end_of_the_turn(rstrip):
    tokenizer = chats.byte_level(chats.PHI, rstrip=rstrip)
    (example,) = encode(tokenizer, TALK)
    assert [text.rstrip() for text in learned(tokenizer, example)] == ["hello there<|end|>", "it is 3 degrees<|end|>"]
    assert example.ids.tolist() == theirs(tokenizer, TALK)
    assert example.ids[-1] == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_a_role_header_without_generation_prompt_is_not_learned():
    template = chats.CHATML[: chats.CHATML.index("{% if add_generation_prompt")]
    tokenizer = chats.with_template(CHATML, template)
    (example,) = encode(tokenizer, TALK)
    assert learned(tokenizer, example) == ["hello there<|im_end|>", "it is 3 degrees<|im_end|>"]


def test_variables_of_the_template_reach_it():
    (example,) = encode(TOKENIZERS["qwen"], TALK[:2], template_kwargs={"enable_thinking": False})
    assert learned(TOKENIZERS["qwen"], example) == ["hello there<|im_end|>"]


def test_arguments_as_the_template_takes_them():
    tokenizer = chats.with_template(CHATML, chats.JSON_ARGUMENTS)
    (example,) = encode(tokenizer, TOOL_TALK)
    assert learned(tokenizer, example)[0] == '<tool_call>weather {"place": "Oslo", "n": 3}</tool_call><|im_end|>'
    spelled = chats.JSON_ARGUMENTS.replace("+ c.function.arguments", "~ c.function.arguments")
    (example,) = encode(chats.with_template(CHATML, spelled), TOOL_TALK)
    assert learned(tokenizer, example)[0] == '<tool_call>weather {"place": "Oslo", "n": 3}</tool_call><|im_end|>'


def test_a_token_across_the_edge_of_an_answer_is_counted_and_not_learned():
    tokenizer = chats.with_template(CHATML, chats.CHATML.replace("assistant\n", "assistant: "))
    tokenizer.chat_template = tokenizer.chat_template.replace("m.role + '\n'", "m.role + ': '")
    counts = Counter()
    (example,) = encode(tokenizer, TALK, counts=counts)
    assert example.ids.tolist() == theirs(tokenizer, TALK)
    assert counts["straddling"] == 2
    assert learned(tokenizer, example) == [" there<|im_end|>", " is 3 degrees<|im_end|>"]


# templates and messages that cannot be used


def test_an_answer_to_another_prompt_is_refused():
    with pytest.raises(DataError, match=r"<think>.*another prompt than it is asked with"):
        encode(chats.with_template(CHATML, chats.R1), TALK)


def test_a_system_message_that_the_template_refuses():
    with pytest.raises(DataError, match=r"System role not supported; .*before the user's"):
        encode(TOKENIZERS["gemma"], [{"role": "system", "content": "be nice"}, *TALK])


def test_an_answer_to_nothing_is_refused_unless_it_is_not_learned():
    messages = [{"role": "assistant", "content": "how can I help?"}, *TALK]
    with pytest.raises(DataError, match=r"messages\[0\].*train: false"):
        encode(CHATML, messages)
    (example,) = encode(CHATML, [{**messages[0], "train": False}, *TALK])
    assert learned(CHATML, example) == ["hello there<|im_end|>", "it is 3 degrees<|im_end|>"]


def test_a_template_without_an_end_of_turn_is_refused():
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(DataError, match="never learn to stop"):
        encode(chats.with_template(CHATML, template), TALK)
    # nor does an answer that spells the token end with it
    with pytest.raises(DataError, match="never learn to stop"):
        encode(chats.with_template(CHATML, template), [TALK[0], {"role": "assistant", "content": "hi<|im_end|>"}])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}",
         "{% if m.role == 'assistant' %}{% generation %}{{ '<|im_start|>' + m.role + '\n' }}"),
        ("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}",
         "{% generation %}{{ m.content[:3] }}{% endgeneration %}{{ m.content[3:] }}<|im_end|>"),
        ("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>",
         "{{ m.content }}<|im_end|>{% else %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"),
    ],
)  # fmt: skip
def test_markers_that_enclose_something_else_are_refused(old, new):
    assert old in chats.CHATML_MARKED
    tokenizer = chats.with_template(CHATML, chats.CHATML_MARKED.replace(old, new))
    with pytest.raises(DataError, match="markers enclose"):
        encode(tokenizer, TALK)


def test_markers_may_leave_out_the_end_of_turn():
    template = chats.CHATML_MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    (example,) = encode(chats.with_template(CHATML, template), TALK)
    assert learned(CHATML, example) == ["hello there<|im_end|>", "it is 3 degrees<|im_end|>"]


def test_no_template_and_no_fast_tokenizer_are_refused():
    with pytest.raises(ModelError, match="no chat template"):
        encode(chats.with_template(CHATML, None), TALK)

    class Slow:
        def __init__(self):
            self.added_tokens_decoder = {}

        def get_chat_template(self, *_):
            return ""

        def __len__(self):
            return 0

    with pytest.raises(ModelError, match="fast"):
        encode(Slow(), TALK)

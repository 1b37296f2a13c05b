"""What is learned of an episode under each family of chat templates, and what the model is asked with; literally."""

import copy
import json
import urllib.request
from collections import Counter

import pytest

import chats
import families
from attar.data.conversations import parse_conversation
from attar.engines.calls import form_of, read_message
from attar.engines.gguf import load_gguf
from attar.errors import DataError, ModelError
from attar.students.gguf_file import write_gguf
from attar.tokens import (
    LossWeights,
    encode_conversation,
    encode_request,
    find_static,
    highlight,
    knows_tools,
    spans,
    with_tools,
)
from families import FAMILIES, talk
from lm import make_model

CALLS = (
    '<tool_call>\n{"name": "weather", "arguments": {"town": "Oslo"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"town": "Bergen"}}\n</tool_call>'
)
HERMES_STYLE = [
    ("<think>\nAsk the tool.\n</think>\n\n", "reason"),
    ("I look.", "text"),
    ("\n" + CALLS, "call"),
    ("END", "end"),
    ("<think>\n-3 is less.\n</think>\n\n", "reason"),
    ("Oslo.", "text"),
    ("END", "end"),
    ("Bye.", "text"),
    ("END", "end"),
]
# Of each example, what is learned and what for; END is the family's end of turn.
LEARNED = {
    "chatml": [HERMES_STYLE],
    "gemma": [HERMES_STYLE],
    "qwen3": [HERMES_STYLE[:7], [("<think>\n\n</think>\n\nBye.", "text"), ("END", "end")]],
    "hermes": [
        [("Oslo.", "text"), ("END", "end")],
        [(CALLS, "call"), ("END", "end"), ("Bye.", "text"), ("END", "end")],
    ],
    "mistral": [
        [
            (
                '[TOOL_CALLS][{"name": "weather", "arguments": {"town": "Oslo"}, "id": "call00001"}, '
                '{"name": "weather", "arguments": {"town": "Bergen"}, "id": "call00002"}]',
                "call",
            ),
            ("END", "end"),
            ("Oslo.", "text"),
            ("END", "end"),
        ],
        [("Bye.", "text"), ("END", "end")],
    ],
    "llama3": [
        [
            ('{"name": "weather", "parameters": {"town": "Oslo"}}', "call"),
            ("END", "end"),
            ("Oslo.", "text"),
            ("END", "end"),
            ("Bye.", "text"),
            ("END", "end"),
        ]
    ],
}


def conversation(family, **options):
    """Mistral's template writes a system text in the first prompt alone, and Llama's one call a message."""
    return talk(**{"system": family != "mistral", "parallel": family != "llama3"} | options)


def encode(tokenizer, one, weights=None, counts=None, **options):
    return encode_conversation(tokenizer, one, max_tokens=10_000, weights=weights, counts=counts, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_learned_and_what_for(family):
    ready, supplied = with_tools(families.tokenizer(family))
    assert supplied == (family in ("chatml", "gemma"))
    examples = encode(ready, conversation(family), LossWeights())
    end = families.TOKENS[family][0]
    wanted = [[(end if text == "END" else text, kind) for text, kind in one] for one in LEARNED[family]]
    assert [spans(ready, example) for example in examples] == wanted
    plain = encode(ready, conversation(family))
    for example, own in zip(examples, plain, strict=True):
        assert example.weights is None  # all weigh 1
        assert own.kinds is None
        assert (example.id, example.ids.tolist()) == (own.id, own.ids.tolist())
        assert example.supervised.tolist() == own.supervised.tolist()
        learned = [text for text, flag in highlight(ready, example) if flag]
        read = "".join(text for text, flag in highlight(ready, example) if not flag)
        assert not any("SECRET" in text for text in learned)
        assert "a town" in read  # the tool's description stands in the prompt
        assert all(text.endswith(end) for text in learned)
    assert "-3 SECRET" in "".join(text for e in examples for text, flag in highlight(ready, e) if not flag)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_served_is_what_was_trained(family, pruned):
    """Of each answer, the ids that the model is asked with are those before the first that it learned to write."""
    ready = with_tools(families.tokenizer(family)).tokenizer
    whole, counts = conversation(family), Counter()
    one = find_static([whole], marker="-").apply(whole) if pruned else whole
    examples = encode(ready, one, counts=counts)
    assert counts["straddling"] == 0
    starts = {
        tuple(example.ids[:place].tolist())
        for example in examples
        for place in range(1, len(example))
        if example.supervised[place] and not example.supervised[place - 1]
    }
    answers = [i for i, message in enumerate(one.messages) if message.role == "assistant"]
    asked = []
    for i in answers:
        messages, tools = whole.messages[:i], whole.tools
        if pruned:
            messages, tools, done = find_static([whole], marker="-").request(messages, tools)
            assert done
        asked.append(tuple(encode_request(ready, messages, tools)))
    assert len(starts) == len(answers) == 3
    assert starts == set(asked)
    assert ("a town" in ready.decode(asked[0])) != pruned


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parser_reads_what_was_trained(family):
    ready = with_tools(families.tokenizer(family)).tokenizer
    one = conversation(family, after=False)
    wanted = [message for message in one.messages if message.role == "assistant"]
    (example,) = encode(ready, one)
    texts = [text.removesuffix(families.TOKENS[family][0]) for text, flag in highlight(ready, example) if flag]
    found = [read_message(text, form_of(ready), tools=one.tools) for text in texts]
    for mine, theirs in zip(found, wanted, strict=True):
        assert [(c.name, c.arguments) for c in mine.tool_calls] == [(c.name, c.arguments) for c in theirs.tool_calls]
    if family in ("chatml", "gemma", "qwen3"):
        assert [(m.content, m.reasoning) for m in found] == [(m.content, m.reasoning) for m in wanted]


def test_what_templates_leave_out_is_counted():
    left = {}
    for family in FAMILIES:
        counts = Counter()
        encode(with_tools(families.tokenizer(family)).tokenizer, conversation(family), counts=counts)
        left[family] = (counts["reasoning left out"], counts["text left out"])
    assert left == {family: (2, 1) if family in ("llama3", "mistral", "hermes") else (0, 0) for family in FAMILIES}


def test_what_a_template_refuses():
    with pytest.raises(DataError, match=r"single tool-calls at once"):
        encode(families.tokenizer("llama3"), talk(system=False))
    with pytest.raises(DataError, match=r"another prompt than it is asked with"):
        encode(families.tokenizer("mistral"), talk())


def test_an_answer_behind_a_rewritten_history_is_found_by_its_header():
    """Also where the answer itself, or the history, spells the header."""
    hermes = families.tokenizer("hermes")
    rows = talk(after=False).wire
    rows["messages"][1]["content"] = "<|im_start|>assistant\nWhere?"
    rows["messages"][-1]["content"] = "<|im_start|>assistant\nOslo."
    (example,) = encode(hermes, parse_conversation(rows))
    texts = [text for text, flag in highlight(hermes, example) if flag]
    assert texts == [CALLS + "<|im_end|>", "<|im_start|>assistant\nOslo.<|im_end|>"]
    header = hermes.convert_tokens_to_ids("<|im_start|>")
    assert (example.ids == header).sum() == 6  # of the system's, the question's, the call's and so on: none in content


def test_a_header_that_only_content_spells_is_none():
    opened = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    template = chats.CHATML[: chats.CHATML.index("{% if add_generation_prompt")] + opened
    tokenizer = chats.with_template(chats.TOKENIZERS["chatml"], template)
    rows = [chats.TALK[0], {"role": "assistant", "content": "<|im_start|>assistant\n<think>\nhm"}]
    with pytest.raises(DataError, match=r"another prompt than it is asked with"):
        encode(tokenizer, parse_conversation({"messages": rows}))


def test_a_template_without_tools_is_refused_where_there_are_some():
    chatml = families.tokenizer("chatml")
    with pytest.raises(ModelError, match=r"has 1 tools, and the chat template leaves them out.*with_tools"):
        encode(chatml, talk())
    with pytest.raises(ModelError, match="leaves them out"):
        encode_request(chatml, talk().messages[:2], [families.WEATHER])
    without = parse_conversation({"messages": talk().wire["messages"]})
    with pytest.raises(DataError, match=r"messages\[2\]: the message calls 'weather', and the chat template writes"):
        encode(chatml, without)


# the template that attar supplies


def rendered(tokenizer, rows, **options):
    return tokenizer.apply_chat_template(rows, tokenize=False, **options)


@pytest.mark.parametrize("family", ["chatml", "gemma"])
def test_the_supplied_template_writes_plain_talk_as_the_models_own(family):
    own = families.tokenizer(family)
    ready = with_tools(own).tokenizer
    rows = [
        {"role": "user", "content": " hi {{ there }} "},
        {"role": "assistant", "content": "\nwhat?"},
        {"role": "user", "content": "hm"},
    ]
    framed = [{"role": "system", "content": " be kind"}, *rows]
    for talk_rows in (rows[:1], rows[:2], rows, framed) if family == "chatml" else (rows[:1], rows[:2], rows):
        for prompt in (False, True):
            wanted = rendered(own, talk_rows, add_generation_prompt=prompt)
            assert rendered(ready, talk_rows, add_generation_prompt=prompt) == wanted
    assert own.chat_template == (families.FOLDER / f"{family}.jinja").read_text()  # as it was


def test_where_the_supplied_template_puts_system_text_and_tools():
    instructions = (
        "You can call these tools. Each line is one of them, its arguments as a JSON schema:\n<tools>\n"
        '{"type": "function", "function": {"name": "weather", "description": "the weather of a town", "parameters": '
        '{"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}}}\n</tools>\n'
        'To call a tool, write:\n<tool_call>\n{"name": "the name of the tool", "arguments": {"an argument": "its '
        'value"}}\n</tool_call>'
    )
    chatml, gemma = (with_tools(families.tokenizer(family)).tokenizer for family in ("chatml", "gemma"))
    rows = [families.SYSTEM, families.QUESTION]
    tools = [families.WEATHER]
    asked = "Where is it colder, Oslo or Bergen?"
    assert rendered(chatml, rows, tools=tools) == (
        f"<|im_start|>system\nBe brief.\n\n{instructions}<|im_end|>\n<|im_start|>user\n{asked}<|im_end|>\n"
    )
    assert rendered(chatml, rows[1:], tools=tools).startswith(
        f"<|im_start|>system\nYou are a helpful assistant\n\n{instructions}<|im_end|>\n"
    )
    assert rendered(gemma, rows, tools=tools) == (
        f"<bos><start_of_turn>user\nBe brief.\n\n{instructions}\n\n{asked}<end_of_turn>\n"
    )
    assert rendered(gemma, rows) == f"<bos><start_of_turn>user\nBe brief.\n\n{asked}<end_of_turn>\n"
    assert rendered(gemma, rows[1:], tools=tools).startswith(f"<bos><start_of_turn>user\n{instructions}\n\n")


def test_the_supplied_template_is_kept_with_the_tokenizer(tmp_path):
    ready = with_tools(families.tokenizer("chatml")).tokenizer
    ready.save_pretrained(tmp_path)
    again = type(ready).from_pretrained(tmp_path)
    (example,), (other,) = (encode(t, talk()) for t in (ready, again))
    assert example.ids.tolist() == other.ids.tolist()
    assert with_tools(again).supplied is False


def test_empty_reasoning_writes_nothing():
    ready = with_tools(families.tokenizer("chatml")).tokenizer
    rows = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "reasoning_content": " \n"}]
    assert "<think>" not in rendered(ready, rows)
    assert "<think>\nso\n</think>\n\nyes" in rendered(ready, [rows[0], {**rows[1], "reasoning_content": " so\n"}])


def test_markers_are_read_off_any_template():
    for name in ("marked", "gemma"):
        assert with_tools(chats.TOKENIZERS[name]).supplied
    for name in ("qwen", "llama", "mistral"):
        own = chats.TOKENIZERS[name]
        assert with_tools(own) == (own, False)
    # the system's text within the first question, and a template that looks like a place in ours
    inline = (
        "{% for m in messages %}{% if m.role == 'system' %}{% elif m.role == 'user' %}<user>"
        "{% if loop.index0 == 1 and messages[0].role == 'system' %}{{ messages[0].content + '##' }}{% endif %}"
        "{{ m.content }}<|im_end|>{% else %}<assistant>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ready = with_tools(chats.with_template(chats.TOKENIZERS["chatml"], inline)).tokenizer
    rows = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert rendered(ready, rows, add_generation_prompt=True) == "<user>S##U<|im_end|><assistant>"
    assert rendered(ready, rows, tools=[families.WEATHER]).startswith("<user>S##You can call")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (chats.PHI, "the first question follows"),
        ("{% for m in messages %}{{ m.content[::-1] }}{% endfor %}", "does not write a question"),
        (chats.CHATML.replace("m.content", "m.content | upper"), "for the roles"),
        ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "the first question follows"),
    ],
)
def test_a_template_that_cannot_be_read_is_refused(template, said):
    tokenizer = chats.with_template(chats.TOKENIZERS["chatml"], template)
    assert not knows_tools(tokenizer)
    with pytest.raises(ModelError, match=f"no template with tools can be made.*{said}"):
        with_tools(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template to make one"):
        with_tools(tokenizer)


def test_what_is_known_of_a_template_follows_it():
    tokenizer = copy.deepcopy(families.tokenizer("chatml"))
    assert not knows_tools(tokenizer)
    tokenizer.chat_template = families.tokenizer("qwen3").chat_template
    assert knows_tools(tokenizer)


def test_llama_cpp_renders_the_supplied_template_alike(tmp_path):
    """From the GGUF file that the student is exported to, with tools and without."""
    pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp) is not installed")
    ready, one = with_tools(families.tokenizer("chatml")).tokenizer, talk()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "head_dim": 8, "max_position_embeddings": 2048}
    model = make_model(vocab_size=len(ready), **sizes)
    write_gguf(model, ready, tmp_path / "student.gguf")
    engine = load_gguf(str(tmp_path / "student.gguf"), tokenizer=ready, context_tokens=512, threads=1)
    for end in (2, 5, 7):
        for tools in (one.tools, ()):
            body = {"messages": one.wire["messages"][:end]} | ({"tools": list(tools)} if tools else {})
            data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{engine.address}/apply-template", data, kind)
            with urllib.request.urlopen(request, timeout=60) as answer:
                found = json.loads(answer.read())["prompt"]
            assert found == ready.decode(encode_request(ready, one.messages[:end], tools))

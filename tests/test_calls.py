"""Calls of tools in a model's text: the form told from the template, read whole and in pieces."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.data.conversations import BadRow, parse_conversation
from attar.data.types import Message, ToolCall
from attar.engines.calls import Reader, form_of, read_message
from attar.errors import CapabilityError
from attar.tokens import knows_tools, with_tools
from attar.tokens.turns import Turns
from chats import JSON_ARGUMENTS, TOKENIZERS, WEATHER, with_template

TOOLS = "{% if tools %}{{ '<|system|>' + tools | tojson + '<|end|>' }}{% endif %}"
USERS = "{% if m.role != 'assistant' %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{% else %}"
HEAD = TOOLS + "{% for m in messages %}" + USERS + "<|im_start|>assistant\n{{ m.content or '' }}"
TAIL = "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def tooled(tokenizer):
    return with_tools(tokenizer).tokenizer


def template(call, before="", after=""):
    """A template that writes calls so, ``c`` being the call's function."""
    calls = "{% for t in m.tool_calls %}{% set c = t.function %}" + call + "{% endfor %}"
    return HEAD + "{% if m.tool_calls %}" + before + calls + after + "{% endif %}" + TAIL


SEPARATED = "{% if not loop.last %}, {% endif %}"
WRITTEN = {
    # Llama 3.1: the JSON alone, one call at most, and a token for calls that the vocabulary has.
    "llama": template(
        "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call') }}{% endif %}"
        "{{ '{\"name\": ' + c.name | tojson + ', \"parameters\": ' + c.arguments | tojson + '}' }}"
    )
    + "{# <|python_tag|> #}",
    "mistral": template("{{ c | tojson }}" + SEPARATED, "[TOOL_CALLS] [", "]"),
    # Mistral Small 3: an id in each call.
    "mistral-ids": template(
        "{{ (c | tojson)[:-1] + ', \"id\": \"' + t.id + '\"}' }}" + SEPARATED, "[TOOL_CALLS][", "]"
    ),
    # Mistral since 2025: a name, and its arguments behind a token.
    "mistral-named": template("[TOOL_CALLS]{{ c.name + '[ARGS]' + c.arguments | tojson }}"),
    "mistral-call-ids": template("[TOOL_CALLS]{{ c.name + '[CALL_ID]' + t.id + '[ARGS]' + c.arguments | tojson }}"),
    "coder": template(
        "\n<tool_call>\n<function={{ c.name }}>\n{% for k, v in c.arguments.items() %}<parameter={{ k }}>\n"
        "{{ v | tojson if v is mapping or (v is sequence and v is not string) else v | string }}\n</parameter>\n"
        "{% endfor %}</function>\n</tool_call>"
    ),
    # Gemma, as its users write it.
    "gemma-fenced": template("```tool_code\n{{ c | tojson }}\n```"),
    "phi": template("{{ c | tojson }}" + SEPARATED, "<|tool_call|>[", "]<|/tool_call|>"),
    "compact": template("<tool_call>{{ c | tojson(separators=(',', ':')) }}</tool_call>"),
}
FORMED = {name: with_template(TOKENIZERS["chatml"], text) for name, text in WRITTEN.items()}
FORMED |= {name: TOKENIZERS[name] for name in ("qwen",)} | {"hermes": tooled(TOKENIZERS["chatml"])}
FORMS = {name: form_of(tokenizer) for name, tokenizer in FORMED.items()}
NESTED = {
    "type": "function",
    "function": {
        "name": "nested",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string"},
                "n": {"type": "integer"},
                "on": {"type": "boolean"},
                "of": {"type": ["object", "null"]},
            },
        },
    },
}
OFFERED = [WEATHER, NESTED]
IDS = ("a1b2c3d4e", "f5g6h7j8k", "m9n8p7q6r")
IDENTIFIED = ("mistral-ids", "mistral-call-ids")


def written(name, message):
    """What the template writes for the message, its end taken off."""
    tokenizer = FORMED[name]
    turns = Turns(
        tokenizer,
        parse_conversation({"messages": [{"role": "user", "content": "hi"}, message.wire], "tools": OFFERED}),
        {},
    )
    turn = turns.turn(1)
    return turn.text[turn.start : turn.end].removesuffix("<|im_end|>")


def merged(deltas):
    """The deltas of all pieces, joined by kind and call."""
    found = {}
    for delta in deltas:
        found[delta.kind, delta.call] = found.get((delta.kind, delta.call), "") + delta.text
    return found


def streamed(text, cuts, form, **options):
    reader, deltas = Reader(form, tools=OFFERED, **options), []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        deltas += reader.feed(text[start:end])
    return reader, deltas + reader.close()


@pytest.mark.parametrize(
    ("name", "kind", "marks"),
    [
        ("hermes", "object", ("<tool_call>", "</tool_call>")),
        ("qwen", "object", ("<tool_call>", "</tool_call>")),
        ("llama", "object", ("<|python_tag|>",)),
        ("mistral", "array", ("[TOOL_CALLS]",)),
        ("mistral-ids", "array", ("[TOOL_CALLS]",)),
        ("mistral-named", "named", ("[TOOL_CALLS]", "[ARGS]")),
        ("mistral-call-ids", "named", ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")),
        ("coder", "xml", ("<tool_call>", "</tool_call>")),
        ("gemma-fenced", "object", ("```tool_code", "```")),
        ("phi", "array", ("<|tool_call|>", "<|/tool_call|>")),
        ("compact", "object", ("<tool_call>", "</tool_call>")),
    ],
)
def test_the_form_is_told_from_what_the_template_writes(name, kind, marks):
    form = FORMS[name]
    assert (form.kind, form.marks) == (kind, marks)
    assert (form.between is None) == (name == "llama")
    assert form.arguments_key == ("parameters" if name == "llama" else "arguments")
    assert form.layout == ((",", ":") if name == "compact" else (", ", ": "))


def test_a_template_without_tools_says_so_and_is_given_some():
    for name in ("chatml", "marked", "gemma"):
        assert not knows_tools(TOKENIZERS[name])
        with pytest.raises(CapabilityError, match="does not show the model its tools"):
            form_of(TOKENIZERS[name])
        assert knows_tools(tooled(TOKENIZERS[name]))
        assert form_of(tooled(TOKENIZERS[name])) == FORMS["hermes"]
    assert all(knows_tools(tokenizer) for tokenizer in FORMED.values())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (JSON_ARGUMENTS, "does not show the model its tools"),
        (template("{{ c.name + '(' + c.arguments | tojson + ')' }}"), r"'probe_weather\(\{.*a form that is not known"),
        (HEAD + TAIL, "no call that can be told from the rest.*give the tokenizer a template that writes calls"),
        (template("<|channel|>x<|message|>{{ c | tojson }}"), "a form that is not known"),
    ],
)
def test_an_unknown_form_is_named(text, said):
    tokenizer = with_template(TOKENIZERS["chatml"], text)
    with pytest.raises(CapabilityError, match=said):
        form_of(tokenizer)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
texts = st.text(alphabet='ab {}[]"\\<>/`:,;\n\u00e9\U0001f600_t', max_size=12)


some_arguments = st.dictionaries(st.text(min_size=1, max_size=4), json_values, max_size=3)
some_calls = st.tuples(st.sampled_from(["weather", "get_it"]), some_arguments)
no_tags = texts.filter(lambda text: "<" not in text)
nested_calls = st.fixed_dictionaries(
    {"place": no_tags, "n": st.integers(), "on": st.booleans(), "of": st.fixed_dictionaries({"a": no_tags})}
).map(lambda arguments: ("nested", arguments))


@st.composite
def spoken(draw):
    name = draw(st.sampled_from(sorted(FORMED)))
    form = FORMS[name]
    calls = draw(st.lists(nested_calls if name == "coder" else some_calls, max_size=1 if form.between is None else 3))
    text = draw(texts).strip()
    if any(mark in text for mark in form.marks) or text.startswith(("{", "<think>")) or (calls and not form.opener):
        text = ""
    made = tuple(ToolCall(identity, *call) for identity, call in zip(IDS, calls, strict=False))
    return name, Message("assistant", text, made)


@settings(max_examples=150, deadline=None)
@given(spoken(), st.data())
def test_what_was_trained_is_read_whole_and_in_pieces(drawn, data):
    name, message = drawn
    text = written(name, message)
    form = FORMS[name]
    read = read_message(text, form, tools=OFFERED)
    kept = [ToolCall(c.id if name in IDENTIFIED else None, c.name, c.arguments) for c in message.tool_calls]
    assert list(read.tool_calls) == kept
    assert read.content == message.content
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    reader, deltas = streamed(text, cuts, form)
    assert reader.message == read
    assert merged(deltas) == merged(streamed(text, [], form)[1])
    assert merged(deltas).get(("text", None), "") == read.content
    for number, call in enumerate(read.tool_calls):
        assert merged(deltas)["name", number] == call.name
        assert json.loads(merged(deltas)["arguments", number]) == call.arguments
        assert sum(delta.kind == "name" and delta.call == number for delta in deltas) == 1


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                *'a {}[]"\n;',
                "<think>",
                "</think>",
                "<tool_call>",
                "</tool_call>",
                '{"name": "a", ',
                '"arguments": {}}',
                "<tool",
                "[TOOL_CALLS]",
                "[ARGS]",
            ]
        ),
        max_size=9,
    ).map("".join),
    st.sampled_from(sorted(FORMS)),
    st.booleans(),
    st.data(),
)
def test_any_text_ends_the_same_wherever_it_is_cut(text, name, thinking, data):
    def outcome(cuts):
        try:
            reader, deltas = streamed(text, cuts, FORMS[name], thinking=thinking)
        except BadRow as bad:
            return bad.reason
        return reader.message, merged(deltas)

    whole = outcome([])
    assert outcome(sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))) == whole
    assert outcome(list(range(len(text)))) == whole


def test_arguments_come_as_they_are_written():
    reader = Reader(FORMS["hermes"])
    text = 'Look.\n<tool_call>\n{"name": "weather", "arguments": {"place": "Os{lo\\"", "n": [1, {}]}}\n</tool_call>'
    pieces = [reader.feed(character) for character in text]
    deltas = [delta for piece in pieces for delta in piece]
    assert reader.close() == []
    assert merged(deltas) == {
        ("text", None): "Look.",
        ("name", 0): "weather",
        ("arguments", 0): '{"place": "Os{lo\\"", "n": [1, {}]}',
    }
    # a character of arguments is handed on when it comes, and the name before any of them
    at = text.index('{"place"')
    assert [d.text for d in pieces[at]] == ["{"]
    assert [d.kind for d in deltas].index("name") < [d.kind for d in deltas].index("arguments")


def test_arguments_that_come_before_the_name_wait_for_it():
    text = '<tool_call>{"arguments": {"a": 1}, "name": "weather"}</tool_call>'
    _, deltas = streamed(text, list(range(len(text))), FORMS["hermes"])
    assert [(d.kind, d.text) for d in deltas] == [("name", "weather"), ("arguments", '{"a": 1}')]


def test_reasoning_stands_apart_in_every_form():
    for form in FORMS.values():
        read = read_message("\n<think>\n hm \n\nso </think>\n\nyes <b>", form)
        assert (read.reasoning, read.content, read.tool_calls) == ("hm \n\nso", "yes <b>", ())
    read = read_message("hm</think>yes", None, thinking=True)
    assert (read.reasoning, read.content) == ("hm", "yes")
    assert read_message("<think></think>yes", None) == Message("assistant", "yes")
    assert read_message("<think>never", None).reasoning == "never"
    assert read_message("<thi", None).content == "<thi"


def test_calls_of_llama_stand_at_the_beginning_and_may_have_their_token():
    form = FORMS["llama"]
    call = '{"name": "weather", "parameters": {"place": "Oslo"}}'
    for text in (call, f"\n{call}", f"<|python_tag|>{call}", f"<|python_tag|>\n{call} "):
        assert read_message(text, form).tool_calls == (ToolCall(None, "weather", {"place": "Oslo"}),)
    assert len(read_message(f"{call}; {call}", form).tool_calls) == 2
    assert read_message(f"So: {call}", form).content == f"So: {call}"
    with pytest.raises(BadRow, match="text stands behind a call"):
        read_message(f"{call} done", form)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("hermes", "<tool_call>{x}</tool_call>", "is no JSON"),
        ("hermes", '<tool_call>{"name": "a", "arguments": {}}', "is not closed"),
        ("hermes", '<tool_call>{"name": "a"', "is not closed"),
        ("hermes", "<tool_call>", "is not closed"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', "is no call: it takes a name under 'name'"),
        ("hermes", '<tool_call>{"name": "a"}</tool_call>', "is no call"),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>', "is no call"),
        ("hermes", '<tool_call>{"name": "a", "arguments": [1]}</tool_call>', "is no call"),
        ("hermes", '<tool_call>{"name": "a", "arguments": "x"}</tool_call>', "the arguments 'x' is no JSON"),
        ("hermes", '<tool_call>{"name": "a", "arguments": "3"}</tool_call>', "is int, a JSON object is wanted"),
        ("hermes", '<tool_call>{"name": "a", "arguments": {}, "b": 1}</tool_call>', "and no b"),
        ("hermes", '<tool_call>{"name": "a", "arguments": {"b": 1, "b": 2}}</tool_call>', "stands twice"),
        ("hermes", '<tool_call>{"name": "a", "arguments": {"b": NaN}}</tool_call>', "no number of JSON"),
        ("hermes", '<tool_call>{"name": "a", "arguments": {"b": 1e999}}</tool_call>', "no number of JSON"),
        ("hermes", '<tool_call>weather {"n": 3}</tool_call>', "'{' is wanted where 'weather"),
        ("hermes", '<tool_call>{"name": "a", "arguments": {}} and</tool_call>', "'</tool_call>' is wanted"),
        ("llama", '{"name": "a"', "is not closed"),
        ("llama", '{"place": "Oslo"}', "is no call"),
        ("mistral", "[TOOL_CALLS] none", r"'\[' is wanted"),
        ("mistral", '[TOOL_CALLS] [{"name": "a", "arguments": {}}', "is not closed"),
        ("mistral", "[TOOL_CALLS] []", "'{' is wanted"),
        ("mistral-named", "[TOOL_CALLS]weather", "is not closed"),
        ("mistral-named", "[TOOL_CALLS][ARGS]{}", "has no name"),
        ("mistral-named", "[TOOL_CALLS]a[ARGS][1]", "'{' is wanted"),
        ("coder", "<tool_call><function=a>x</function></tool_call>", "is no <parameter=KEY>"),
        ("coder", "<tool_call>a</function></tool_call>", "is no <function=NAME>"),
        (
            "coder",
            "<tool_call><function=nested><parameter=n>\nmany\n</parameter></function></tool_call>",
            "the parameter 'n' is 'many', wanted integer",
        ),
    ],
)
def test_a_malformed_call_is_an_error_and_never_text(name, text, said):
    with pytest.raises(BadRow, match=said) as caught:
        read_message(text, FORMS[name], tools=OFFERED)
    assert caught.value.reason == "bad tool call"


def test_a_call_that_was_cut_off_is_left_out_and_those_before_it_stay():
    call = '<tool_call>\n{"name": "weather", "arguments": {"n": 3}}\n</tool_call>'
    for cut in (f"Look.\n{call[:9]}", f"Look.\n{call[:30]}", f"Look.\n{call[:-1]}", f"Look.\n{call}\n{call[:-3]}"):
        reader = Reader(FORMS["hermes"])
        reader.feed(cut)
        reader.close(cut=True)
        assert len(reader.message.tool_calls) == cut.count("</tool_call>")
        assert reader.unfinished == (cut[6:] != call[:9])
    assert read_message("a <tool", FORMS["hermes"], cut=True).content == "a <tool"


def test_without_tools_all_is_text():
    text = '<tool_call>{"name": "a"}'
    assert read_message(text, None) == Message("assistant", text)

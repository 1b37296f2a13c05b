"""Answers held to schemas and calls: random weights, which write nothing of the kind by themselves."""

import json

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from attar.data.types import Message
from attar.engines.base import ChatRequest
from attar.engines.calls import read_message
from attar.engines.calls.constrain import Constraints
from attar.engines.calls.grammar import grammar_of
from attar.engines.local import LocalEngine
from attar.engines.local_chat import LocalChat
from chats import MISTRAL, QWEN, TOKENIZERS, metaspace
from lm import make_model
from test_calls import FORMED, FORMS

pytest.importorskip("llguidance", reason="llguidance is not installed")


def tool(name, required=(), **properties):
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


WORD = {"type": "string", "maxLength": 6}
DIGITS = {"type": "integer", "minimum": 0, "maximum": 99}
TOOLS = (
    tool("get", ["place"], place=WORD, n=DIGITS, unit={"enum": ["C", "F"]}),
    tool("get_all", ["on", "of"], on={"type": "boolean"}, of={"type": "array", "items": DIGITS, "maxItems": 2}),
    tool("now"),
    tool(
        "mail",
        ["to"],
        to={"type": "array", "minItems": 1, "maxItems": 2, "items": {"type": "string", "pattern": "^[a-z]{1,4}@x$"}},
        when={"type": "string", "format": "date"},
        who={"anyOf": [{"type": "null"}, {"type": "object", "properties": {"id": DIGITS}, "required": ["id"]}]},
    ),
)
CHAIN = {
    "type": "object",
    "properties": {"v": DIGITS, "n": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]}},
    "required": ["v", "n"],
}
SCHEMAS = (
    {"type": "object", "properties": {"a": WORD, "b": DIGITS}, "required": ["a", "b"]},
    {"type": "array", "items": {"enum": ["x", "y", 3, None, "\u00e9 \"q\""]}, "minItems": 1, "maxItems": 3},
    {"enum": ["positive", "negative"]},
    {"$defs": {"n": CHAIN}, "$ref": "#/$defs/n"},
    {"type": "string", "pattern": "^(ab|c)+d$", "maxLength": 9},
)  # fmt: skip


def engine_of(tokenizer, seed=0, **sizes):
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    model = make_model(
        seed=seed, vocab_size=vocabulary + 3, num_hidden_layers=2, hidden_size=32, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32, max_position_embeddings=2000,
        eos_token_id=tokenizer.eos_token_id, **sizes,
    )  # fmt: skip
    return LocalEngine(model, tokenizer)


def sentencepiece():
    """Spaces before words, and bytes as tokens of the vocabulary, not added ones."""
    made = metaspace(QWEN)
    state = json.loads(made.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    state["post_processor"] = None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )
    tokenizer.chat_template = MISTRAL
    return tokenizer


TOKENS = {
    "hermes": TOKENIZERS["chatml"],  # a template without tools
    "qwen": TOKENIZERS["qwen"],
    "llama": TOKENIZERS["llama"],
    "mistral": TOKENIZERS["mistral"],
    "metaspace": sentencepiece(),
}
ENGINES = {name: engine_of(tokenizer) for name, tokenizer in TOKENS.items()}


def request(text="hi", n=200, **options):
    return ChatRequest((Message("user", text),), max_tokens=n, **{"temperature": 1.0, **options})


def answers(engine, requests, **options):
    found = dict(LocalChat(engine, name="tiny", **{"tokens_per_batch": 8192, **options}).chat(requests))
    return [found[number] for number in range(len(requests))]


def fits(call):
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}
    jsonschema.validate(call.arguments, schemas[call.name])
    assert set(call.arguments) <= set(schemas[call.name]["properties"])


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_random_weights_call_as_they_must(name):
    choices = ["required", "required", "get", "get_all", "now", "mail", "mail"]
    asked = [request(n=120, tools=TOOLS, tool_choice=choice, seed=seed) for seed, choice in enumerate(choices)]
    complete = 0
    for one, answer in zip(asked, answers(ENGINES[name], asked), strict=True):
        for call in answer.message.tool_calls:
            fits(call)
            assert one.tool_choice in ("required", call.name)
        assert answer.message.content == ""
        if answer.finish_reason == "tool_calls":
            assert len(answer.message.tool_calls) == 1 or (one.tool_choice == "required" and name != "llama")
            complete += 1
        else:
            assert (answer.finish_reason, answer.completion_tokens) == ("length", 120)
    # A template that reasons lets the model think first, and random weights seldom stop.
    assert complete >= (1 if name == "qwen" else 5)


def test_random_weights_answer_as_the_schema_has_it():
    asked = [request(schema=schema, seed=seed) for schema in SCHEMAS for seed in range(3)]
    for one, answer in zip(asked, answers(ENGINES["hermes"], asked), strict=True):
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.message.content), one.schema)
        assert answer.message.tool_calls == ()


def walk(tokenizer, constraints, grammar, begun, seed, n=300):
    """A random walk through a grammar: the ids; None where it is not over after n tokens."""
    vocabulary, end = max(tokenizer.get_vocab().values()) + 1, tokenizer.eos_token_id
    generator, matcher, ids = torch.Generator().manual_seed(seed), constraints.matcher(grammar), list(begun)
    for token in begun:
        matcher.take(token)
    while len(ids) < n and not matcher.over:
        token = int(matcher.mask(torch.randn(vocabulary, generator=generator)).argmax())
        if token == end:
            return ids
        matcher.take(token)
        ids.append(token)
    return ids if matcher.over else None


@pytest.mark.parametrize("name", sorted(FORMED))
def test_every_form_is_held_to_from_the_moment_a_call_is_begun(name):
    tokenizer, form = FORMED[name], FORMS[name]
    constraints = Constraints(tokenizer, {tokenizer.eos_token_id}, max(tokenizer.get_vocab().values()) + 1)
    plain = {"type": "string", "enum": ["C", "F"]} if name == "coder" else WORD
    tools = (tool("get", ["place"], place=plain, n=DIGITS), *TOOLS[1:3])
    apart = {"apart": constraints.apart, "words": constraints.words}
    grammar = grammar_of(form=form, tools=tools, choice="auto", **apart)
    begun = tokenizer.encode(("So: " if form.opener else "") + (form.opener or "{"), add_special_tokens=False)
    read = []
    for seed in range(8):
        ids = walk(tokenizer, constraints, grammar, begun, seed)
        if ids is not None:
            read.append(read_message(tokenizer.decode(ids), form, tools=tools))
    assert len(read) >= 6
    for message in read:
        assert message.content == ("So:" if form.opener else "")
        assert message.tool_calls
        for call in message.tool_calls:
            schema = next(t["function"]["parameters"] for t in tools if t["function"]["name"] == call.name)
            jsonschema.validate(call.arguments, schema)

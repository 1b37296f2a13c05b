"""hf: models that continue conversations."""

import pytest
import torch

from attar.data.conversations import parse_conversation
from attar.data.types import Message
from attar.engines.base import Answer, ChatEngine, ChatRequest, Failure
from attar.engines.load import load_chat_teacher
from attar.engines.local import load_local
from attar.engines.local_chat import LocalChat
from attar.errors import CapabilityError, ModelError
from attar.recipe import parse_recipe
from attar.tokens import encode_request
from chats import TEMPLATES, TOKENIZERS, TOOL_TALK, WEATHER, encode
from teachers import Sums


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_request_is_what_an_example_begins_with(name):
    tokenizer = TOKENIZERS[name]
    asked = [{"role": "user", "content": "is it cold? <|im_end|> [INST] </turn>"}]
    example = encode(tokenizer, [*asked, {"role": "assistant", "content": "it is"}])[0]
    ids = encode_request(tokenizer, [Message("user", asked[0]["content"])])
    assert ids == example.ids[: example.supervised.argmax()].tolist()


def test_a_request_with_tools_is_what_an_example_begins_with():
    tokenizer = TOKENIZERS["qwen"]
    example = encode(tokenizer, TOOL_TALK, [WEATHER])[0]
    messages = parse_conversation({"messages": TOOL_TALK}).messages
    ids = encode_request(tokenizer, messages[:1], [WEATHER])
    text = tokenizer.decode(ids)
    assert '"name": "weather"' in text
    assert text == tokenizer.decode(example.ids)[: len(text)]


@pytest.fixture(scope="module")
def engine(tiny_teacher):
    return load_local(f"hf:{tiny_teacher}", device=torch.device("cpu"))


def request(text="turn off", n=8, **options):
    return ChatRequest((Message("user", text),), max_tokens=n, **options)


def answers(engine, requests, **options):
    return dict(LocalChat(engine, name="tiny", **options).chat(requests))


TEXTS = ["turn off", "good morning to you and you and you", "play", "buy milk and bread please"]


def test_greedy_answers_are_those_of_one_request_at_a_time(engine):
    # Rows end at different times, the first of them before the others.
    lengths = [2, 9, 5, 7]
    requests = [request(text, n, temperature=0.0) for text, n in zip(TEXTS, lengths, strict=True)]
    batched = answers(engine, requests, tokens_per_batch=4096)
    for number, (text, n) in enumerate(zip(TEXTS, lengths, strict=True)):
        ids = encode_request(engine.tokenizer, [Message("user", text)])
        written = engine.write(ids, n)
        answer = batched[number]
        own = [i for i in written.ids if i not in (engine.tokenizer.eos_token_id,)]
        assert answer.message.content == engine.tokenizer.decode(own, skip_special_tokens=True)
        assert answer.finish_reason == ("stop" if written.stopped else "length")
        assert (answer.prompt_tokens, answer.completion_tokens, answer.usd) == (len(ids), len(own), 0.0)


def test_a_seed_gives_the_same_answer_whatever_else_is_asked(engine):
    def said(requests, **options):
        return [a.message.content for _, a in sorted(answers(engine, requests, **options).items())]

    seeded = [request(text, temperature=1.0, seed=number) for number, text in enumerate(TEXTS)]
    alone = [said([one])[0] for one in seeded]
    assert said(seeded, tokens_per_batch=4096) == alone
    assert said(seeded, tokens_per_batch=1) == alone
    others = {said([request(TEXTS[0], temperature=1.0, seed=seed)])[0] for seed in range(6)}
    assert len(others) > 3
    assert len({said([request(TEXTS[0], temperature=1.0, top_p=1e-6, seed=seed)])[0] for seed in range(4)}) == 1


def test_a_batch_holds_as_many_prompts_as_fit_and_no_more(engine):
    chat, sizes = LocalChat(engine, name="tiny", tokens_per_batch=40), []
    real = chat._answer
    chat._answer = lambda batch: sizes.append(len(batch)) or real(batch)
    drawn = []
    outcomes = chat.chat(drawn.append(n) or request("play") for n in range(9))
    next(outcomes)
    assert len(drawn) < 9
    assert sum(1 for _ in outcomes) == 8
    length = len(encode_request(engine.tokenizer, [Message("user", "play")]))
    assert sizes[0] == 40 // length


def test_stop_texts_end_an_answer_and_do_not_stand_in_it(engine):
    whole = answers(engine, [request(temperature=0.0, n=12)])[0].message.content
    stop = whole[5:8]
    cut = answers(engine, [request(temperature=0.0, n=12, stop=("never", stop))])[0]
    assert cut.message.content == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_what_cannot_be_asked_is_said(engine):
    with pytest.raises(CapabilityError, match="cannot give top_logprobs"):
        answers(engine, [request(top_logprobs=2)])
    for options, said in (
        ({"schema": {"type": "object"}}, "an answer that fits a schema needs an engine that is constrained"),
        ({"tools": (WEATHER,), "tool_choice": "required"}, "a call that must be made needs an engine"),
    ):
        with pytest.raises(CapabilityError, match=said):
            answers(engine, [request(**options)], constrained=False)
    outcome = answers(engine, [request("play " * 600), request("play", n=2)])
    assert outcome[0].reason == "bad request"
    assert outcome[0].final
    assert "the model reads 512" in outcome[0].detail
    assert isinstance(outcome[1], Answer)
    refused = answers(engine, [ChatRequest((Message("tool", "x"),), 4)])
    assert isinstance(refused[0], Answer | Failure)


def recipe_of(model, **more):
    content = {"name": "a", "task": "chat", "teacher": {"model": model, **more}, "data": {"train": "x"}}
    return parse_recipe(content, "recipe")


def test_a_teacher_is_loaded_by_its_name(tiny_teacher):
    loaded = load_chat_teacher(recipe_of(f"hf:{tiny_teacher}"))
    assert isinstance(loaded, LocalChat)
    [(number, answer)] = loaded.chat([request(n=3, temperature=0.0)])
    assert (number, answer.model) == (0, tiny_teacher.name)
    assert isinstance(load_chat_teacher(recipe_of("teachers:Sums")), Sums)
    assert isinstance(Sums(), ChatEngine)
    with pytest.raises(ModelError, match="is no chat engine; it needs capabilities, chat"):
        load_chat_teacher(recipe_of("fakes:Keyword"))
    with pytest.raises(ModelError, match=r"nobody:Here' is neither hf:.* nor a class package"):
        load_chat_teacher(recipe_of("nobody:Here"))

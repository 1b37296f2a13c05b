"""A teacher in vLLM, whose part is played by a small model: what is asked, what is read, what is refused."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from attar.data.types import Message
from attar.engines.base import ChatRequest
from attar.engines.load import load_chat_teacher, load_teacher
from attar.engines.vllm import load_vllm
from attar.errors import CapabilityError, MissingExtra, ModelError
from attar.recipe import ChatRecipe
from attar.signals.chat import signal_kind
from attar.signals.language import ask
from attar.signals.packing import unpack_top_k
from attar.signals.workers import load_asker
from attar.tokens import TokenizedExample


class LLM:
    """As vLLM's, as far as it is used here."""

    def __init__(self, folder, **options):
        assert options["max_logprobs"] == -1
        assert options["logprobs_mode"] == "raw_logprobs"
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        own = {"top_k": 5, "temperature": 0.6, "max_tokens": 2000}
        config = SimpleNamespace(max_model_len=64, get_diff_sampling_param=lambda: own)
        self.llm_engine = SimpleNamespace(model_config=config)
        self.asked = []

    def get_tokenizer(self):
        return self.tokenizer

    @torch.no_grad()
    def generate(self, prompts, parameters, *, use_tqdm):
        assert not use_tqdm
        assert prompts
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        if isinstance(parameters, list):
            self.asked += zip(ids, parameters, strict=True)
            return [self.written(p) for p in parameters]
        return [self.output(prompt, parameters.prompt_logprobs) for prompt in ids]

    def written(self, parameters):
        cut = parameters.max_tokens == 1
        text = "yes" if cut else "<think>why</think>\nno"
        made = SimpleNamespace(text=text, token_ids=[4, 5], finish_reason="length" if cut else "stop")
        return SimpleNamespace(outputs=[made])

    def output(self, ids, entries):
        rows = [None]
        log_probs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(1, len(ids)):
            order = log_probs[place - 1].argsort(descending=True)
            ranks = {int(token): rank for rank, token in enumerate(order, start=1)}
            # The token that stands there comes first, as from vLLM, and with it one more where it is none of the best.
            listed = dict.fromkeys([ids[place], *order[:entries].tolist()])
            rows.append(
                {
                    token: SimpleNamespace(
                        logprob=float(log_probs[place - 1, token]), rank=ranks[token], decoded_token=None
                    )
                    for token in listed
                }
            )
        return SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=rows)


@pytest.fixture
def vllm(monkeypatch):
    module = SimpleNamespace(LLM=LLM, SamplingParams=lambda **settings: SimpleNamespace(**settings))
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def recipe(folder, **signals):
    return ChatRecipe.model_validate(
        {
            "name": "job",
            "task": "chat",
            "teacher": {"model": f"vllm:{folder}"},
            "data": {"train": "train.jsonl"},
            "distill": {"objectives": [{"kind": "logit"}], "signals": signals},
        }
    )


def examples():
    rng = np.random.default_rng(0)
    made = []
    for n in range(4):
        length = 6 + 3 * n
        supervised = rng.random(length) < 0.6
        supervised[0], supervised[-1] = False, True
        made.append(TokenizedExample(f"e{n}", rng.integers(5, 300, length).astype(np.int32), supervised))
    return made


def test_its_signals_are_those_of_the_same_weights(vllm, tiny_teacher):
    job = recipe(tiny_teacher, kind="top_k", entries=12)
    kind = signal_kind(job)
    model = LLM(str(tiny_teacher), max_logprobs=-1, logprobs_mode="raw_logprobs")
    vocabulary = len(model.tokenizer)
    for one, other in zip(
        load_asker(job, kind)(examples()), ask(model.model, model.tokenizer, examples(), kind), strict=True
    ):
        np.testing.assert_array_equal(one["ids"], other["ids"])
        # Probabilities are those of the same model, up to the padding that the other one's batch has.
        assert np.abs(one["codes"].astype(int) - other["codes"].astype(int)).max() <= 1
        a, b = (unpack_top_k(record, vocabulary) for record in (one, other))
        torch.testing.assert_close(a.log_tail, b.log_tail, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("signals", [{"kind": "hidden"}, {"kind": "sampled"}])
def test_what_it_does_not_give_is_refused(vllm, tiny_teacher, signals):
    job = recipe(tiny_teacher, **signals)
    with pytest.raises(CapabilityError, match="set kind: top_k"):
        load_asker(job, signal_kind(job))


def test_examples_that_are_too_long_are_refused(vllm, tiny_teacher):
    job = recipe(tiny_teacher, kind="top_k", entries=4)
    long = TokenizedExample("long", np.ones(64, np.int32), np.arange(64) > 0)
    with pytest.raises(CapabilityError, match=r"lower curate\.max_tokens to 63"):
        load_asker(job, signal_kind(job))([long])


def test_it_continues_conversations(vllm, tiny_teacher):
    engine = load_chat_teacher(recipe(tiny_teacher))
    long = ChatRequest((Message("user", "word " * 80),), 4)
    requests = [
        ChatRequest((Message("user", "say <|im_end|>"),), max_tokens=1, temperature=0.0, seed=3),
        long,
        ChatRequest((Message("user", "say"),), max_tokens=900, top_p=0.5, stop=("x",)),
    ]
    answers = dict(engine.chat([*requests, None, long]))
    assert [answers[n].finish_reason for n in (0, 2)] == ["length", "stop"]
    assert [answers[n].message.content for n in (0, 2)] == ["yes", "no"]
    assert answers[2].message.reasoning == "why"
    (first, one), (second, other) = engine._engine.asked
    assert (answers[0].prompt_tokens, answers[0].completion_tokens, answers[0].usd) == (len(first), 2, 0.0)
    # What a user writes is no control token.
    end = engine._engine.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert first.count(end) == second.count(end) == 1
    assert vars(one) == {"temperature": 0.0, "top_k": 5, "seed": 3, "max_tokens": 1, "stop": []}
    assert vars(other) == {"temperature": 0.6, "top_k": 5, "top_p": 0.5, "max_tokens": 64 - len(second), "stop": ["x"]}
    for n in (1, 3):
        assert (answers[n].reason, answers[n].final) == ("bad request", True)
        assert "the model reads 64" in answers[n].detail
    with pytest.raises(CapabilityError, match="vllm serve"):
        list(engine.chat([ChatRequest((Message("user", "x"),), 4, schema={"type": "object"})]))


def test_where_it_cannot_be(tmp_path, tiny_teacher, monkeypatch):
    with pytest.raises(ModelError, match="is no folder with a model"):
        load_vllm(f"vllm:{tmp_path}")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtra, match=r"attar\[vllm\]"):
        load_vllm(f"vllm:{tiny_teacher}")
    with pytest.raises(ModelError, match="hf:FOLDER"):
        load_teacher(recipe(tiny_teacher))

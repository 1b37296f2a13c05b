"""Weights of tokens: by kind, step and outcome, in examples and in the loss."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import chats
import families
from attar.data.conversations import parse_conversation
from attar.data.episodes import Episode, Outcome
from attar.errors import DataError
from attar.losses import Divergence
from attar.signals.sparse import example_random, sampled, top_k
from attar.tokens import (
    KINDS,
    LossWeights,
    TokenizedExample,
    encode_conversation,
    encode_conversations,
    highlight,
    spans,
    with_tools,
)
from attar.train.batches import SIGNAL, WEIGHTS, Collator, TokenBudgetBatches, TokenizedRows, collate
from attar.train.language_model import LanguageModel
from attar.train.objectives import Feature, Logit, Response
from divergences import by_torch
from training import VOCABULARY, assert_same, causal, examples, make, weights

PAD = 1
READY = with_tools(families.tokenizer("chatml")).tokenizer


def encode(weights, talk=None, tokenizer=READY, **options):
    return encode_conversation(tokenizer, talk or families.talk(), max_tokens=9999, weights=weights, **options)


def weighed(example, tokenizer=READY):
    """What each stretch of one kind weighs."""
    found, place = [], 0
    values = example.weights if example.weights is not None else example.supervised.astype(np.float32)
    for text, kind in spans(tokenizer, example):
        kinds = KINDS.index(kind)
        start = next(i for i in range(place, len(example)) if example.kinds[i] == kinds)
        place = next((i for i in range(start, len(example)) if example.kinds[i] != kinds), len(example))
        (weight,) = set(values[start:place].tolist())
        found.append((text, kind, weight))
    return found


# examples


def test_weights_of_kinds_and_steps():
    one = LossWeights(kinds={"reason": 0.5, "call": 2.0, "end": 4.0}, steps=(1.0, 0.25))
    (example,) = encode(one)
    assert [(kind, weight) for _, kind, weight in weighed(example)] == [
        ("reason", 0.5), ("text", 1.0), ("call", 2.0), ("end", 4.0),
        ("reason", 0.125), ("text", 0.25), ("end", 1.0),
        ("text", 0.25), ("end", 1.0),
    ]  # fmt: skip
    assert example.weights.dtype == np.float32
    (plain,) = encode(None)
    assert example.id == plain.id
    assert example.supervised.tolist() == plain.supervised.tolist()


def test_an_outcome_weighs_the_whole_episode():
    talk = families.talk()
    episode = Episode("w", "t", "f", "p", 0, 0, talk.messages, talk.tools, Outcome(False), "steps")
    rule = LossWeights(kinds={"call": 2.0}, success=1.0, failure=0.25)
    (failure,) = encode(rule, episode)
    (success,) = encode(rule, replace(episode, outcome=Outcome(True)))
    (unjudged,) = encode(rule, talk)
    assert (failure.weights == success.weights / 4).all()
    assert unjudged.weights.tolist() == success.weights.tolist()
    counts = Counter()
    assert encode(LossWeights(failure=0), episode, counts=counts) == []
    assert counts["dropped"] == 1
    assert counts["weightless"] == 188
    with pytest.raises(DataError, match=r"'dropped': 1.*weights of their kinds"):
        encode_conversations(READY, [episode], max_tokens=9999, max_truncated=0, weights=LossWeights(failure=0))
    examples, counts = encode_conversations(
        READY, [episode, replace(episode, outcome=Outcome(True))], max_tokens=9999, max_truncated=0,
        weights=LossWeights(failure=0),
    )  # fmt: skip
    assert len(examples) == counts["examples"] == 1


def test_what_weighs_nothing_is_not_supervised():
    counts = Counter()
    (example,) = encode(LossWeights(kinds={"reason": 0.0}), counts=counts)
    assert all("think" not in text for text, flag in highlight(READY, example) if flag)
    assert example.weights is None  # the others weigh 1
    assert {kind for _, kind in spans(READY, example)} == {"text", "call", "end"}
    (plain,) = encode(None)
    assert counts["weightless"] == plain.supervised.sum() - example.supervised.sum() == 54
    assert counts["supervised reason"] == 0
    assert counts["supervised call"] == 118
    # its signals are others, so its name is another; as is that of an example that learns as many other tokens
    assert example.id.startswith(plain.id + "@")
    (other,) = encode(LossWeights(kinds={"call": 0.0}))
    assert len({plain.id, example.id, other.id}) == 3


def test_weights_are_cut_off_with_the_tokens():
    rule = LossWeights(kinds={"call": 2.0})
    (whole,) = encode(rule)
    last = int(np.flatnonzero(whole.supervised)[-5])
    (cut,) = encode_conversation(READY, families.talk(), max_tokens=last, weights=rule)
    assert cut.weights.tolist() == whole.weights[:last].tolist()
    assert cut.kinds.tolist() == whole.kinds[:last].tolist()


def test_steps_count_the_assistants_messages_in_each_example():
    qwen = families.tokenizer("qwen3")
    talk = families.talk()
    rows = talk.wire
    rows["messages"][2]["train"] = False  # a step all the same
    examples = encode(LossWeights(steps=(5.0, 0.5, 0.25)), parse_conversation(rows), qwen)
    assert [sorted(set(e.weights[e.supervised].tolist())) for e in examples] == [[0.5], [0.25]]


def test_kinds_under_templates_of_other_kinds():
    def found(name, rows, tools=()):
        tokenizer = chats.TOKENIZERS.get(name) or chats.with_template(chats.TOKENIZERS["chatml"], name)
        row = {"messages": rows, "tools": list(tools)}
        return [spans(tokenizer, e) for e in encode(LossWeights(), parse_conversation(row), tokenizer)]

    assert found("mistral", chats.TALK) == [
        [(" hello there", "text"), ("<eos>", "end"), (" it is 3 degrees", "text"), ("<eos>", "end")]
    ]
    rows = [dict(message) for message in chats.TOOL_TALK]
    rows[1] |= {"content": "<tool_call>", "reasoning_content": "hm"}
    call = '\n<tool_call>\n{"name": "weather", "arguments": {"place": "Oslo", "n": 3}}\n</tool_call>'
    (first,) = found("qwen", rows, [chats.WEATHER])
    assert first[:3] == [("<think>\nhm\n</think>\n\n", "reason"), ("<tool_call>", "text"), (call, "call")]
    rows[1] |= {"content": ""}
    (first,) = found("qwen", rows, [chats.WEATHER])
    assert first[:2] == [("<think>\nhm\n</think>\n\n", "reason"), (call[1:], "call")]
    # the template drops the text beside calls; the call's own words count as the call
    rows[1] |= {"content": "weather"}
    (llama,) = found("llama", rows, [chats.WEATHER])
    assert llama[0] == ('<|python|>{"name": "weather", "parameters": {"place": "Oslo", "n": 3}}', "call")
    rows = [chats.TALK[0], {**chats.TALK[1], "reasoning_content": "hello"}]
    ((reason, text, end),) = found(chats.HARMONY, rows)
    assert reason == (
        "<|channel|>analysis<|message|>hello<|end|><|start|>assistant<|channel|>final<|message|>",
        "reason",
    )
    assert (text, end) == (("hello there", "text"), ("<|return|>", "end"))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"kinds": {"thought": 1.0}}, "kinds names 'thought'; wanted some of reason, text, call, end"),
        ({"kinds": {"call": -1.0}}, r"kinds\['call'\] is -1.0"),
        ({"steps": (1.0, float("nan"))}, r"steps\[1\] is nan"),
        ({"failure": float("inf")}, "failure is inf"),
    ],
)
def test_weights_that_cannot_be(bad, said):
    with pytest.raises(ValueError, match=said):
        LossWeights(**bad)


def test_examples_that_contradict_themselves():
    ids, mask = np.arange(3, dtype=np.int32), np.array([False, True, False])

    def made(**changes):
        return TokenizedExample("x", ids, mask, **changes)

    made(weights=np.float32([0, 0.5, 0]), kinds=np.int8([-1, 2, -1]))
    for values in ([0, 0, 0], [0, 1, 1], [0, np.inf, 0], [0, np.nan, 0]):
        with pytest.raises(ValueError, match="above 0 where supervised"):
            made(weights=np.float32(values))
    with pytest.raises(ValueError, match=r"weights has shape \(2,\)"):
        made(weights=np.float32([0, 1]))
    with pytest.raises(ValueError, match="says nothing of a supervised token"):
        made(kinds=np.int8([-1, -1, -1]))
    with pytest.raises(ValueError, match="has no kinds"):
        spans(READY, made())


# the loss


def with_weights(some, seed=0, scale=1.0):
    """Weights that no sum of is a round number; the first example has none."""
    rng = np.random.default_rng(seed)
    return [some[0]] + [
        example.weighted((scale * rng.uniform(0.05, 3, len(example))).astype(np.float32)) for example in some[1:]
    ]


def batch_of(some):
    return collate(list(enumerate(some)), PAD)


def weights_of(example):
    values = example.weights if example.weights is not None else np.ones(len(example), dtype=np.float32)
    return torch.from_numpy(values[example.supervised]).double()


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.student.parameters()), allow_unused=True)


def by_hand(student, teacher, some, one):
    """sum(w l) / sum(w) over all tokens from dense logits; ``one`` gives l of an example's logits."""
    total, weight = 0.0, 0.0
    for example in some:
        places = np.flatnonzero(example.supervised)
        ids = torch.from_numpy(example.ids).long()[None]
        ours = student(ids).logits[0, places - 1]
        with torch.no_grad():
            theirs = teacher(ids).logits[0, places - 1]
        values = one(ours, theirs, ids[0, places])
        total = total + (weights_of(example) * values).sum()
        weight += float(weights_of(example).sum())
    return total / weight


def cross(ours, theirs, ids):
    return F.cross_entropy(ours, ids, reduction="none")


def soft(ours, theirs, ids):
    return by_torch(ours, theirs, Divergence("forward_kl", 2.0))


def signals(teacher, some, columns):
    with torch.no_grad():
        logits = torch.cat(
            [teacher(torch.from_numpy(e.ids).long()[None]).logits[0, np.flatnonzero(e.supervised) - 1] for e in some]
        )
    return {f"{SIGNAL}{name}": value for name, value in columns(logits).items()}


def whole_vocabulary(logits):
    return top_k([logits], VOCABULARY, 2.0)._asdict()


def all_of_it(logits):
    """A sample with every entry of the distribution."""
    signal = sampled([logits], 1e-9, example_random(0, "a"), 2.0)
    return {"ids": signal.ids, "entry_weights": signal.entry_weights, "entropy": signal.entropy}


@pytest.mark.parametrize(
    ("objective", "columns", "one", "tolerance"),
    [
        (Response(), None, cross, 1e-8),
        (Logit(2.0), None, soft, 1e-8),
        (Logit(2.0), whole_vocabulary, soft, 1e-5),  # kept in float32
        (Logit(2.0), all_of_it, soft, 1e-5),
    ],
    ids=["response", "live", "top_k", "sampled"],
)
def test_value_and_gradient_are_those_of_the_weighted_mean_by_hand(objective, columns, one, tolerance):
    some, teacher = with_weights(examples()), causal(width=48, seed=3)
    cached = columns is not None
    module = LanguageModel(
        causal(), [objective], None if cached or objective.name == "response" else teacher, temperature=2.0
    )
    batch = batch_of(some) | (signals(teacher, some, columns) if cached else {})
    found, wanted = module(batch).total, by_hand(module.student, teacher, some, one)
    assert found.item() == pytest.approx(wanted.item(), rel=tolerance)
    even = by_hand(module.student, teacher, [replace(e, weights=None) for e in some], one)
    assert abs(found.item() - even.item()) > 1e-3
    for ours, theirs in zip(gradients(found, module), gradients(wanted, module), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 1e-2)


def test_features_are_weighted_too():
    some, teacher = with_weights(examples()), causal(seed=3)
    module = LanguageModel(causal(), [Feature({"model.layers.0": "model.layers.0"})], teacher)
    module.probe(batch_of(some[:1]), 1)
    alone, weight = 0.0, 0.0
    for example in some:
        for place in np.flatnonzero(example.supervised):
            mask = np.zeros(len(example), dtype=bool)
            mask[place] = True
            token = TokenizedExample("t", example.ids, mask)
            w = 1.0 if example.weights is None else float(example.weights[place])
            alone, weight = alone + w * module(batch_of([token])).total.item(), weight + w
    assert module(batch_of(some)).total.item() == pytest.approx(alone / weight, rel=1e-9)


def test_weights_of_one_are_no_weights_bit_for_bit():
    some, teacher = examples(), causal(width=48, seed=3, dtype=torch.float32)
    objectives = [Response(), Logit(2.0)]
    module = LanguageModel(causal(dtype=torch.float32), objectives, teacher)
    batch = batch_of(some)
    assert WEIGHTS not in batch
    plain, even = module(batch), module(batch | {WEIGHTS: batch["supervised"].float()})
    assert torch.equal(plain.each, even.each)
    for ours, theirs in zip(gradients(plain.total, module), gradients(even.total, module), strict=True):
        assert torch.equal(ours, theirs)
    rows = [e.weighted(np.ones(len(e), dtype=np.float32)) for e in some]
    assert all(row.weights is None and row.id == e.id for row, e in zip(rows, some, strict=True))


@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_a_step_does_not_depend_on_how_it_is_cut(tmp_path, scale):
    """Nor on the size of the weights: those of a whole step may sum to less than 1."""
    some, teacher = with_weights(examples(6), scale=scale), causal(width=48, seed=3)
    some[0] = some[0].weighted(np.full(len(some[0]), scale, dtype=np.float32))
    longest = max(map(len, some))
    after = []
    for budget in (10_000, longest, 2 * longest):
        data = TokenizedRows(some, budget)
        micro_batches = len(TokenBudgetBatches(data.lengths, budget, seed=1))
        trainer = make(
            tmp_path / str(budget), causal(), [Response(weight=0.5), Logit(2.0)], data, teacher=teacher,
            collator=Collator(PAD), max_steps=1, gradient_accumulation_steps=micro_batches,
        )  # fmt: skip
        trainer.train()
        after.append(weights(trainer.student))
    for other in after[1:]:
        assert_same(after[0], other, 1e-11)
    # one step of plain gradient descent, by hand
    student = causal()
    # in one pass, as norms round gradients to float32
    by_hand(student, teacher, some, lambda *o: 0.5 * cross(*o) + soft(*o)).backward()
    for name, parameter in student.named_parameters():
        wanted = parameter.detach() - 0.1 * parameter.grad
        torch.testing.assert_close(after[0][name], wanted, rtol=1e-7, atol=1e-10)


def test_processes_share_one_denominator(tmp_path):
    """What two processes' gradients sum to is the whole step's, where one has weights and the other none."""
    some, teacher = with_weights(examples()), causal(width=48, seed=3)
    trainer = make(tmp_path, causal(), [Response(), Logit(2.0)], None, teacher=teacher)
    parts = [batch_of(some[:1]), batch_of(some[1:])]
    device = torch.device("cpu")
    counts = [trainer._get_num_items_in_batch([part], device) for part in parts]
    assert counts[0].tolist() == [float(some[0].supervised.sum())] * 2
    module, both = trainer.distilled, sum(counts)
    whole = gradients(module(batch_of(some)).total, module)
    shares = [gradients(module(part, both).total, module) for part in parts]
    for ours, one, other in zip(whole, *shares, strict=True):
        torch.testing.assert_close(ours, one + other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("budget", [20, 1000])
def test_evaluation_is_the_weighted_mean(tmp_path, budget):
    some, teacher = with_weights(examples(), scale=0.001)[1:], causal(width=48, seed=3)
    assert sum(float(weights_of(example).sum()) for example in some) < 1
    data = TokenizedRows(some, budget)
    trainer = make(
        tmp_path, causal(), [Response(), Logit(2.0)], data, teacher=teacher, evaluated=data, collator=Collator(PAD)
    )
    losses = trainer.evaluate()
    for name, one in (("response", cross), ("logit", soft)):
        wanted = by_hand(trainer.student, teacher, some, one).item()
        assert losses[f"eval_{name}"] == pytest.approx(wanted, rel=1e-9)

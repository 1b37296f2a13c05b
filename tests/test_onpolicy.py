"""Batches that the student writes itself: what is drawn, what is learned of it, when, and whether runs repeat."""

import copy
import random

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from attar.engines.heads import head_of
from attar.errors import CapabilityError, TrainingError
from attar.losses import Divergence, Head
from attar.signals.language import SignalKind, SignalReader, ask
from attar.signals.store import SignalStore
from attar.tokens import TokenizedExample
from attar.train.batches import WRITTEN, Collator, TokenizedRows, collate
from attar.train.checkpoints import COMPLETE
from attar.train.language_model import LanguageModel
from attar.train.objectives import Logit, Response
from attar.train.onpolicy import OnPolicyRows
from attar.train.writing import Continuation, Sampling, as_examples, ends_of, learned_starts, write
from divergences import by_torch
from lm import make_model
from training import VOCABULARY, Net, Stop, assert_same, causal, make, rows, weights

END = 1
BUDGET = 60


def recorded(n=24, seed=0):
    """Two turns each: what was asked, and an answer with its end."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(n):
        ids, learned = [], []
        for _ in range(2):
            asked, answer = (rng.integers(2, VOCABULARY, rng.integers(2, 6)).tolist() for _ in range(2))
            ids += [*asked, *answer, END]
            learned += [False] * len(asked) + [True] * (len(answer) + 1)
        found.append(TokenizedExample(f"talk-{number}", np.array(ids, np.int32), np.array(learned)))
    return found


def sampling(**changes):
    return Sampling(**{"ends": frozenset({END}), "max_new_tokens": 7, **changes})


def source(share=1.0, examples=None, **changes):
    how = {key: changes.pop(key) for key in ("temperature", "max_new_tokens", "longest") if key in changes}
    return OnPolicyRows(examples or recorded(), BUDGET, sampling=sampling(**how), share=share, **changes)


class Ids:
    """Of a tokenizer, what says how large the vocabulary is."""

    def get_vocab(self):
        return {str(number): number for number in range(VOCABULARY)}


class Kept(TrainerCallback):
    """What was logged at each step."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def taught(folder, data, objectives, teacher, student=None, *, reader=None, resume=None, callbacks=(), **changes):
    """A trainer that has run, and its log; the collator's signals are of ``reader``."""
    kept = Kept()
    model = LanguageModel(student or causal(), objectives, teacher)
    changes = {"max_steps": 6, "logging_strategy": "steps", "logging_steps": 1, **changes}
    trainer = make(folder, model, None, data, collator=Collator(END, reader), callbacks=[kept, *callbacks], **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [log for log in kept.logs if "loss" in log]


def seen(data):
    """Keeps the batches that a source gives out."""
    batches, give = [], data.__getitems__

    def keep(numbers):
        batches.append([example for _, example in give(numbers)])
        return give(numbers)

    data.__getitems__ = keep
    return batches


# what is drawn


def alone(model, prompt, tokens):
    """The likeliest continuation, without a cache and without company."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == END:
            break
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_prompts_of_any_length_go_on_together_as_each_does_alone(family):
    """With relative positions, and with absolute ones."""
    model = make_model(family, vocab_size=VOCABULARY, num_hidden_layers=2).double()
    rng = random.Random(0)
    prompts = [[rng.randrange(2, VOCABULARY) for _ in range(length)] for length in (1, 9, 3, 17, 2, 5)]
    # Some leave early, so that the others have to go on in a smaller batch.
    how = sampling(temperature=1e-9, max_new_tokens=20, longest=22)
    found = write(model, head_of(model), prompts, how, torch.Generator())
    assert [one.prompt for one in found] == [tuple(prompt) for prompt in prompts]
    assert [one.written for one in found] == [alone(model, prompt, how.room(prompt)) for prompt in prompts]
    assert len({len(one.written) for one in found}) > 2


def test_tokens_are_drawn_from_the_whole_softened_distribution():
    model, n = causal(), 4000
    prompt = [5, 9, 4]
    found = write(
        model,
        head_of(model),
        [prompt] * n,
        sampling(temperature=2.0, max_new_tokens=1),
        torch.Generator().manual_seed(0),
    )
    counts = torch.bincount(torch.tensor([one.written[0] for one in found]), minlength=VOCABULARY)
    with torch.no_grad():
        wanted = (model(torch.tensor([prompt])).logits[0, -1] / 2).softmax(-1) * n
    # Chi-square with 39 degrees of freedom is below 72.1 in 999 of 1,000 cases; the seed is fixed.
    assert float(((counts - wanted) ** 2 / wanted).sum()) < 72.1


def test_an_answer_ends_where_its_end_was_drawn_and_nowhere_else():
    model = causal()
    found = write(model, head_of(model), [[3, 4]] * 200, sampling(temperature=3.0), torch.Generator().manual_seed(0))
    assert {one.ended for one in found} == {True, False}
    for one in found:
        assert one.ended == (one.written[-1] == END)
        assert END not in one.written[:-1]
        assert one.ended or len(one.written) == 7
        [example] = as_examples("x", [one])
        assert example.ids.tolist() == [*one.prompt, *one.written]
        assert example.supervised.tolist() == [False] * 2 + [True] * len(one.written)
        assert (example.ids == END).sum() == one.ended


def test_padding_rows_of_a_head_are_never_drawn():
    model = causal()
    with torch.no_grad():
        model.lm_head.weight[30:] = 0  # their logits are 0, far above what the others get
        model.lm_head.weight[:30] *= 1e-3
    whole = head_of(model)
    drawn = {}
    for size in (VOCABULARY, 30):
        found = write(
            model, Head(whole.weight, vocabulary=size), [[3]] * 60, sampling(), torch.Generator().manual_seed(0)
        )
        drawn[size] = max(token for one in found for token in one.written)
    assert drawn[VOCABULARY] >= 30 > drawn[30]


def test_writing_leaves_no_trace_in_the_student():
    model = causal(attention_dropout=0.3)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, other = (
        write(model, head_of(model), [[3, 4], [5]], sampling(), torch.Generator().manual_seed(0)) for _ in range(2)
    )
    # The same twice: no dropout, and no random numbers but its own.
    assert one == other
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_limit_of_a_model_cuts_answers_and_refuses_prompts():
    model = causal()
    [one] = write(model, head_of(model), [[3] * 5], sampling(longest=8, ends=frozenset({999})), torch.Generator())
    assert len(one.written) == 3
    for prompt in ([3] * 8, []):
        with pytest.raises(ValueError, match=f"a prompt has {len(prompt)} tokens"):
            write(model, head_of(model), [[3], prompt], sampling(longest=8), torch.Generator())


# what is learned of it


def test_what_others_said_between_turns_is_not_learned():
    first = Continuation((2, 3), (4, END), True)
    second = Continuation((2, 3, 4, END, 20, 21, 22), (5, 6), False)
    [example] = as_examples("talk", [first, second])
    assert example.id == "talk"
    assert example.ids.tolist() == [2, 3, 4, END, 20, 21, 22, 5, 6]
    assert example.supervised.tolist() == [False] * 2 + [True] * 2 + [False] * 3 + [True] * 2


def test_a_turn_whose_history_was_rendered_anew_is_an_example_of_its_own():
    first = Continuation((2, 3), (4, 9, END), True)
    second = Continuation((2, 3, 4, END, 20), (5, 6), False)
    one, other = as_examples("talk", [first, second])
    assert (one.id, other.id) == ("talk/0", "talk/1")
    assert other.supervised.tolist() == [False] * 5 + [True] * 2
    with pytest.raises(ValueError, match="0 written"):
        as_examples("talk", [Continuation((2,), (), False)])


def test_prompts_are_what_stands_before_an_answer():
    [example] = recorded(1)
    starts = learned_starts(example)
    assert len(starts) == 2
    assert all(example.supervised[start] and not example.supervised[start - 1] for start in starts)


def test_ends_are_those_of_the_model_and_of_recorded_answers():
    from types import SimpleNamespace

    tokenizer = SimpleNamespace(eos_token_id=30, all_special_ids=[30, 31], added_tokens_decoder={END: None})
    model = causal()
    model.generation_config.eos_token_id = [32, 33]
    assert ends_of(tokenizer, model, recorded()) == {30, 32, 33, END}
    # Answers that end with a word were cut.
    words = [TokenizedExample("x", np.array([2, 3, 7], np.int32), np.array([False, True, True]))]
    assert ends_of(tokenizer, model, words) == {30, 32, 33}


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_itself(tmp_path, kind):
    _, logs = taught(tmp_path, source(), [Logit(divergence=kind)], causal(), learning_rate=0.0)
    assert len(logs) == 6
    for log in logs:
        assert abs(log[f"on_policy_logit{'' if kind == 'forward_kl' else '_' + kind}"]) < 1e-12
        assert log["on_policy_tokens"] > 3


def test_the_loss_is_the_divergence_at_written_tokens_by_hand(tmp_path):
    data, teacher, student = source(), causal(width=48, seed=3), causal()
    batches = seen(data)
    _, logs = taught(tmp_path, data, [Logit(divergence="reverse_kl")], teacher, copy.deepcopy(student), max_steps=1)
    measured, tokens = 0.0, 0
    for example in batches[0]:
        ids, place = torch.from_numpy(example.ids).long()[None], np.flatnonzero(example.supervised) - 1
        with torch.no_grad():
            ours, theirs = (model(ids).logits[0, place] for model in (student, teacher))
        measured += float(by_torch(ours, theirs, Divergence("reverse_kl")).sum())
        tokens += len(place)
    assert logs[0]["on_policy_logit_reverse_kl"] == pytest.approx(measured / tokens, rel=1e-9)
    assert logs[0]["loss_logit_reverse_kl"] == pytest.approx(measured / tokens, rel=1e-9)


def on_its_own_samples(student, teacher, n=200):
    """Reverse KL a token where the student gets itself to, with random numbers that are the same for every student."""
    prompts = [example.ids[: learned_starts(example)[0]].tolist() for example in recorded(n, seed=5)]
    found = write(student, head_of(student), prompts, sampling(), torch.Generator().manual_seed(9))
    batch = collate(list(enumerate(as_examples("x", [one])[0] for one in found)), END)
    with torch.no_grad():
        return float(LanguageModel(student, [Logit(divergence="reverse_kl")], teacher)(batch).total)


def test_a_student_gets_nearer_to_its_teacher_where_it_goes_itself(tmp_path):
    teacher, student = causal(seed=3), causal()
    before = on_its_own_samples(student, teacher)
    changes = {"max_steps": 30, "learning_rate": 0.01, "optim": "adamw_torch"}
    _, logs = taught(tmp_path, source(), [Logit(divergence="reverse_kl")], teacher, student, **changes)
    after = on_its_own_samples(student, teacher)
    assert after < 0.7 * before
    values = [log["on_policy_logit_reverse_kl"] for log in logs]
    assert np.mean(values[-5:]) < 0.8 * np.mean(values[:5])


def test_hard_targets_leave_out_what_the_student_wrote():
    teacher, student = causal(seed=3), causal()
    own = as_examples("own", [Continuation((2, 3), (4, 5, END), True)])
    objectives = [Response(weight=0.5), Logit()]
    model = LanguageModel(student, objectives, teacher)
    some = recorded(2)
    whole, alone = collate(list(enumerate([*own, *some])), END), collate(list(enumerate(some)), END)
    assert whole[WRITTEN].tolist() == [True, False, False]
    assert WRITTEN not in alone
    counts, recorded_counts = (torch.stack([m.sum() for m in model.supervised(batch)]) for batch in (whole, alone))
    assert (counts - recorded_counts).tolist() == [0, 3]
    ones = torch.ones(2)
    assert float(model(whole, ones).each[0]) == pytest.approx(float(model(alone, ones).each[0]), rel=1e-12)
    # A batch of its own: the gradient is that of the other objective.
    batch = collate(list(enumerate(own)), END)
    both = torch.autograd.grad(model(batch, counts).total, list(student.parameters()), allow_unused=True)
    one = LanguageModel(student, [Logit()], teacher)(batch, counts[1:]).total
    for mine, other in zip(both, torch.autograd.grad(one, list(student.parameters()), allow_unused=True), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=0)


def test_objectives_that_had_nothing_to_learn_are_not_averaged_as_zero(tmp_path):
    """Every other step is written, and the mean of hard targets is over the others."""
    objectives = [Response(), Logit()]
    frozen = {"learning_rate": 0.0, "max_steps": 4}
    every, logs = (
        taught(tmp_path / str(steps), source(0.5), objectives, causal(seed=3), logging_steps=steps, **frozen)[1]
        for steps in (1, 4)
    )
    assert ["loss_response" in log for log in every] == [True, False, True, False]
    assert ["on_policy_logit" in log for log in every] == [False, True, False, True]
    assert logs[0]["loss_response"] == pytest.approx(np.mean([every[0]["loss_response"], every[2]["loss_response"]]))
    assert not any("on_policy_response" in log for log in every)


# when, and how much


def test_nothing_changes_where_nothing_is_written(tmp_path):
    objectives, found = [Response(weight=0.3), Logit()], []
    for name, data in (("plain", TokenizedRows(recorded(), BUDGET)), ("none", source(0.0))):
        trainer, logs = taught(tmp_path / name, data, objectives, causal(seed=3))
        found.append((weights(trainer.student), [{k: v for k, v in log.items() if "runtime" not in k} for log in logs]))
    assert_same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize(("share", "accumulation"), [(0.5, 1), (0.25, 2), (0.6, 3), (1.0, 2)])
def test_a_share_of_the_batches_is_written_and_the_others_are_as_before(tmp_path, share, accumulation):
    data, plain = source(share, refresh=2), TokenizedRows(recorded(), BUDGET)
    batches, others = seen(data), []
    plain.__getitems__ = lambda numbers: others.append(numbers) or [plain[number] for number in numbers]
    changes = {"max_steps": 6, "gradient_accumulation_steps": accumulation}
    for name, rows_ in (("mixed", data), ("plain", plain)):
        taught(tmp_path / name, rows_, [Logit()], causal(seed=3), **changes)
    assert len(batches) == len(others) == 6 * accumulation
    written = [[hasattr(example, "id") and "~" in example.id for example in batch] for batch in batches]
    assert all(len(set(batch)) == 1 for batch in written)
    assert sum(batch[0] for batch in written) == int(6 * accumulation * share)
    for batch, other, own in zip(batches, others, written, strict=True):
        if not own[0]:
            assert [example.id for example in batch] == [f"talk-{number}" for number in other]
        assert len(batch) * max(len(example) for example in batch) <= BUDGET


def test_prompts_are_those_of_the_recorded_batch_one_answer_of_each(tmp_path):
    data, examples = source(), recorded()
    batches = seen(data)
    taught(tmp_path, data, [Logit()], causal(seed=3), max_steps=12)
    starts = set()
    for example in (example for batch in batches for example in batch):
        talk = int(example.id.partition("~")[0].removeprefix("talk-"))
        start = learned_starts(example)[0]
        assert example.supervised.tolist() == [False] * start + [True] * (len(example) - start)
        assert example.ids[:start].tolist() == examples[talk].ids[:start].tolist()
        starts.add(learned_starts(examples[talk]).index(start))
    assert starts == {0, 1}


def test_weights_are_those_of_the_first_step_that_learns_of_it(tmp_path):
    moments, at, student = [], [], causal()

    def play(prompts, write_now):
        moments.append(student.model.layers[0].mlp.up_proj.weight.detach().clone())
        return [[answer] for answer in write_now([prompt.ids for prompt in prompts])]

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            at.append((len(moments), student.model.layers[0].mlp.up_proj.weight.detach().clone()))

    data = source(refresh=3, play=play)
    taught(tmp_path, data, [Logit()], causal(seed=3), student, callbacks=[Steps()], max_steps=7)
    calls = [count for count, _ in at]
    # Batches are taken before a step begins: there are more answers at steps 0, 3 and 6.
    assert [calls[step] > (calls[step - 1] if step else 0) for step in range(7)] == [True, False, False] * 2 + [True]
    for step in (0, 3, 6):
        assert torch.equal(moments[calls[step] - 1], at[step][1])
    assert not torch.equal(moments[0], moments[-1])


def test_short_answers_make_smaller_batches_and_long_ones_leave_prompts_out(tmp_path):
    short, long = (source(max_new_tokens=tokens, temperature=t) for tokens, t in ((1, 1.0), (40, 1.0)))
    for name, data in (("short", short), ("long", long)):
        batches = seen(data)
        _, logs = taught(tmp_path / name, data, [Logit()], causal(seed=3), max_steps=6)
        assert len(batches) == 6
        assert all(batches)
        unused = sum(log["on_policy_unused"] for log in logs)
        assert (unused > 0) == (name == "long")
        assert all(len(batch) * max(map(len, batch)) <= BUDGET for batch in batches)


def test_an_agents_episodes_are_learned_turn_by_turn(tmp_path):
    def play(prompts, write_now):
        """A tool answers 30, 31 to whatever is written first."""
        first = write_now([prompt.ids for prompt in prompts])
        asked = [(*one.prompt, *one.written, 30, 31) for one in first]
        return [list(turns) for turns in zip(first, write_now(asked), strict=True)]

    data = source(play=play, max_new_tokens=3)
    batches = seen(data)
    _, logs = taught(tmp_path, data, [Logit(divergence="jsd", beta=0.3)], causal(seed=3), max_steps=3)
    for example in batches[0]:
        ids, learned = example.ids.tolist(), example.supervised.tolist()
        runs = np.flatnonzero(np.diff(np.array([0, *learned, 0])) == 1)
        assert len(runs) == 2
        assert ids[runs[1] - 2 : runs[1]] == [30, 31]
        assert learned[runs[1] - 2 : runs[1]] == [False, False]
    assert logs[0]["on_policy_length"] <= 3


def test_a_play_that_loses_episodes_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="0 episodes came back for"):
        taught(tmp_path, source(play=lambda prompts, write_now: []), [Logit()], causal(seed=3))
    with pytest.raises(TrainingError, match="0 examples were written, and 1 batches"):
        taught(tmp_path, source(play=lambda prompts, write_now: [[] for _ in prompts]), [Logit()], causal(seed=3))


# a teacher that is not live


def test_a_teacher_that_is_asked_gives_what_a_live_one_does(tmp_path):
    teacher, kind = causal(width=48, seed=3), SignalKind("top_k", entries=VOCABULARY)

    def asked(examples):
        return ask(teacher, Ids(), examples, kind)

    store = SignalStore(tmp_path / "signals", {"kind": "top_k"})
    store.append([e.id for e in recorded()], asked(recorded()), 0)
    ends = []
    for name in ("live", "asked"):
        data = source(0.5, ask=asked if name == "asked" else None)
        reader = SignalReader(store, kind, VOCABULARY, data.records) if name == "asked" else None
        live = teacher if name == "live" else None
        trainer, logs = taught(tmp_path / name, data, [Logit()], live, reader=reader, max_steps=4)
        ends.append((weights(trainer.student), logs))
    # Probabilities are kept in a byte each.
    assert_same(ends[0][0], ends[1][0], 1e-3)
    assert ends[0][1][1]["on_policy_logit"] == pytest.approx(ends[1][1][1]["on_policy_logit"], abs=1e-3)


# repeated, and gone on with


def test_a_seed_decides_all(tmp_path):
    found = []
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        data = source(0.5, refresh=2)
        batches = seen(data)
        trainer, _ = taught(tmp_path / name, data, [Logit()], causal(seed=3), seed=seed)
        found.append((weights(trainer.student), [example.ids.tolist() for batch in batches for example in batch]))
    assert_same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert found[0][1] != found[2][1]


@pytest.mark.parametrize("asked", [False, True])
def test_a_run_that_goes_on_ends_as_one_that_was_not_disturbed(tmp_path, asked):
    """With what was written before the checkpoint and not learned yet, whose weights are gone."""
    teacher, kind = causal(seed=3), SignalKind("top_k", entries=8)
    store = SignalStore(tmp_path / "signals", {"kind": "top_k"})
    store.append([e.id for e in recorded()], ask(teacher, Ids(), recorded(), kind), 0)

    def run(folder, **changes):
        data = source(0.7, refresh=3, ask=(lambda examples: ask(teacher, Ids(), examples, kind)) if asked else None)
        reader = SignalReader(store, kind, VOCABULARY, data.records) if asked else None
        saved = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "max_steps": 5}
        live = None if asked else teacher
        trainer, _ = taught(folder, data, [Logit(), Response()], live, reader=reader, **{**saved, **changes})
        return weights(trainer.student)

    calm = run(tmp_path / "calm")
    for at in (2, 4) if asked else (1, 2, 3):
        checkpoint = tmp_path / f"calm/checkpoint-{at}"
        assert (checkpoint / COMPLETE).is_file()
        assert_same(run(tmp_path / f"from-{at}", resume=str(checkpoint), save_strategy="no"), calm)


def test_a_checkpoint_without_what_was_written_is_refused(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    taught(tmp_path, source(), [Logit()], causal(seed=3), **saved, callbacks=[Stop(2)])
    [path] = (tmp_path / "checkpoint-2").glob("on_policy-*")
    path.rename(path.with_name("on_policy-0-of-2.safetensors"))
    with pytest.raises(TrainingError, match=r"holds \['on_policy-0-of-2.safetensors'\] and on_policy-0-of-1"):
        taught(tmp_path, source(), [Logit()], causal(seed=3), **saved, resume=str(tmp_path / "checkpoint-2"))


# what is refused


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"share is 1\.5"):
        source(1.5)
    with pytest.raises(ValueError, match="temperature 0"):
        sampling(temperature=0.0)
    silent = TokenizedExample("silent", np.array([2, 3], np.int32), np.array([False, False]))
    with pytest.raises(ValueError, match="silent supervises no token"):
        source(examples=[*recorded(), silent])
    with pytest.raises(TrainingError, match="a DistillationTrainer has to take the batches"):
        source().__getitems__([-1])
    with pytest.raises(CapabilityError, match="1 dataloader workers"):
        taught(tmp_path, source(), [Logit()], causal(seed=3), dataloader_num_workers=1)
    data = source()
    data.tokens_per_batch = 10**6
    with pytest.raises(CapabilityError, match="this is AnyModule"):
        make(tmp_path, Net(), [Logit()], data, teacher=Net(seed=1), collator=lambda _: rows(1)[0]).train()

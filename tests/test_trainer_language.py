"""DistillationTrainer with causal language models: at supervised tokens, however they are batched, live or cached."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from attar.errors import CapabilityError, DataError, TrainingError, UsageError
from attar.losses import Divergence
from attar.signals.language import SignalKind, SignalReader, ask, keep_head
from attar.signals.sparse import example_random, sampled, top_k
from attar.signals.store import SignalStore
from attar.students.adapt import add_lora
from attar.train.batches import SIGNAL, Collator, TokenBudgetBatches, TokenizedRows, collate
from attar.train.language_model import LanguageModel
from attar.train.objectives import Feature, Logit, Response
from attar.train.trainer import last_checkpoint
from divergences import ALL, by_torch
from training import VOCABULARY, Stop, assert_same, causal, examples, make, weights

PAD = 1
LAYERS = {"model.layers.0": "model.layers.1"}
FEATURE = Feature(LAYERS, loss="cosine", weight=3.0)
MIXED = [Response(weight=0.5), Logit(temperature=2.0, weight=2.0), FEATURE]


class Ids:
    """Of a tokenizer, what says how large the vocabulary is."""

    def __init__(self, size):
        self.size = size

    def get_vocab(self):
        return {str(number): number for number in range(self.size)}


def batch_of(some, pad=PAD):
    return collate(list(enumerate(some)), pad)


def distilled(objectives, some, teacher=None, student=None, **options):
    """A language model with its projectors, as the trainer makes it with seed 1."""
    module = LanguageModel(student or causal(), objectives, teacher, **options)
    module.probe(batch_of(some[:1]), 1)
    return module


def predicting(model, example, layer=None):
    """Of one example alone: logits at its supervised tokens, their ids, and a layer's output there."""
    places = np.flatnonzero(example.supervised)
    ids = torch.from_numpy(example.ids).long()
    output = model(ids[None], output_hidden_states=True)
    states = None if layer is None else output.hidden_states[layer + 1][0, places - 1]
    return output.logits[0, places - 1], ids[places], states


def by_hand(module, teacher, some, measure=None):
    """The sum of MIXED's terms over all supervised tokens, each over their number, from dense logits."""
    [projector] = module.projectors.values()
    cross, soft, cosine, tokens = 0.0, 0.0, 0.0, 0
    for example in some:
        ours, ids, inner = predicting(module.student, example, 0)
        with torch.no_grad():
            # The second and last layer's output is seen before the final norm: hidden_states has it after.
            kept = []
            handle = teacher.model.layers[1].register_forward_hook(lambda *a, kept=kept: kept.append(a[2]))
            theirs, _, _ = predicting(teacher, example)
            handle.remove()
        outer = kept[0][0, np.flatnonzero(example.supervised) - 1]
        cross = cross + F.cross_entropy(ours, ids, reduction="sum")
        soft = soft + by_torch(ours, theirs, measure or Divergence("forward_kl", 2.0)).sum()
        cosine = cosine + (1 - F.cosine_similarity(projector(inner), outer, dim=-1)).sum()
        tokens += len(ids)
    return [cross / tokens, soft / tokens, cosine / tokens]


def gradients(loss, module):
    return torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad], allow_unused=True)


def assert_close_gradients(ours, theirs, rtol=1e-8, atol=1e-12):
    for one, other in zip(ours, theirs, strict=True):
        one, other = (torch.zeros(()) if g is None else g for g in (one, other))
        torch.testing.assert_close(one, other.expand_as(one), rtol=rtol, atol=atol)


# the loss


def test_values_and_gradients_are_those_of_dense_logits_by_hand():
    some, teacher = examples(), causal(width=48, seed=3)
    module = distilled(MIXED, some, teacher)
    values = module(batch_of(some))
    each = by_hand(module, teacher, some)
    for ours, theirs in zip(values.each.tolist(), each, strict=True):
        assert ours == pytest.approx(theirs.item(), rel=1e-9)
    total = 0.5 * each[0] + 2.0 * each[1] + 3.0 * each[2]
    assert values.total.item() == pytest.approx(total.item(), rel=1e-9)
    ours = gradients(values.total, module)
    assert sum(g is not None and bool(g.any()) for g in ours) > 20
    assert_close_gradients(ours, gradients(total, module))
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("which", ALL, ids=str)
def test_every_divergence(which):
    some, teacher = examples(2), causal(width=48, seed=3)
    measure = Divergence(which.kind, 2.0, which.alpha, which.beta)
    logit = Logit(2.0, divergence=which.kind, alpha=which.alpha, beta=which.beta)
    module = distilled([logit, FEATURE], some, teacher)
    values = module(batch_of(some), None, 0)
    wanted = by_hand(module, teacher, some, measure)[1]
    assert values.total.item() == pytest.approx(wanted.item(), rel=1e-9)
    assert_close_gradients(gradients(values.total, module), gradients(wanted, module))


@pytest.mark.parametrize("padding", [0, PAD, VOCABULARY - 1])
def test_an_example_counts_as_it_does_alone(padding):
    """So does padding with any token, whatever an example is batched with."""
    some, teacher = examples(), causal(width=48, seed=3)
    module = distilled([*MIXED, Feature(LAYERS, "minilm_relations", options={"relation_heads": 4})], some, teacher)
    one = torch.ones(4)
    alone = [module(batch_of([example]), one).each for example in some]
    torch.testing.assert_close(module(batch_of(some, padding), one).each, sum(alone), rtol=1e-10, atol=0)
    torch.testing.assert_close(module(batch_of(some[::-2]), one).each, sum(alone[::-2]), rtol=1e-10, atol=0)


def test_tokens_that_are_not_supervised_are_inert_as_targets():
    some, teacher = examples(), causal(width=48, seed=3)
    module = distilled([Response(), Logit()], some, teacher)
    last = [copy.deepcopy(example) for example in some]
    for example in last:  # nothing is predicted from what comes after the last supervised token
        object.__setattr__(example, "ids", np.concatenate([example.ids, [7, 8]]).astype(np.int32))
        object.__setattr__(example, "supervised", np.concatenate([example.supervised, [False, False]]))
    torch.testing.assert_close(module(batch_of(last)).each, module(batch_of(some)).each, rtol=1e-10, atol=0)


def test_a_copy_of_the_teacher_has_nothing_to_learn():
    some, teacher = examples(), causal()
    objectives = [Logit(3.0), Logit(divergence="jsd"), Feature({"model.layers.-1": "model.layers.-1"}, "mse")]
    module = distilled(objectives, some, teacher, copy.deepcopy(teacher))
    assert float(module(batch_of(some)).each.abs().max()) < 1e-12


def test_a_step_does_not_depend_on_how_it_is_cut(tmp_path):
    some, teacher = examples(6), causal(width=48, seed=3)
    longest = max(map(len, some))
    after = []
    for budget in (10_000, longest, 2 * longest):
        data = TokenizedRows(some, budget)
        micro_batches = len(TokenBudgetBatches(data.lengths, budget, seed=1))
        assert (micro_batches == 1) == (budget == 10_000)
        trainer = make(
            tmp_path / str(budget),
            causal(),
            MIXED,
            data,
            teacher=copy.deepcopy(teacher),
            collator=Collator(PAD),
            max_steps=1,
            gradient_accumulation_steps=micro_batches,
        )
        trainer.train()
        after.append(weights(trainer.distilled))
    for other in after[1:]:
        assert_same(after[0], other, 1e-11)
    assert not torch.equal(after[0]["student.lm_head.weight"], causal().lm_head.weight)


@pytest.mark.parametrize("budget", [20, 50, 1000])
def test_evaluation_is_a_true_mean_over_tokens(tmp_path, budget):
    some, teacher = examples(), causal(width=48, seed=3)
    data = TokenizedRows(some, budget)
    trainer = make(tmp_path, causal(), MIXED, data, teacher=teacher, evaluated=data, collator=Collator(PAD))
    losses = trainer.evaluate()
    wanted = [value.item() for value in by_hand(trainer.distilled, teacher, some)]
    found = [losses[f"eval_{name}"] for name in ("response", "logit", "feature_cosine")]
    assert found == pytest.approx(wanted, rel=1e-9)
    assert losses["eval_loss"] == pytest.approx(0.5 * wanted[0] + 2 * wanted[1] + 3 * wanted[2], rel=1e-9)


# cached signals


def stored(folder, teacher, some, kind):
    """A reader of signals that were asked for the examples as one batch."""
    store = SignalStore(folder, {"kind": kind.kind})
    store.append([example.id for example in some], ask(teacher, Ids(VOCABULARY), some, kind), 0)
    if kind.kind == "hidden":
        keep_head(store, teacher, Ids(VOCABULARY))
    return SignalReader(SignalStore(folder, {"kind": kind.kind}), kind, VOCABULARY)


def test_cached_states_equal_the_live_teacher(tmp_path):
    some, teacher = examples(), causal(width=48, seed=3)
    kind = SignalKind("hidden", layers=("model.layers.1",), dtype=torch.float64)
    reader = stored(tmp_path, teacher, some, kind)
    batch = Collator(PAD, reader)(list(enumerate(some)))
    live = distilled(MIXED, some, teacher)
    cached = LanguageModel(causal(), MIXED, teacher_head=reader.head())
    cached.probe(batch, 1)
    ours, theirs = live(batch_of(some)), cached(batch)
    assert torch.equal(ours.each, theirs.each)
    for one, other in zip(gradients(ours.total, live), gradients(theirs.total, cached), strict=True):
        assert torch.equal(one, other)


def signal_batch(teacher, some, columns):
    """A batch with unrounded signals of each supervised token."""
    batch = batch_of(some)
    with torch.no_grad():
        logits = torch.cat([predicting(teacher, example)[0] for example in some])
    return {**batch, **{f"{SIGNAL}{name}": value for name, value in columns(logits).items()}}


def test_top_k_with_the_whole_vocabulary_equals_the_live_teacher(tmp_path):
    some, teacher = examples(), causal(width=48, seed=3)
    objectives = [Logit(2.0, divergence="reverse_kl")]
    wanted = distilled(objectives, some, teacher)(batch_of(some))
    exact = signal_batch(teacher, some, lambda logits: top_k([logits], VOCABULARY, 2.0)._asdict())
    module = distilled(objectives, some, temperature=2.0)
    found = module(exact)
    # log-probabilities are float32
    assert found.total.item() == pytest.approx(wanted.total.item(), rel=1e-6)
    live = distilled(objectives, some, teacher)
    theirs = gradients(live(batch_of(some)).total, live)
    assert_close_gradients(gradients(found.total, module), theirs, 1e-5, 1e-7)
    # as it is stored, in two bytes an entry
    reader = stored(tmp_path, teacher, some, SignalKind("top_k", entries=VOCABULARY, temperature=2.0))
    batch = Collator(PAD, reader)(list(enumerate(some)))
    assert module(batch).total.item() == pytest.approx(wanted.total.item(), rel=0.02)


def test_samples_are_unbiased():
    """The mean of 400 samples lies within five standard errors; a false alarm is a matter of 1 in a million."""
    some, teacher = examples(2), causal(width=48, seed=3)
    wanted = distilled([Logit()], some, teacher)(batch_of(some)).total.item()
    module = distilled([Logit()], some)

    def drawn(seed):
        def columns(logits):
            signal = sampled([logits], 0.2, example_random(seed, "a"))
            return {"ids": signal.ids, "entry_weights": signal.entry_weights, "entropy": signal.entropy}

        with torch.no_grad():
            return float(module(signal_batch(teacher, some, columns)).total)

    values = np.array([drawn(seed) for seed in range(400)])
    error = values.std() / np.sqrt(len(values))
    assert 0 < error < 0.1 * wanted
    assert abs(values.mean() - wanted) < 5 * error


def test_what_cached_signals_cannot_give(tmp_path):
    some, teacher = examples(), causal(width=48, seed=3)
    with pytest.raises(CapabilityError, match="neither a teacher nor a signal in the batch; it holds input_ids"):
        LanguageModel(causal(), [Logit()])(batch_of(some))
    batch = signal_batch(teacher, some, lambda logits: top_k([logits], 5)._asdict())
    with pytest.raises(CapabilityError, match=r"reads 'model\.layers\.1' of the teacher, which is neither live"):
        LanguageModel(causal(), [FEATURE]).probe(batch, 0)
    with pytest.raises(ValueError, match=r"temperature is 2\.0, and the top-k signal was stored at 1\.0"):
        LanguageModel(causal(), [Logit(2.0)])(batch)
    kept = torch.arange(0, VOCABULARY, 2)
    with pytest.raises(CapabilityError, match="names tokens of the teacher's whole vocabulary"):
        LanguageModel(causal(vocab_size=len(kept)), [Logit()], kept=kept)(
            {**batch_of(examples(vocabulary=len(kept))), **{k: v for k, v in batch.items() if k.startswith(SIGNAL)}}
        )
    # a response alone needs no teacher
    assert LanguageModel(causal(), [Response()])(batch_of(some)).total > 0


# vocabularies


def test_a_trimmed_vocabulary_is_the_teacher_restricted(tmp_path):
    teacher = causal(width=48, seed=3)
    kept = torch.tensor([0, 1, 3, 4, 9, 17, 20, 25, 31, 38])
    some = examples(vocabulary=len(kept))
    module = distilled([Logit(), FEATURE], some, teacher, causal(vocab_size=len(kept)), kept=kept)
    total, tokens = 0.0, 0
    for example in some:
        ours, ids, _ = predicting(module.student, example)
        whole = copy.copy(example)
        object.__setattr__(whole, "ids", kept.numpy()[example.ids].astype(np.int32))
        theirs, _, _ = predicting(teacher, whole)
        total = total + by_torch(ours, theirs[:, kept], Divergence()).sum()
        tokens += len(ids)
    found = module(batch_of(some), None, 0).total
    assert found.item() == pytest.approx(total.item() / tokens, rel=1e-9)
    assert_close_gradients(gradients(found, module), gradients(total / tokens, module))
    # and with the teacher's states cached, which were read from its own ids
    own = [copy.copy(example) for example in some]
    for example in own:
        object.__setattr__(example, "ids", kept.numpy()[example.ids].astype(np.int32))
    reader = stored(tmp_path, teacher, own, SignalKind("hidden", dtype=torch.float64))
    batch = Collator(PAD, reader)(list(enumerate(some)))
    cached = LanguageModel(module.student, [Logit()], kept=kept, teacher_head=reader.head())
    assert cached(batch).total.item() == pytest.approx(found.item(), rel=1e-9)


def test_padding_of_a_vocabulary_never_carries_probability():
    some = examples()
    teacher, student = causal(width=48, seed=3, vocab_size=VOCABULARY + 8), causal(vocab_size=VOCABULARY + 3)
    with torch.no_grad():
        for model in (teacher, student):
            model.lm_head.weight[VOCABULARY:] = 50.0
    module = distilled([Response(), Logit(2.0)], some, teacher, student, tokenizer=Ids(VOCABULARY))
    cross, soft, tokens = 0.0, 0.0, 0
    for example in some:
        ours, ids, _ = predicting(student, example)
        theirs, _, _ = predicting(teacher, example)
        cross = cross + F.cross_entropy(ours[:, :VOCABULARY], ids, reduction="sum")
        soft = soft + by_torch(ours[:, :VOCABULARY], theirs[:, :VOCABULARY], Divergence("forward_kl", 2.0)).sum()
        tokens += len(ids)
    values = module(batch_of(some))
    assert values.each.tolist() == pytest.approx([cross.item() / tokens, soft.item() / tokens], rel=1e-9)
    (gradient,) = torch.autograd.grad(values.total, student.lm_head.weight)
    assert (gradient[VOCABULARY:] == 0).all()
    assert (gradient[:VOCABULARY] != 0).any()
    with pytest.raises(ValueError, match="teacher's vocabulary has 48 entries and the student's 43"):
        distilled([Logit()], some, teacher, student)(batch_of(some))


# adapters


def test_a_student_with_adapters(tmp_path):
    some, teacher = examples(), causal(width=48, seed=3)
    plain = causal()
    adapted = add_lora(plain, r=2, alpha=4.0, seed=0)
    wanted = distilled(MIXED, some, teacher, plain)(batch_of(some)).each
    data = TokenizedRows(some, 60)
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make(tmp_path, adapted, MIXED, data, teacher=teacher, evaluated=data, collator=Collator(PAD), **changes)
    torch.testing.assert_close(trainer.distilled(batch_of(some)).each, wanted, rtol=1e-10, atol=0)
    before = weights(adapted)
    trainer.train()
    moved = {name for name, tensor in weights(adapted).items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert any(".layers.1." in name for name in moved)
    checkpoint = last_checkpoint(tmp_path)
    fresh = add_lora(plain, r=2, alpha=4.0, seed=9)
    again = make(tmp_path, fresh, MIXED, data, teacher=teacher, collator=Collator(PAD), **changes)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights(fresh), weights(adapted))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_on_the_head_are_refused():
    adapted = get_peft_model(causal(), LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(CapabilityError, match="leave it out of the adapter's target_modules"):
        LanguageModel(adapted, [Response()])


# runs


def start_run(folder, model, objectives=None, callbacks=(), collator=None, **changes):
    some = examples(7)
    return make(
        folder,
        model,
        objectives or [Logit(temperature=2.0), FEATURE],
        TokenizedRows(some, 45),
        teacher=causal(width=48, seed=3, dtype=torch.float32),
        collator=collator or Collator(PAD),
        callbacks=callbacks,
        **{
            "max_steps": -1,
            "num_train_epochs": 3,
            "optim": "adamw_torch",
            "learning_rate": 0.01,
            "gradient_accumulation_steps": 2,
            "lr_scheduler_type": "cosine",
            "save_strategy": "steps",
            "save_steps": 1,
            "logging_strategy": "steps",
            "logging_steps": 1,
            **changes,
        },
    )


def student(seed=0):
    return causal(seed=seed, dtype=torch.float32, attention_dropout=0.2)


class Watching(Collator):
    """Notes which rows were asked for."""

    def __init__(self):
        super().__init__(PAD)
        self.seen = []

    def __call__(self, some):
        self.seen.append([row for row, _ in some])
        return super().__call__(some)


def test_every_example_comes_once_an_epoch(tmp_path):
    watching = Watching()
    trainer = start_run(tmp_path, student(), [Response()], collator=watching, save_strategy="no")
    trainer.train()
    assert sorted(row for batch in watching.seen for row in batch) == sorted([*range(7)] * 3)
    epoch = len(TokenBudgetBatches(TokenizedRows(examples(7), 45).lengths, 45, seed=1))
    assert watching.seen[:epoch] != watching.seen[epoch : 2 * epoch]
    assert trainer.state.global_step == -(-len(watching.seen) // 2)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == trainer.state.global_step
    assert entries[-1]["epoch"] == 3.0
    assert entries[0]["epoch"] == pytest.approx(3 / len(entries))
    # as many steps as asked for, whatever the epochs
    watching.seen.clear()
    trainer = start_run(
        tmp_path, student(), [Response()], collator=watching, max_steps=20, num_train_epochs=1, save_strategy="no"
    )
    trainer.train()
    assert trainer.state.global_step == 20
    assert len(watching.seen) == 40
    counts = np.bincount([row for batch in watching.seen for row in batch])
    assert counts.max() - counts.min() <= 1
    with pytest.raises(ValueError, match="save_strategy is epoch, and batches of equally many tokens"):
        start_run(tmp_path, student(), [Response()], save_strategy="epoch").train()


@pytest.mark.parametrize("at", [2, 4])
def test_a_run_that_goes_on_ends_as_one_that_was_not_disturbed(tmp_path, at):
    whole = start_run(tmp_path / "whole", student())
    whole.train()
    start_run(tmp_path / "cut", student(), callbacks=[Stop(at)]).train()
    checkpoint = last_checkpoint(tmp_path / "cut")
    assert checkpoint.name == f"checkpoint-{at}"
    again = start_run(tmp_path / "cut", student(seed=5))
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == whole.state.global_step > at
    assert_same(weights(again.distilled), weights(whole.distilled))
    assert again.state.log_history[-2] == whole.state.log_history[-2]


def test_checkpoints_hold_the_student_and_its_projectors(tmp_path):
    trainer = start_run(tmp_path, student(), max_steps=2)
    trainer.train()
    found = load_file(last_checkpoint(tmp_path) / "model.safetensors")
    assert {name.split(".")[0] for name in found} == {"student", "projectors"}
    assert {name.removeprefix("student.") for name in found if name.startswith("student.")} == set(
        student().state_dict()
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in trainer.distilled.state_dict().items())
    assert not any("projector" in name for name in trainer.student.state_dict())
    assert not trainer.distilled.teacher.training
    assert all(p.grad is None for p in trainer.distilled.teacher.parameters())


class Poison(TrainerCallback):
    """Puts a NaN into the student after two steps."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                model.student.lm_head.weight[5] = float("nan")


def test_a_loss_that_is_not_a_number_names_the_examples(tmp_path):
    watching = Watching()
    trainer = start_run(tmp_path, student(), [Response(), Logit()], callbacks=[Poison()], collator=watching)
    with pytest.raises(TrainingError, match="the loss is nan at step 2 in the batch of") as error:
        trainer.train()
    named = ", ".join(f"example-{row}" for row in watching.seen[4])  # two batches a step
    assert f"in the batch of {named}; the last checkpoint in {tmp_path} is kept" in str(error.value)
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint.name == "checkpoint-2"
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(checkpoint / "model.safetensors").values())


# what is refused


class Own:
    name, weight = "own", 1.0

    def supervised(self, batch):
        raise AssertionError

    def values(self, logits, batch):
        raise AssertionError


def test_what_is_refused():
    some = examples()
    batch = batch_of(some)
    with pytest.raises(UsageError, match=r"'model\.layer\.0' names no module .*nearest: model\.layers\.0"):
        LanguageModel(causal(), [Feature({"model.layer.0": "model.layers.0"})], causal())
    with pytest.raises(CapabilityError, match="Own is an objective on logits, which a causal language model never"):
        LanguageModel(causal(), [Own()])(batch)
    del batch["supervised"]
    with pytest.raises(DataError, match="has no 'supervised', it holds input_ids"):
        LanguageModel(causal(), [Response()]).supervised(batch)

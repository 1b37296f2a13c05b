"""DistillationTrainer with any module: what it optimises, logs, saves and refuses."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from attar.errors import CapabilityError, TrainingError, UsageError
from attar.losses import Divergence, divergence
from attar.train.language_model import is_language_model
from attar.train.objectives import LABELS, TEACHER, Feature, Logit, Response
from attar.train.trainer import DistillationTrainer, last_checkpoint
from training import Net, Stop, assert_same, causal, make, rows, settings, stacked, weights

MIXED = [Logit(temperature=2.0), Response(labels="gold", weight=0.5)]


def third(number):
    return number % 3 == 0


# the teacher


def test_a_live_teacher_equals_its_cached_answers(tmp_path):
    teacher = Net(width=9, seed=7)
    objectives = [Logit(temperature=2.0), Logit(divergence="reverse_kl", weight=0.3), Response(weight=0.2)]
    live, cached = Net(), Net()
    make(tmp_path / "live", live, objectives, rows(10), teacher=teacher).train()
    make(tmp_path / "cached", cached, objectives, rows(10, teacher=teacher)).train()
    assert_same(weights(live), weights(cached), 1e-13)
    assert not torch.equal(live.head.weight, Net().head.weight)


def test_the_teacher_is_frozen_and_outside(tmp_path):
    teacher = Net(width=9, seed=7, dropout=0.5)
    before = weights(teacher)
    objectives = [Logit(), Feature({"body": "body"}, loss="mse")]
    changes = {"save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1}
    trainer = make(tmp_path, Net(), objectives, rows(10), teacher=teacher.train(), **changes)
    trainer.train()
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert_same(weights(teacher), before)
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in trainer.distilled.parameters()}
    assert not optimised & {id(p) for p in teacher.parameters()}
    stored = load_file(last_checkpoint(tmp_path) / "model.safetensors")
    assert {name.split(".")[0] for name in stored} == {"student", "projectors"}
    assert not any("teacher" in name for name, _ in trainer.distilled.named_modules())
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in trainer.distilled.parameters())


def test_a_copy_of_the_teacher_has_nothing_to_learn(tmp_path):
    teacher = Net()
    objectives = [Logit(temperature=3.0), Logit(divergence="jsd"), Feature({"body": "body"}, loss="mse")]
    trainer = make(tmp_path, copy.deepcopy(teacher), objectives, rows(6), teacher=teacher, evaluated=rows(6))
    losses = trainer.evaluate()
    assert max(abs(losses[f"eval_{name}"]) for name in ("logit", "logit_jsd", "feature_mse", "loss")) < 1e-14
    trainer.train()
    assert_same(weights(trainer.student), weights(teacher), 1e-12)


# the loss


def test_the_gradient_is_that_of_the_mean_by_hand(tmp_path):
    teacher, data = Net(width=9, seed=7), rows(8, gold=third)
    objectives = [*MIXED, Feature({"body": "body"}, loss="cosine", weight=2.0)]
    trainer = make(tmp_path, Net(), objectives, data, teacher=teacher)
    projector, student = copy.deepcopy(trainer.distilled.projectors), copy.deepcopy(trainer.student)
    batch = stacked(data)
    [layer] = projector.values()
    known = batch[LABELS] != -100
    logits, hidden = student(batch["x"]), layer(student.body(batch["x"]))
    p, q = (teacher(batch["x"]) / 2).softmax(-1), (logits / 2).log_softmax(-1)
    wanted = 4 * (p * (p.log() - q)).sum(-1).mean()
    wanted = wanted + 0.5 * F.cross_entropy(logits[known], batch[LABELS][known])
    wanted = wanted + 2.0 * (1 - F.cosine_similarity(hidden, teacher.body(batch["x"]), dim=-1)).mean()
    total = trainer.distilled(batch).total
    assert total.item() == pytest.approx(wanted.item(), rel=1e-12)
    ours = torch.autograd.grad(total, list(trainer.distilled.parameters()))
    theirs = torch.autograd.grad(wanted, [*student.parameters(), *projector.parameters()])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cut", [(3, 4), (2, 5), (1, 10)])
def test_a_step_does_not_depend_on_how_it_is_cut(tmp_path, cut):
    """Gold labels are on some micro-batches only; features are in too."""
    objectives = [*MIXED, Feature({"body": "body"}, loss="cosine")]
    data = rows(10, gold=lambda number: number < 4)
    after = []
    for size, accumulation in ((10, 1), cut):
        trainer = make(
            tmp_path / str(size),
            Net(),
            objectives,
            data,
            teacher=Net(width=9, seed=7),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        after.append(weights(trainer.distilled))
    assert_same(*after, 1e-12)


class Sequence(nn.Module):
    """States [batch, length, width] as ``states``; logits of their mean over what is no padding."""

    def __init__(self, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.states = nn.Linear(4, width).double()

    def forward(self, x, attention_mask):
        states = self.states(x) * attention_mask[..., None]
        return {"logits": states.sum(1) / attention_mask.sum(1, keepdim=True)}


def test_padding_is_no_part_of_a_feature_loss(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    short = {"x": x[1:, :2], "attention_mask": mask[1:, :2]}
    both = {"x": x, "attention_mask": mask}
    data = [{key: value[number] for key, value in both.items()} for number in range(2)]
    objectives = [Feature({"states": "states"}, loss="mse"), Logit()]
    distilled = make(tmp_path, Sequence(3, 0), objectives, data, teacher=Sequence(3, 1)).distilled
    one = torch.ones(2)
    alone = [distilled(part, one).each for part in ({"x": x[:1], "attention_mask": mask[:1]}, short)]
    torch.testing.assert_close(distilled(both, one).each, alone[0] + alone[1], rtol=1e-12, atol=0)
    # of each example the mean over its tokens
    student, teacher = (side.states(short["x"]).detach() for side in (distilled.student, distilled.teacher))
    assert float(alone[1][0]) == pytest.approx(float(F.mse_loss(student, teacher)), rel=1e-12)


class Squares:
    """An objective of one's own."""

    name, weight = "squares", 0.25

    def supervised(self, batch):
        return batch["x"][:, 0] > 0

    def values(self, logits, batch):
        return (logits - batch[TEACHER]).square().sum(-1)


class Signs:
    """A feature loss of one's own."""

    equal_widths, ranks = True, (2,)

    def __call__(self, student, teacher, mask=None):
        return (student.tanh() - teacher.sign()).abs().mean(-1)


def test_objectives_and_feature_losses_of_ones_own(tmp_path):
    data = rows(8)
    objectives = [Squares(), Feature({"body": "body"}, loss=Signs(), weight=0.5)]
    teacher = Net(width=9, seed=7)
    trainer = make(tmp_path, Net(), objectives, data, teacher=teacher, evaluated=data)
    batch = stacked(data)
    chosen = batch["x"][:, 0] > 0
    with torch.no_grad():
        squares = (trainer.student(batch["x"]) - teacher(batch["x"])).square().sum(-1)[chosen].mean()
        [projector] = trainer.distilled.projectors.values()
        hidden = projector(trainer.student.body(batch["x"]))
        signs = (hidden.tanh() - teacher.body(batch["x"]).sign()).abs().mean()
    losses = trainer.evaluate()
    assert losses["eval_squares"] == pytest.approx(float(squares), rel=1e-12)
    assert losses["eval_feature_Signs"] == pytest.approx(float(signs), rel=1e-12)
    assert losses["eval_loss"] == pytest.approx(float(0.25 * squares + 0.5 * signs), rel=1e-12)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < losses["eval_loss"]


# evaluation and logs


@pytest.mark.parametrize("size", [1, 3, 10])
def test_evaluation_is_a_true_mean(tmp_path, size):
    teacher, data = Net(seed=7), rows(10, gold=lambda number: number in (0, 1, 2, 9))
    trainer = make(
        tmp_path, Net(dropout=0.5), MIXED, data, teacher=teacher, evaluated=data, per_device_eval_batch_size=size
    )
    batch = stacked(data)
    with torch.no_grad():
        logits = trainer.student.eval()(batch["x"])
        soft = divergence(logits, teacher(batch["x"]), Divergence("forward_kl", 2.0)).mean()
        gold = F.cross_entropy(logits, batch[LABELS])
    losses = trainer.evaluate()
    assert losses["eval_logit"] == pytest.approx(float(soft), rel=1e-12)
    assert losses["eval_response_gold"] == pytest.approx(float(gold), rel=1e-12)
    assert losses["eval_loss"] == pytest.approx(float(soft + 0.5 * gold), rel=1e-12)


def test_several_evaluation_sets(tmp_path):
    data = rows(6)
    parts = {"near": data[:2], "far": data[2:]}
    trainer = make(tmp_path, Net(), [Logit()], data, teacher=Net(seed=7), evaluated=parts)
    losses = trainer.evaluate()
    whole = trainer.evaluate(data)["eval_loss"]
    assert (2 * losses["eval_near_loss"] + 4 * losses["eval_far_loss"]) / 6 == pytest.approx(whole, rel=1e-12)


def test_each_objective_is_logged(tmp_path):
    """With 10 rows in micro-batches of 3, two a step, every second step has 1 + 3 rows."""
    data = rows(10, gold=third)
    objectives = [*MIXED, Logit(weight=0.0), Feature({"body": "body"}, loss="cosine", weight=2.0)]
    trainer = make(
        tmp_path,
        Net(),
        objectives,
        data,
        teacher=Net(width=9, seed=7),
        evaluated=data,
        max_steps=4,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        logging_strategy="steps",
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=4,
    )
    names = ["logit", "response_gold", "logit_2", "feature_cosine"]
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    for entry in entries:
        values = [entry[f"loss_{name}"] for name in names]
        weighted = sum(o.weight * value for o, value in zip(objectives, values, strict=True))
        assert entry["loss"] == pytest.approx(weighted, rel=1e-6)
        assert min(values) > 0
    [evaluated] = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    batch = stacked(data[:3])
    for number, name in enumerate(names):
        wanted = copy.deepcopy(trainer.distilled)
        wanted(batch, None, number).total.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in wanted.parameters() if p.grad is not None))
        assert evaluated[f"gradient_{name}"] == pytest.approx(norm, rel=1e-9)
    # without its weight: that of weight 0 has one, as the same at another temperature
    assert evaluated["gradient_logit_2"] > 0


def test_the_value_logged_is_the_mean_over_the_step(tmp_path):
    data = rows(10, gold=third)
    start = Net()
    trainer = make(
        tmp_path,
        copy.deepcopy(start),
        MIXED,
        data,
        teacher=Net(seed=7),
        max_steps=1,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=4,
        logging_strategy="steps",
        logging_steps=1,
    )
    trainer.train()
    wanted = make(tmp_path, start, MIXED, data, teacher=Net(seed=7), evaluated=data).evaluate()
    entry = trainer.state.log_history[0]
    assert entry["loss_logit"] == pytest.approx(wanted["eval_logit"], rel=1e-12)
    assert entry["loss_response_gold"] == pytest.approx(wanted["eval_response_gold"], rel=1e-12)


class Normalised(Net):
    """With running means, which a forward in train mode moves."""

    def __init__(self):
        super().__init__(dropout=0.5)
        self.body.append(nn.BatchNorm1d(6, dtype=torch.float64))


def test_evaluating_changes_nothing(tmp_path):
    after = []
    for evaluations in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        data = rows(10, gold=third)
        trainer = make(
            tmp_path / str(len(after)), Normalised(), MIXED, data, teacher=Net(seed=7), evaluated=data, **evaluations
        )
        trainer.train()
        after.append(weights(trainer.student))
    assert_same(*after)


# checkpoints


def run_with_checkpoints(folder, model=None, objectives=None, callbacks=(), resume=None, **changes):
    trainer = make(
        folder,
        model or Net(dropout=0.3),
        objectives or [Logit(temperature=2.0), Feature({"body": "body"}, loss="cosine")],
        rows(10),
        teacher=Net(width=9, seed=7),
        callbacks=callbacks,
        **{
            "max_steps": 8,
            "optim": "adamw_torch",
            "learning_rate": 0.01,
            "gradient_accumulation_steps": 2,
            "save_strategy": "steps",
            "save_steps": 1,
            **changes,
        },
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def test_a_run_that_goes_on_ends_as_one_that_was_not_disturbed(tmp_path):
    whole = run_with_checkpoints(tmp_path / "whole")
    # step 3 is in the middle of the second epoch
    run_with_checkpoints(tmp_path / "cut", callbacks=[Stop(3)])
    checkpoint = last_checkpoint(tmp_path / "cut")
    assert checkpoint.name == "checkpoint-3"
    again = run_with_checkpoints(tmp_path / "cut", model=Net(seed=5, dropout=0.3), resume=checkpoint)
    assert again.state.global_step == 8
    assert_same(weights(again.distilled), weights(whole.distilled))


def test_projectors_are_trained_and_saved_but_not_the_students(tmp_path):
    trainer = run_with_checkpoints(tmp_path, max_steps=2)
    [(key, projector)] = trainer.distilled.projectors.items()
    assert projector.weight.shape == (9, 6)
    assert (projector.weight.dtype, projector.weight.requires_grad) == (torch.float64, True)
    first = make(tmp_path, Net(), trainer.objectives, rows(10), teacher=Net(width=9, seed=7)).distilled.projectors[key]
    assert not torch.allclose(projector.weight, first.weight, atol=1e-4)
    stored = load_file(last_checkpoint(tmp_path) / "model.safetensors")
    assert torch.equal(stored[f"projectors.{key}.weight"], projector.weight)
    assert trainer.student.state_dict().keys() == Net().state_dict().keys()


@pytest.mark.parametrize("fault", ["missing", "unexpected", "width", "objectives"])
def test_a_checkpoint_of_another_model_is_refused(tmp_path, fault):
    run_with_checkpoints(tmp_path, max_steps=1)
    checkpoint = last_checkpoint(tmp_path)
    path = checkpoint / "model.safetensors"
    stored = load_file(path)
    model, objectives = Net(), None
    if fault == "missing":
        del stored["student.head.bias"]
        wanted = r"does not hold student\.head\.bias"
    elif fault == "unexpected":
        stored["student.tail.bias"] = torch.zeros(1)
        wanted = r"holds student\.tail\.bias"
    elif fault == "width":
        model = Net(width=7)
        wanted = "size mismatch"
    else:
        objectives = [Logit()]
        wanted = "holds projectors"
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=f"of another model: .*{wanted}.*delete it or train in another folder"):
        run_with_checkpoints(tmp_path, model=model, objectives=objectives, resume=checkpoint)


class Tied(Net):
    def __init__(self, seed=0):
        super().__init__(width=4, seed=seed)
        self.again = nn.Linear(4, 4, bias=False, dtype=torch.float64)
        self.again.weight = self.body[0].weight


def test_a_tied_weight_is_stored_once_and_comes_back(tmp_path):
    trainer = run_with_checkpoints(tmp_path, model=Tied(), objectives=[Logit()], max_steps=2)
    checkpoint = last_checkpoint(tmp_path)
    assert "student.again.weight" not in load_file(checkpoint / "model.safetensors")
    again = run_with_checkpoints(tmp_path, model=Tied(seed=5), objectives=[Logit()], max_steps=2, resume=checkpoint)
    assert_same(weights(again.student), weights(trainer.student))


# what is refused


def test_a_teacher_that_is_missing_is_named(tmp_path):
    with pytest.raises(CapabilityError, match=r"'logit' needs 'teacher_logprobs' in its batches, or a teacher; .* x"):
        make(tmp_path, Net(), [Logit()], rows(4)).train()
    with pytest.raises(CapabilityError, match="'response' needs 'teacher_logprobs'"):
        make(tmp_path, Net(), [Response()], rows(4)).train()
    with pytest.raises(CapabilityError, match="'response_gold' needs 'labels' in its batches; they hold x"):
        make(tmp_path, Net(), [Response(labels="gold")], rows(4), teacher=Net()).train()
    with pytest.raises(CapabilityError, match="reads 'body' of the teacher, and no teacher is given"):
        make(tmp_path, Net(), [Feature({"body": "body"})], rows(4, teacher=Net()))


def test_a_path_that_names_nothing_gives_the_nearest(tmp_path):
    with pytest.raises(UsageError, match=r"'bodi' names no module of Net.*nearest: body"):
        make(tmp_path, Net(), [Feature({"bodi": "body"})], rows(4), teacher=Net(seed=7))
    with pytest.raises(UsageError, match=r"'haed' names no module of Net.*nearest: head"):
        make(tmp_path, Net(), [Feature({"head": "haed"})], rows(4), teacher=Net(seed=7))
    with pytest.raises(ValueError, match=r"'body\.\*' matches 3 layers of the student and 'body' 1"):
        make(tmp_path, Net(), [Feature({"body.*": "body"})], rows(4), teacher=Net(seed=7))


def test_globs_pair_layers_in_order(tmp_path):
    objectives = [Feature({"body.*": "body.*"}, loss="mse")]
    teacher = Net(seed=7)
    trainer = make(tmp_path, Net(), objectives, rows(4), teacher=teacher, evaluated=rows(4))
    with torch.no_grad():
        first, second = (side.body[0](stacked(rows(4))["x"]) for side in (trainer.student, teacher))
    wanted = (F.mse_loss(first, second) + 2 * F.mse_loss(first.tanh(), second.tanh())) / 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(wanted), rel=1e-12)


class Long(Net):
    def forward(self, x):
        return super().forward(x)[:, None]


class Answerless(Net):
    def forward(self, x):
        return {"hidden": self.body(x)}


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"objectives is empty; give at least one"):
        make(tmp_path, Net(), [], rows(4))
    model = Net()
    with pytest.raises(ValueError, match="teacher and student are one module"):
        make(tmp_path, model, [Logit()], rows(4), teacher=model)
    with pytest.raises(ValueError, match="compute_metrics is given"):
        DistillationTrainer(model=Net(), objectives=[Logit()], args=settings(tmp_path), compute_metrics=dict)
    with pytest.raises(CapabilityError, match=r"student returned logits of shape \(4, 1, 5\); wanted"):
        make(tmp_path, Long(), [Logit()], rows(4), teacher=Net()).train()
    with pytest.raises(CapabilityError, match="teacher returned dict without logits"):
        make(tmp_path, Net(), [Logit()], rows(4), teacher=Answerless()).train()
    # features alone need no logits
    make(tmp_path, Answerless(), [Feature({"body": "body"})], rows(4), teacher=Answerless(seed=3)).train()


def test_only_a_causal_model_is_taken_as_one():
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert is_language_model(causal())
    assert not is_language_model(BertForMaskedLM(BertConfig(**sizes, intermediate_size=8)))
    assert not is_language_model(Net())

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from attar.engines.linear import LinearClassifier
from attar.engines.textclassifier import (
    HuggingFaceClassifier,
    TinyClassifier,
    TinyConfig,
    load_text_classifier,
    log_probs,
    tiny_net,
)
from attar.errors import TrainingError
from attar.losses import IGNORED
from attar.students.build import reduce_rows
from attar.train.objectives import LABELS as LABEL_KEY
from attar.train.objectives import TEACHER, Logit, Response
from attar.train.stage import control_objectives
from attar.train.trainer import DistillationTrainer

LABELS = ("a", "b", "c")


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3, dtype=torch.float64)
        torch.nn.init.constant_(self.layer.weight, 0.1)
        torch.nn.init.zeros_(self.layer.bias)

    def forward(self, x):
        return SequenceClassifierOutput(logits=self.layer(x))


def rows(n):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "x": torch.randn(4, dtype=torch.float64, generator=generator),
            TEACHER: torch.randn(3, dtype=torch.float64, generator=generator).log_softmax(-1),
            LABEL_KEY: torch.tensor(i % 3 if i % 4 == 0 else IGNORED),
        }
        for i in range(n)
    ]


def trained(tmp_path, batch, accumulate, data, objectives):
    model = Linear()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / f"{batch}-{accumulate}"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_steps=3,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        seed=1,
        dataloader_pin_memory=False,
    )
    trainer = DistillationTrainer(model=model, args=arguments, train_dataset=data, objectives=objectives)
    trainer.train()
    return model.layer.weight.detach()


def test_weights_do_not_depend_on_how_a_step_is_cut(tmp_path):
    data = rows(10)
    objectives = [Logit(temperature=2.0), Response(labels="gold", weight=0.5)]
    whole = trained(tmp_path, 10, 1, data, objectives)
    cut = trained(tmp_path, 3, 4, data, objectives)
    torch.testing.assert_close(cut, whole, atol=1e-12, rtol=0)
    assert not torch.allclose(whole, torch.full_like(whole, 0.1))


def test_a_loss_that_is_not_a_number_stops_with_the_step(tmp_path):
    data = rows(4)
    data[2]["x"] = torch.full((4,), float("nan"), dtype=torch.float64)
    with pytest.raises(TrainingError, match=r"at step 0 in a batch of x \[4, 4\], which holds NaN or inf"):
        trained(tmp_path, 4, 1, data, [Logit()])


def test_gold_labels_supervise_only_where_they_are():
    batch = {TEACHER: torch.zeros(3, 3).log_softmax(-1), LABEL_KEY: torch.tensor([1, IGNORED, 2])}
    assert Response(labels="gold").supervised(batch).tolist() == [True, False, True]
    assert Response(labels="teacher").supervised(batch).all()


def test_the_control_keeps_the_weights_and_loses_the_distribution():
    gold = Response(labels="gold", weight=0.2)
    assert control_objectives([Logit(weight=0.7, temperature=3.0), Response(weight=0.3), gold]) == [
        gold,
        Response(weight=1.0),
    ]


def test_reduced_rows_keep_the_distances_of_a_flat_table():
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(50, 2, generator=generator).double() @ torch.randn(2, 8, generator=generator).double()
    reduced = reduce_rows(flat, 2)
    before, after = torch.cdist(flat, flat), torch.cdist(reduced, reduced)
    ratio = (after / before)[before > 0.1]
    assert float(ratio.std() / ratio.mean()) < 1e-3


@pytest.mark.parametrize("form", ["convolutions", "ngrams"])
def test_a_tiny_classifier_is_saved_and_loaded(tmp_path, tiny_teacher, form):
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(tiny_teacher / "tokenizer.json")) if form == "convolutions" else None
    rows = 64 if tokenizer is None else tokenizer.get_vocab_size()
    config = TinyConfig(form, LABELS, rows, 8, 8, 0.5, 0.5, 16)
    classifier = TinyClassifier(config, tiny_net(config).eval(), tokenizer)
    if tokenizer is not None:
        for window in classifier.module.windows:
            torch.nn.init.ones_(window.bias)
    texts = ["turn off the lamp", "", "x" * 500]
    classifier.save(tmp_path, torch.float32)
    before = log_probs(classifier, texts)
    np.testing.assert_array_equal(log_probs(load_text_classifier(tmp_path), texts), before)
    np.testing.assert_allclose(np.exp(before).sum(1), 1, rtol=1e-5)
    # A text's answer does not depend on what it is padded with.
    np.testing.assert_allclose(log_probs(classifier, texts[:1]), before[:1], atol=1e-6)


def test_any_hugging_face_classifier(tmp_path, tiny_teacher):
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=2,
    )
    (tmp_path / "bert").mkdir()
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    classifier = HuggingFaceClassifier.from_pretrained(str(tmp_path / "bert"), LABELS, 16)
    (tmp_path / "out").mkdir()
    classifier.save(tmp_path / "out", torch.float32)
    again = load_text_classifier(tmp_path / "out")
    assert again.labels == LABELS
    texts = ["buy milk", "play", "wake me at seven please " * 9]
    np.testing.assert_allclose(log_probs(again, texts), log_probs(classifier, texts), atol=1e-6)


@pytest.mark.parametrize("targets", [[0, 2, 0, 2], [0, 1, 2, 0]])
def test_the_baseline_is_scikit_learns_and_survives_its_files(tmp_path, targets):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    texts = ["buy milk", "lamp off", "buy bread now", "light the lamp"]
    fitted = LinearClassifier.fit(texts, targets, LABELS)
    fitted.save(tmp_path)
    answers = np.exp(LinearClassifier.load(tmp_path).log_probs(["buy a lamp", "off"]))
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LogisticRegression(C=10.0, max_iter=2000).fit(vectorizer.fit_transform(texts), targets)
    wanted = model.predict_proba(vectorizer.transform(["buy a lamp", "off"]))
    np.testing.assert_allclose(answers[:, sorted(set(targets))], wanted, atol=1e-5)
    with pytest.raises(TrainingError, match="every request the label 'a'"):
        LinearClassifier.fit(texts, [0, 0, 0, 0], LABELS)


def recipe_for(tmp_path, **changes):
    from attar.recipe import parse_recipe

    content = {
        "name": "t",
        "task": "classify",
        "data": {"labels": ["alpha", "beta"], "pool": "p.jsonl", "test": "t.jsonl"},
        "teacher": {"model": "fakes:Keyword", "prior": "uniform", "prompts": [{"template": "{{ text }}"}]},
        "student": {"form": "ngrams", "buckets": 64, "width": 4, "units": 4},
        "train": {"epochs": 1, "evaluations": 1, **changes.pop("train", {})},
        "run": {"folder": str(tmp_path / "run"), "device": "cpu"},
        **changes,
    }
    return parse_recipe(content, "here", tmp_path)


@pytest.fixture
def signals(tmp_path):
    """A run folder with 40 examples of train, 8 of val, and a teacher's distributions."""
    import json

    folder = tmp_path / "run"
    (folder / "data").mkdir(parents=True)
    (folder / "signals/labels").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, n in (("train", 40), ("val", 8)):
        texts = ["".join(rng.choice(list("abxy"), 6)) for _ in range(n)]
        (folder / f"data/{split}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        table = np.array([[t.count("a"), t.count("b")] for t in texts], dtype=np.float32)
        np.save(folder / f"signals/labels/{split}.npy", torch.tensor(table).log_softmax(-1).numpy())
    return folder


def test_a_tracker_passes_through(tmp_path, signals, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from attar.students.build import build_classifier
    from attar.train.stage import fit
    from attar.workspace import open_run

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    recipe = recipe_for(tmp_path, train={"report_to": ["tensorboard"]})
    with open_run(signals, "t") as run:
        fit(recipe, run, build_classifier(recipe)(0), [Logit()], tmp_path / "work", 0)
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert {"train/loss", "train/loss_logit", "eval/loss"} <= set(events.Tags()["scalars"])


def test_a_tracker_that_is_not_installed_is_named(tmp_path, signals):
    from attar.errors import AttarError
    from attar.students.build import build_classifier
    from attar.train.stage import fit
    from attar.workspace import open_run

    recipe = recipe_for(tmp_path, train={"report_to": ["wandb"]})
    with open_run(signals, "t") as run, pytest.raises(AttarError, match="wandb"):
        fit(recipe, run, build_classifier(recipe)(0), [Logit()], tmp_path / "work", 0)


def test_an_export_that_answers_differently_is_refused(tmp_path, signals):
    from attar.errors import RunError
    from attar.students.build import build_classifier
    from attar.students.export import export
    from attar.workspace import open_run

    recipe = recipe_for(tmp_path, export={"dtype": "float16"})
    classifier = build_classifier(recipe)(0)
    for arm in ("student", "control"):
        (signals / f"models/{arm}/seed-0").mkdir(parents=True)
        classifier.save(signals / f"models/{arm}/seed-0", torch.float32)
    with open_run(signals, "t") as run:
        assert export(recipe, run)["largest_probability_difference"] < 0.05
        # Weights that float16 cannot hold: beyond 65,504 they become infinite.
        with torch.no_grad():
            classifier.module.head[-1].weight.mul_(1e6)
        classifier.save(signals / "models/student/seed-0", torch.float32)
        for arm in ("student", "control"):
            import shutil

            shutil.rmtree(signals / f"export/{arm}")
        with pytest.raises(RunError, match="differs from what was trained"):
            export(recipe, run)

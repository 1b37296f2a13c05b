"""The chat task's evaluation: numbers against computation by hand, what is asked once, and the page."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from attar.data.conversations import parse_conversation, write_conversations
from attar.evaluate import arms, report
from attar.evaluate.chat import evaluate
from attar.evaluate.language import COLUMNS
from attar.recipe import ChatRecipe
from attar.tokens import encode_conversation
from attar.workspace import open_run, write_json

HERE = Path(__file__).parent
HOSTILE = "</blockquote><script>alert(1)</script> <img src=http://evil.example/a.png>"
TALKS = [
    [("user", "turn off the lamp"), ("assistant", "wake me at seven")],
    [("user", HOSTILE), ("assistant", "good morning")],
    [
        ("system", "play"),
        ("user", "how cold"),
        ("assistant", "cold, très cold"),
        ("user", "ok"),
        ("assistant", "bread"),
    ],
    [("user", "buy milk"), ("assistant", "how do you say good morning " * 6)],
    [("user", "play please"), ("assistant", "off")],
]
ANSWER_TOKENS = 12


def conversations(talks=TALKS):
    return [parse_conversation({"messages": [{"role": r, "content": c} for r, c in talk]}) for talk in talks]


def copy_of(teacher, folder, change=None):
    """A student: the teacher's folder, its weights changed."""
    shutil.copytree(teacher, folder)
    if change is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        change(model)
        model.save_pretrained(folder)


def noise(seed, size):
    def change(model):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += size * torch.randn(parameter.shape, generator=generator)

    return change


def make_recipe(teacher, folder, **changes):
    return ChatRecipe.model_validate(
        {
            "name": "talk",
            "task": "chat",
            "data": {"train": "train.jsonl", "licence": "CC0"},
            "teacher": {"model": f"hf:{teacher}", "licence": "MIT"},
            "curate": {"max_tokens": 120},
            "train": {"seeds": [0, 1]},
            "evaluate": {
                "resamples": 100, "answers": 6, "answer_tokens": ANSWER_TOKENS, "latency_requests": 3,
                "throughput_requests": 2, "throughput_rounds": 2,
            },
            "run": {"folder": str(folder), "device": "cpu", "threads": 1},
            **changes,
        }
    )  # fmt: skip


def fill(folder, seeds=(0, 1), talks=TALKS, control_equals_student=False):
    """A run folder with all that comes before the evaluation but the models."""
    write_conversations(folder / "data" / "test.jsonl", conversations(talks))
    curve = [
        {"step": step, "loss": 3.0 / step, "eval_loss": 2.0 / step, "loss_logit": 2.0 / step, "loss_response": 1.0}
        for step in (1, 2, 3)
    ]
    for arm in ("student", "control"):
        for seed in seeds:
            write_json(folder / "models" / arm / f"seed-{seed}" / "curves.json", curve)
    manifest = {"schema": 1, "name": "talk", "begun": {}, "files": {}, "stages": {}}
    counts = {
        "curate": {"train": 40, "val": 5, "test": len(talks), "dropped": {"duplicate": 2}},
        "score": {"examples": 45, "tokens": 1000},
        "train": {"seeds": list(seeds), "control_equals_student": control_equals_student},
        "export": {},
    }
    outputs = {f"data/{name}.jsonl": "0" * 64 for name in ("train", "val", "test")}
    for stage, of_stage in counts.items():
        manifest["stages"][stage] = {"counts": of_stage, "outputs": outputs, "seconds": 36.0}
    write_json(folder / "manifest.json", manifest)


def fake_measure(settings, name, opener, arguments, requests, *, warm_up):
    """Speeds without a process: the teacher takes ten times as long."""
    scale = 10.0 if name == "the teacher" else 1.0
    n = settings.latency_requests
    return {
        "latency_ms": [scale * (20 + i) for i in range(n)],
        "first_token_ms": [scale * (5 + i) for i in range(n)],
        "seconds_a_request": [scale * 0.02] * settings.throughput_rounds,
        "memory_mb": 100.0,
        "parameters": 1000,
    }


def run_stage(recipe, folder):
    with open_run(folder, "talk") as run:
        counts = evaluate(recipe, run)
    return counts, json.loads((folder / "evaluate" / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def done(tiny_teacher, tmp_path_factory):
    """An evaluation of an untrained student, a control, and a student that is the teacher in one seed of two."""
    folder = tmp_path_factory.mktemp("talk")
    fill(folder)
    copy_of(tiny_teacher, folder / "export/base/seed-0", noise(9, 0.5))
    for seed in (0, 1):
        copy_of(tiny_teacher, folder / f"export/control/seed-{seed}", noise(seed, 0.1))
        copy_of(tiny_teacher, folder / f"export/student/seed-{seed}", noise(5, 0.02) if seed else None)
    recipe = make_recipe(tiny_teacher, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "measure", fake_measure)
        counts, evaluation = run_stage(recipe, folder)
    return recipe, folder, counts, evaluation


def log_probs(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def by_hand(teacher, arm, example, text):
    """The columns of one conversation, from whole logits."""
    ids = example.ids.tolist()
    p, q = log_probs(teacher, ids), log_probs(arm, ids)
    places = [i for i in range(1, len(ids)) if example.supervised[i]]
    return {
        "tokens": len(places),
        "correct": sum(int(q[i - 1].argmax()) == ids[i] for i in places),
        "agreed": sum(int(q[i - 1].argmax()) == int(p[i - 1].argmax()) for i in places),
        "kl": sum(float((p[i - 1].exp() * (p[i - 1] - q[i - 1])).sum()) for i in places),
        "nll": -sum(float(q[i - 1, ids[i]]) for i in places),
        "bytes": len(text.encode()),
        "outside": 0.0,
    }


def test_what_is_read_equals_computation_by_hand(done, tiny_teacher):
    _, folder, _, evaluation = done
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    arm = folder / "export/control/seed-1"
    table = np.load(folder / "evaluate/answers/control-test-1.npy")
    expected = []
    for conversation, talk in zip(conversations(), TALKS, strict=True):
        (example,) = encode_conversation(tokenizer, conversation, max_tokens=120)
        expected.append(by_hand(tiny_teacher, arm, example, "".join(c for r, c in talk if r == "assistant")))
    for row, wanted in zip(table, expected, strict=True):
        assert dict(zip(COLUMNS, row, strict=True)) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert len({row["kl"] for row in expected}) == len(TALKS)
    # the means of both seeds: KL and bits of all tokens together, accuracy and agreement over conversations
    tables = np.stack([np.load(folder / f"evaluate/answers/control-test-{k}.npy") for k in (0, 1)])
    column = {name: tables[..., i] for i, name in enumerate(COLUMNS)}
    metrics = {name: of_arm["control"] for name, of_arm in evaluation["metrics"].items()}
    assert metrics["kl_to_teacher"] == pytest.approx(column["kl"].sum() / column["tokens"].sum())
    assert metrics["bits_per_byte"] == pytest.approx(column["nll"].sum() / math.log(2) / column["bytes"].sum())
    assert metrics["top1_agreement"] == pytest.approx((column["agreed"] / column["tokens"]).mean())
    quality = evaluation["arms"]["control"]["quality"]
    assert quality["value"] == pytest.approx((column["correct"] / column["tokens"]).mean())
    assert (quality["metric"], quality["n"]) == ("next-token accuracy", len(TALKS))
    low, high = evaluation["metrics_ci"]["kl_to_teacher"]["control"]
    assert low < metrics["kl_to_teacher"] < high


def test_the_teacher_is_at_no_distance_from_itself(done):
    _, _, _, evaluation = done
    of_teacher = {name: of_arm["teacher"] for name, of_arm in evaluation["metrics"].items()}
    assert of_teacher["kl_to_teacher"] == 0
    assert of_teacher["top1_agreement"] == of_teacher["greedy_exact"] == of_teacher["greedy_prefix"] == 1
    assert of_teacher["bits_per_byte"] > 0
    assert "teacher" not in evaluation["agreement"]


def test_answers_are_those_of_the_whole_model_and_compared_by_hand(done, tiny_teacher):
    _, folder, _, evaluation = done
    written = {
        arm: json.loads((folder / f"evaluate/answers/{arm}-greedy-0.json").read_text()) for arm in ("teacher", "base")
    }
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    turns = []
    for number, conversation in enumerate(conversations()):
        (example,) = encode_conversation(tokenizer, conversation, max_tokens=120)
        edges = np.flatnonzero(np.diff(example.supervised.astype(int), append=0)).reshape(-1, 2) + 1
        turns += [(number, example.ids[:s].tolist(), example.ids[s:e].tolist()) for s, e in edges]
    # six turns are asked for, and there are six
    assert len(written["teacher"]) == len(turns) == 6
    for (_, prompt, _), ids in zip(turns, written["teacher"], strict=True):
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        assert ids == output[0, len(prompt) :].tolist()
    exact, prefix = {}, {}
    for (number, _, _), mine, theirs in zip(turns, written["base"], written["teacher"], strict=True):
        same = 0
        while same < min(len(mine), len(theirs)) and mine[same] == theirs[same]:
            same += 1
        exact.setdefault(number, []).append(mine == theirs)
        prefix.setdefault(number, []).append(same / max(len(mine), len(theirs)))
    for name, values in (("greedy_exact", exact), ("greedy_prefix", prefix)):
        wanted = np.mean([np.mean(of_case) for of_case in values.values()])
        assert evaluation["metrics"][name]["base"] == pytest.approx(wanted)
    assert evaluation["answers"] == {
        "turns": 6, "conversations": 5, "tokens": sum(map(len, written["teacher"])),
    }  # fmt: skip


def test_an_identical_student_keeps_everything(tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "measure", fake_measure)
    fill(tmp_path, seeds=[0], control_equals_student=True)
    copy_of(tiny_teacher, tmp_path / "export/base/seed-0", noise(9, 0.5))
    copy_of(tiny_teacher, tmp_path / "export/student/seed-0")
    counts, evaluation = run_stage(make_recipe(tiny_teacher, tmp_path, train={"seeds": [0]}), tmp_path)
    assert evaluation["retention"] == {"value": 1.0, "ci": [1.0, 1.0]}
    assert evaluation["metrics"]["kl_to_teacher"]["student"] == 0
    assert evaluation["metrics"]["greedy_exact"]["student"] == evaluation["agreement"]["student"]["value"] == 1
    # 10 times faster and cheaper, by the fake speeds
    assert counts == {"verdict": "ship"}
    assert evaluation["arms"]["control"] is None
    assert evaluation["gain_over_control"] is None
    assert "its own control" in evaluation["null_arms"]["control"]
    assert evaluation["gain_over_base"]["value"] == pytest.approx(
        evaluation["arms"]["student"]["quality"]["value"] - evaluation["arms"]["base"]["quality"]["value"]
    )
    assert set(evaluation["curves"]) == {"student"}
    page = report.render_html(evaluation)
    assert "its own control" in page

"""The chat task's evaluation: numbers against computation by hand, what is asked once, and the page."""

import json
import math
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from attar.data.conversations import parse_conversation, write_conversations
from attar.errors import DataError, RunError
from attar.evaluate import arms, evidence, language, report
from attar.evaluate.answers import Served, compare, open_subject, open_writer, subject_arguments
from attar.evaluate.cases import Cases, Reading, Turn
from attar.evaluate.chat import evaluate
from attar.evaluate.language import COLUMNS
from attar.evaluate.speed import measure
from attar.recipe import ChatRecipe
from attar.students.export_lm import export_gguf
from attar.students.vocabulary import trim_vocabulary
from attar.tokens import encode_conversation
from attar.workspace import open_run, write_json

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
def teacher(tiny_teacher, tmp_path_factory):
    """A folder with a model that has seen the conversations, so that it gets some tokens right."""
    folder = tmp_path_factory.mktemp("taught") / "model"

    def learn(model):
        tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        examples = [encode_conversation(tokenizer, c, max_tokens=120)[0] for c in conversations()]
        for _ in range(12):
            for example in examples:
                ids = torch.from_numpy(example.ids).long()[None]
                model(ids, labels=ids.masked_fill(~torch.from_numpy(example.supervised), -100)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    copy_of(tiny_teacher, folder, learn)
    return folder


@pytest.fixture(scope="module")
def done(teacher, tmp_path_factory):
    """An evaluation of an untrained student, a control, and a student that is the teacher in one seed of two."""
    folder = tmp_path_factory.mktemp("talk")
    fill(folder)
    copy_of(teacher, folder / "export/base/seed-0", noise(9, 0.5))
    for seed in (0, 1):
        copy_of(teacher, folder / f"export/control/seed-{seed}", noise(seed, 0.1))
        copy_of(teacher, folder / f"export/student/seed-{seed}", noise(5, 0.02) if seed else None)
    recipe = make_recipe(teacher, folder)
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


def test_what_is_read_equals_computation_by_hand(done, teacher):
    _, folder, _, evaluation = done
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    arm = folder / "export/control/seed-1"
    table = np.load(folder / "evaluate/answers/control-test-1.npy")
    expected = []
    for conversation, talk in zip(conversations(), TALKS, strict=True):
        (example,) = encode_conversation(tokenizer, conversation, max_tokens=120)
        expected.append(by_hand(teacher, arm, example, "".join(c for r, c in talk if r == "assistant")))
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


def test_answers_are_those_of_the_whole_model_and_compared_by_hand(done, teacher):
    _, folder, _, evaluation = done
    written = {
        arm: json.loads((folder / f"evaluate/answers/{arm}-greedy-0.json").read_text()) for arm in ("teacher", "base")
    }
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    turns = []
    for number, conversation in enumerate(conversations()):
        (example,) = encode_conversation(tokenizer, conversation, max_tokens=120)
        edges = np.flatnonzero(np.diff(example.supervised.astype(int), append=0)).reshape(-1, 2) + 1
        turns += [(number, example.ids[:s].tolist(), example.ids[s:e].tolist()) for s, e in edges]
    # six turns are asked for, and there are six
    assert len(written["teacher"]) == len(turns) == 6
    for (_, prompt, _), ids in zip(turns, written["teacher"], strict=True):
        given = torch.tensor([prompt])
        output = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=ANSWER_TOKENS, do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
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


def test_an_identical_student_keeps_everything(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "measure", fake_measure)
    fill(tmp_path, seeds=[0], control_equals_student=True)
    copy_of(teacher, tmp_path / "export/base/seed-0", noise(9, 0.5))
    copy_of(teacher, tmp_path / "export/student/seed-0")
    counts, evaluation = run_stage(make_recipe(teacher, tmp_path, train={"seeds": [0]}), tmp_path)
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


def test_a_trimmed_vocabulary_is_compared_on_the_kept_tokens(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "measure", fake_measure)
    # Texts that were trained on use few of the tokens that the held-out ones do.
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    texts = ["turn off the lamp", "user", "assistant", "system", "\n"]
    student, trimmed, kept = trim_vocabulary(model, tokenizer, lambda t: [t(x).input_ids for x in texts])
    fill(tmp_path, seeds=[0], control_equals_student=True)
    for arm in ("base", "student"):
        folder = tmp_path / f"export/{arm}/seed-0"
        student.save_pretrained(folder)
        trimmed.save_pretrained(folder)
        (folder / "kept.json").write_text(json.dumps(kept.tolist()))
    _, evaluation = run_stage(
        make_recipe(teacher, tmp_path, train={"seeds": [0]}, curate={"max_tokens": 400}), tmp_path
    )
    table = np.load(tmp_path / "evaluate/answers/student-test-0.npy")
    of_teacher = np.load(tmp_path / "evaluate/answers/teacher-test-0.npy")
    assert len(kept) < len(tokenizer)
    # more tokens for the same bytes
    assert table[0, 0] >= of_teacher[0, 0]
    assert table[:, 0].sum() > of_teacher[:, 0].sum()
    assert table[:, COLUMNS.index("bytes")].tolist() == of_teacher[:, COLUMNS.index("bytes")].tolist()
    (example,) = encode_conversation(trimmed, conversations()[2], max_tokens=400)
    logs = log_probs(teacher, kept[example.ids.tolist()].tolist())
    places = [i - 1 for i in range(len(example)) if example.supervised[i]]
    inside = logs[places][:, kept].exp().sum(-1)
    best, own = logs[places].argmax(-1), kept[logs[places][:, kept].argmax(-1)]
    wanted = {
        "tokens": len(places),
        # The student's weights are the teacher's, so it gives its own share to each kept token.
        "kl": 0.0,
        "agreed": int((best == own).sum()),
        "outside": float((1 - inside).sum()),
    }
    row = dict(zip(COLUMNS, table[2], strict=True))
    assert {name: row[name] for name in wanted} == pytest.approx(wanted, abs=1e-4)
    assert 0 < wanted["agreed"] < len(places)
    assert any(f"{len(kept)} of the teacher's tokens" in limit for limit in evaluation["limits"])


def test_answers_are_compared_by_conversation_and_references_where_they_are_short(teacher):
    tokenizer = AutoTokenizer.from_pretrained(teacher)

    def ids(text, end=True):
        return tokenizer(text).input_ids + [tokenizer.eos_token_id] * end

    def cases(references, owner):
        reading = Reading(tokenizer, [], [Turn([5], ids(text)) for text in references])
        return Cases(reading, reading, None, np.array(owner), Counter())

    long = "how do you say good morning " * 6
    own = cases(["off", " good\nmorning ", "lamp", long], [0, 0, 1, 1])
    theirs = [ids("off"), ids("bread"), ids("lamp please"), ids(long, end=False)]
    student = [ids("off"), ids("good  morning"), ids("lamp"), ids("turn")]
    found = compare(own, own.teacher, [student, theirs], theirs, 12)
    assert found.greedy_exact.tolist() == [[0.5, 0.0], [1.0, 1.0]]
    shared = len(ids("lamp", end=False)) / len(ids("lamp please"))
    assert found.greedy_prefix == pytest.approx(np.array([[0.5, shared / 2], [1.0, 1.0]]))
    # White space aside the student is right on all three short ones, the teacher on one.
    assert found.exact_match.tolist() == [[1.0, 1.0], [0.5, 0.0]]
    only_long = cases([long], [0])
    assert compare(only_long, only_long.teacher, [[ids(long)]], [ids(long)], 12).exact_match is None


def test_llama_cpp_answers_where_every_arm_has_a_file(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "measure", fake_measure)
    fill(tmp_path, seeds=[0], control_equals_student=True)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    for arm in ("base", "student"):
        copy_of(teacher, tmp_path / f"export/{arm}/seed-0")
    recipe = make_recipe(teacher, tmp_path, train={"seeds": [0]})
    probes = [tokenizer("turn off the lamp").input_ids]
    first = tmp_path / "export/base/seed-0/model.gguf"
    export_gguf(model, tokenizer, first, probes=probes)
    _, evaluation = run_stage(recipe, tmp_path)
    assert "transformers" in evaluation["arms"]["base"]["about"]
    assert any("Not every arm has a GGUF file" in limit for limit in evaluation["limits"])
    for arm in ("student", "teacher"):
        (tmp_path / f"export/{arm}/seed-0").mkdir(exist_ok=True, parents=True)
        shutil.copy(first, tmp_path / f"export/{arm}/seed-0/model.gguf")
    local = json.loads((tmp_path / "evaluate/answers/student-greedy-0.json").read_text())
    shutil.rmtree(tmp_path / "evaluate")
    _, evaluation = run_stage(recipe, tmp_path)
    for arm in ("teacher", "base", "student"):
        assert evaluation["arms"][arm]["about"].endswith("through llama.cpp, F16")
        assert evaluation["arms"][arm]["size_mb"] == first.stat().st_size / 1e6
    assert evaluation["metrics"]["greedy_exact"]["student"] == 1
    served = json.loads((tmp_path / "evaluate/answers/student-greedy-0.json").read_text())
    assert served == local
    assert "xllamacpp" in evaluation["provenance"]["versions"]


@pytest.mark.parametrize("engine", ["transformers", "llama.cpp"])
def test_every_arm_writes_as_many_tokens_when_it_is_timed(teacher, tmp_path, engine):
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    place = tmp_path / "model"
    ending = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    ids = tokenizer("turn off the lamp").input_ids
    # It ends its answer to this at once.
    with torch.no_grad():
        state = ending.model(torch.tensor([ids])).last_hidden_state[0, -1]
        ending.get_output_embeddings().weight[tokenizer.eos_token_id] = state
    ending.save_pretrained(place)
    tokenizer.save_pretrained(place)
    gguf = place / "model.gguf"
    if engine == "llama.cpp":
        export_gguf(ending, tokenizer, gguf, probes=[ids])
    how = Served(
        engine=engine, model=str(gguf) if engine == "llama.cpp" else f"hf:{place}", tokenizer=str(place), dtype="auto",
        device="cpu", threads=1, context_tokens=64,
    )  # fmt: skip
    writer = open_writer(how)
    free, timed = writer.write(ids, 7), writer.write(ids, 7, measured=True)
    assert (free.ids, free.stopped) == ([tokenizer.eos_token_id], True)
    assert (len(timed.ids), timed.stopped) == (7, False)
    assert timed.first_token_ms > 0
    threads = torch.get_num_threads()
    subject = open_subject(subject_arguments(how, 5))
    torch.set_num_threads(threads)
    assert len(subject.answer([ids, ids])) == 2
    assert subject.parameters == writer.parameters > 1000


def test_speed_is_taken_in_a_process_of_its_own(teacher, tmp_path):
    recipe = make_recipe(teacher, tmp_path)
    how = Served(
        engine="transformers", model=f"hf:{teacher}", tokenizer=str(teacher), dtype="auto", device="cpu",
        threads=1, context_tokens=0,
    )  # fmt: skip
    opener = "attar.evaluate.answers:open_subject"
    found = measure(recipe.evaluate, "x", opener, subject_arguments(how, 3), [[5, 6], [7]], warm_up=1)
    assert [len(found[key]) for key in ("latency_ms", "first_token_ms", "seconds_a_request")] == [3, 3, 2]
    assert all(first < whole for first, whole in zip(found["first_token_ms"], found["latency_ms"], strict=True))
    assert found["memory_mb"] > 20
    with pytest.raises(RunError, match=r"(?s)measuring the student failed: .*No module named 'attar.nowhere'"):
        measure(recipe.evaluate, "the student", "attar.nowhere:x", {}, [[5]], warm_up=0)


class Killed(BaseException):
    pass


def test_killed_at_any_write_it_goes_on_and_ends_with_the_same(done, tmp_path, monkeypatch):
    recipe, finished, _, evaluation = done
    monkeypatch.setattr(arms, "measure", fake_measure)
    folder = tmp_path / "talk"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "evaluate")
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"folder": folder})})
    written = []
    # Two kinds of files: tables and states through write_atomic, answers and speeds through write_json.
    for module, name in ((arms, "write_atomic"), (language, "write_atomic"), (evidence, "write_json")):
        write = getattr(module, name)

        def counting(path, content, write=write):
            if len(written) in (3, 9, 14):
                written.append(None)
                raise Killed
            written.append(path)
            write(path, content)

        monkeypatch.setattr(module, name, counting)
    kills = 0
    while True:
        try:
            _, again = run_stage(recipe, folder)
        except Killed:
            kills += 1
            continue
        break
    assert kills == 3
    paths = [path for path in written if path]
    assert len(paths) == len(set(paths)), "something was asked twice"
    for path in (finished / "evaluate/answers").iterdir():
        assert path.read_bytes() == (folder / "evaluate/answers" / path.name).read_bytes()
    same = ("retention", "metrics", "metrics_ci", "agreement", "worst", "answers", "gain_over_base", "arms")
    assert [again[key] for key in same] == [evaluation[key] for key in same]
    assert not (folder / "evaluate/states").exists()


def test_the_page_has_no_gap_and_obeys_no_text(done):
    recipe, folder, _, evaluation = done
    with open_run(folder, "talk") as run:
        assert report.report(recipe, run) == {"verdict": evaluation["verdict"]}
    page = (folder / "report/report.html").read_text()
    # The hostile prompt is shown, and is text.
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert "<img" not in page
    assert not re.search(
        r"\bNone\b(?!:)|\bnan\b|Undefined", re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", page, flags=re.S)
    )
    for said in (
        "next-token accuracy", "Worst conversations", "Over the base", "Over the control", "Bits a byte",
        "First token, ms", "median time of a request", "logit in training", "response in training",
    ):  # fmt: skip
        assert said in page, said
    for absent in ("By label", "Reliability", "Macro F1"):
        assert absent not in page
    assert page == report.render_html(evaluation)
    kls = [case["kl"] for case in evaluation["worst"]]
    assert len(kls) == 6
    assert kls == sorted(kls, reverse=True)


def test_report_json_keeps_the_contract(done):
    evaluation = done[-1]
    summary = report.summary(evaluation)
    assert set(summary) >= set(
        "schema name task verdict reasons arms null_arms retention gain_over_control gain_over_base metrics "
        "speedup_p50 cost_ratio break_even seeds agreement calibration spend data provenance".split()
    )
    assert summary["seeds"] == [0, 1]
    assert summary["speedup_p50"] == summary["cost_ratio"] == pytest.approx(10)
    assert summary["arms"]["prompted"] is summary["arms"]["baseline"] is None
    assert set(summary["metrics"]) == set(
        "kl_to_teacher bits_per_byte top1_agreement greedy_exact greedy_prefix exact_match".split()
    )
    student = summary["arms"]["student"]
    assert student["tokens_per_s"] == pytest.approx(ANSWER_TOKENS * 3 / 0.063)
    # 0.02 s of a machine at $0.085 an hour, a thousand times; 72 s of signals and training
    assert student["cost_usd_per_1k"] == pytest.approx(0.02 * 0.085 / 3.6)
    assert summary["break_even"]["one_off_usd"] == pytest.approx(72 * 0.085 / 3600)
    tokens = summary["spend"]["tokens"]
    assert tokens > 1000 + evaluation["answers"]["tokens"]
    assert summary["spend"]["calls"] == 45 + 5 + 6
    json.dumps(summary, allow_nan=False)


def test_what_does_not_fit_is_refused(teacher, tmp_path):
    def attempt(name, change, **changes):
        folder = tmp_path / name
        fill(folder, seeds=[0], control_equals_student=True)
        for arm in ("base", "student"):
            copy_of(teacher, folder / f"export/{arm}/seed-0")
        change(folder / "export/student/seed-0")
        run_stage(make_recipe(teacher, folder, train={"seeds": [0]}, **changes), folder)

    with pytest.raises(RunError, match=r"kept\.json differs"):
        attempt("kept", lambda folder: (folder / "kept.json").write_text("[0]"))
    with pytest.raises(DataError, match=r"none of its 5 conversations has an answer within curate.max_tokens"):
        attempt("cut", lambda _: None, curate={"max_tokens": 4})

    tokenizer = AutoTokenizer.from_pretrained(teacher)

    def broken(model):
        model.get_input_embeddings().weight.data[tokenizer(" morning").input_ids] = math.nan

    def spoil(folder):
        shutil.rmtree(folder)
        copy_of(teacher, folder, broken)

    with pytest.raises(RunError, match=r"reading held-out conversation 1 gave .* not finite"):
        attempt("infinite", spoil)

    def other_tokenizer(folder):
        text = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").write_text(text.replace("<|im_end|>\n", "<|im_end|>"))

    for arm in ("base", "student"):
        with pytest.raises(RunError, match=r"reads conversation .* as other tokens than the teacher's"):
            attempt(f"other-{arm}", lambda folder, arm=arm: other_tokenizer(folder.parents[1] / arm / "seed-0"))

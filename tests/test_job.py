"""Whole jobs through the command line: evidence, verdict, report, and what is left after an interruption."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from attar import pipeline
from attar.recipe import load_recipe
from attar.workspace import file_digest

HERE = Path(__file__).parent
SMALL = """
evaluate: {resamples: 200, latency_requests: 5, throughput_requests: 4, throughput_rounds: 2}
run: {device: cpu, threads: 1}
"""
SCRIPTED = """
name: letters
task: classify
data: {labels: [alpha, beta], pool: pool.jsonl, calibration: calibration.jsonl, test: test.jsonl}
teacher: {model: "fakes:Keyword", prior: uniform, prompts: [{template: "{{ text }}"}]}
curate: {val_size: 60}
student: {form: ngrams, buckets: 256, width: 8, units: 8}
train: {epochs: 8, evaluations: 2, learning_rate: 0.02, seeds: [0, 1]}
"""


def write_job(folder, recipe):
    rng = random.Random(1)
    words = list(dict.fromkeys("".join(rng.choices("abxyz", weights=(3, 3, 1, 1, 1), k=7)) for _ in range(900)))
    words = [w for w in words if w.count("a") != w.count("b")]

    def labelled(part):
        return [{"text": w, "label": "alpha" if w.count("a") > w.count("b") else "beta"} for w in part]

    splits = {
        "pool": [{"text": w} for w in words[:300]],
        "calibration": labelled(words[300:360]),
        "test": labelled(words[360:480]),
    }
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "attar.yaml").write_text(recipe + SMALL)
    return folder


def command(job, *arguments, **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    line = [sys.executable, "-c", "from attar.cli import main; main()", *arguments]
    return subprocess.run(line, cwd=job, env=environment, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished job, what its command printed, and its exit code."""
    job = write_job(tmp_path_factory.mktemp("scripted"), SCRIPTED)
    return job, command(job, "run", "--json")


def evaluation(job, name="letters"):
    return json.loads((job / f"runs/{name}/evaluate/evaluation.json").read_text())


def test_report_json_keeps_the_contract(done):
    job, ran = done
    assert ran.returncode in (0, 4), ran.stderr
    printed = json.loads(ran.stdout)
    report = json.loads((job / "runs/letters/report/report.json").read_text())
    assert printed["report"] == report
    assert report["schema"] == 1
    assert (report["verdict"] == "ship") == (ran.returncode == 0)
    assert len(report["reasons"]) == 3
    assert set(report) >= set(
        "schema name task verdict reasons arms retention gain_over_control metrics speedup_p50 cost_ratio "
        "break_even seeds agreement calibration spend data provenance".split()
    )
    for name in ("teacher", "baseline", "control", "student"):
        arm = report["arms"][name]
        assert arm["quality"]["ci"][0] <= arm["quality"]["value"] <= arm["quality"]["ci"][1]
        assert 0 < arm["latency_ms"]["p50"] <= arm["latency_ms"]["p95"]
        assert arm["throughput_per_s"] > 0
        assert arm["cost_usd_per_1k"] > 0
    assert report["arms"]["base"] is None
    assert report["arms"]["prompted"] is None
    assert report["data"]["test"] == 120
    assert report["provenance"]["versions"]["attar"]


def test_figures_are_what_the_stored_answers_give(done):
    job, _ = done
    found = evaluation(job)
    folder = job / "runs/letters"
    gold = np.array(
        [("alpha", "beta").index(json.loads(r)["label"]) for r in (job / "test.jsonl").read_text().splitlines()]
    )

    def right(arm, seed=0):
        return np.load(folder / f"evaluate/answers/{arm}-test-{seed}.npy").argmax(-1) == gold

    teacher, students = right("teacher"), [right("student", seed) for seed in (0, 1)]
    assert teacher.all()  # the scripted rule made the labels
    assert found["arms"]["student"]["quality"]["value"] == pytest.approx(np.mean(students))
    assert found["retention"]["value"] == pytest.approx(np.mean(students) / teacher.mean())
    assert [s["quality"] for s in found["arms"]["student"]["seeds"]] == pytest.approx([s.mean() for s in students])
    lat = {arm: json.loads((folder / f"evaluate/speed/{arm}.json").read_text()) for arm in ("teacher", "student")}
    wanted = np.median(lat["teacher"]["latency_ms"]) / np.median(lat["student"]["latency_ms"])
    assert found["speedup_p50"]["value"] == pytest.approx(wanted)
    price = found["machine_price"]["usd_per_hour"] / 3600
    assert found["arms"]["student"]["cost_usd_per_1k"] == pytest.approx(
        1000 * price * np.mean(lat["student"]["seconds_a_request"])
    )
    saved = (found["break_even"]["teacher_usd_per_1k"] - found["break_even"]["student_usd_per_1k"]) / 1000
    if saved > 0:
        assert found["break_even"]["requests"] == int(np.ceil(found["break_even"]["one_off_usd"] / saved))
    else:
        assert found["break_even"]["requests"] is None


def test_a_scripted_teacher_is_called_scripted(done):
    job, _ = done
    assert "scripted" in evaluation(job)["arms"]["teacher"]["about"]
    assert "scripted" in (job / "runs/letters/report/report.html").read_text()


def test_report_command_prints_the_verdict_and_the_place(done):
    job, ran = done
    verdict = json.loads(ran.stdout)["report"]["verdict"]
    for target in ("attar.yaml", "runs/letters"):
        again = command(job, "report", target)
        assert again.returncode == 0
        assert again.stdout.startswith(f"verdict: {verdict.upper()}\n")
        assert "report.html" in again.stdout
    empty = command(job, "report", ".")
    assert empty.returncode == 2
    assert "holds no report yet" in empty.stderr


def test_dry_run_of_a_finished_job_finds_nothing_to_do(done):
    job, _ = done
    plan = json.loads(command(job, "run", "--dry-run", "--json").stdout)["plan"]
    assert set(plan) == {"curate", "score", "calibrate", "train", "export", "evaluate", "report"}
    assert not any(plan.values())
    changed = json.loads(command(job, "run", "--dry-run", "--json", "--set", "evaluate.ship_if.retention=2").stdout)
    assert [stage for stage, reasons in changed["plan"].items() if reasons] == ["evaluate", "report"]


def test_a_threshold_out_of_reach_holds_with_exit_4(done, tmp_path):
    job = write_job(tmp_path, SCRIPTED)
    ran = command(job, "run", "--set", "evaluate.ship_if.retention=2", "--set", "train.seeds=[0]")
    assert ran.returncode == 4, ran.stderr
    assert "verdict: HOLD" in ran.stdout
    assert "does not reach 200.0%" in ran.stdout


KILLER = """
import os, signal, sys
from attar import pipeline
from attar.cli import main
left = [int(sys.argv.pop(1))]
import attar.evaluate.classify as stage
write = stage.write_atomic
def counting(path, content):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)
stage.write_atomic = counting
main()
"""


@pytest.mark.parametrize("point", [2, 9])
def test_killed_while_it_evaluates_it_ends_with_the_same_answers(done, tmp_path, point):
    finished, _ = done
    job = write_job(tmp_path, SCRIPTED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    line = [sys.executable, "-c", KILLER, str(point), "run"]
    first = subprocess.run(line, cwd=job, env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == -signal.SIGKILL, first.stderr
    before = sorted((job / "runs/letters/evaluate/answers").glob("*.npy"))
    stamps = {path: path.stat().st_mtime_ns for path in before}
    assert len(before) == point - 1
    again = command(job, "run")
    assert again.returncode in (0, 4), again.stderr
    assert "train: done before" in again.stderr
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()), "an answer was asked twice"
    for path in (finished / "runs/letters/evaluate/answers").glob("*.npy"):
        assert file_digest(path) == file_digest(job / "runs/letters/evaluate/answers" / path.name)
    same = ("retention", "gain_over_control", "calibration", "risk_coverage", "confusions_added", "disagreements")
    assert [evaluation(job)[key] for key in same] == [evaluation(finished)[key] for key in same]


# A shell that starts its tests in the background makes them ignore SIGINT, and a child inherits that.
INTERRUPTIBLE = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from attar.cli import main; main()"
)


def test_ctrl_c_exits_130_and_the_same_command_goes_on(tmp_path):
    job = write_job(tmp_path, SCRIPTED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    line = [sys.executable, "-c", INTERRUPTIBLE, "train"]
    with subprocess.Popen(line, cwd=job, env=environment, stderr=subprocess.PIPE, text=True) as process:
        for printed in process.stderr:
            # The first of four models is trained: everything is imported, and there is work left.
            if "training student seed 0" in printed:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert "goes on from here" in rest
    assert "Traceback" not in rest
    assert command(job, "train").returncode == 0


LANGUAGE_MODEL = """
name: lm
task: classify
data: {labels: [alpha, beta], pool: pool.jsonl, calibration: calibration.jsonl, test: test.jsonl}
teacher:
  model: hf:TEACHER
  calibration: CALIBRATION
  prior: uniform
  prompts:
    - template: "{% for e in examples %}{{ e.text }} is {{ e.word }}\\n{% endfor %}{{ text }} is"
      examples: [{text: aaab, label: alpha}, {text: babb, label: beta}]
curate: {val_size: 60}
student: STUDENT
distill: {objectives: [{kind: logit, temperature: 2.0}, {kind: response, weight: 0.5}]}
train: {epochs: 1, evaluations: 2}
"""


def language_model_job(folder, teacher, student, calibration="batch"):
    text = LANGUAGE_MODEL.replace("TEACHER", str(teacher)).replace("CALIBRATION", calibration)
    if calibration == "contextual":
        text = text.replace("  prior: uniform\n", "")
    return write_job(folder, text.replace("STUDENT", student))


def test_a_white_box_teachers_embeddings_start_the_student(tmp_path, tiny_teacher):
    job = language_model_job(tmp_path, tiny_teacher, "{form: convolutions, width: 8, units: 8}")
    folder = pipeline.run(load_recipe(job / "attar.yaml"))
    assert (folder / "export/student/seed-0/tokenizer.json").is_file()
    exported = sum(p.stat().st_size for p in (folder / "export/student/seed-0").iterdir())
    assert evaluation(job, "lm")["arms"]["student"]["size_mb"] == pytest.approx(exported / 1e6)
    # Signals of another teacher are another score.
    changed = load_recipe(job / "attar.yaml", ["teacher.dtype=bfloat16"])
    assert "teacher.dtype" in next(p for p in pipeline.plan(changed) if p.stage == "score").reasons[0]


def test_contextual_calibration_takes_the_preference_of_empty_inputs_away(tmp_path, tiny_teacher):
    job = language_model_job(tmp_path, tiny_teacher, "{form: ngrams, buckets: 128}", "contextual")
    folder = pipeline.run(load_recipe(job / "attar.yaml"), until="calibrate")
    bias = np.array(json.loads((folder / "signals/labels/calibration.json").read_text())["offsets"])
    raw = [np.load(path) for path in sorted((folder / "signals/raw").glob("*.npy"))]
    free = np.concatenate(raw)[-3:].astype(float)  # the inputs without content are asked last
    each = np.exp(free - np.log(np.exp(free).sum(-1, keepdims=True))).mean(0)
    shares = each * np.exp(bias)
    np.testing.assert_allclose(shares / shares.sum(), np.full_like(shares, 0.5), atol=1e-9)


def test_a_hugging_face_student_goes_through_the_whole_job(tmp_path, tiny_teacher):
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BertConfig,
        BertForSequenceClassification,
    )

    student = tmp_path / "bert"
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(student)
    tokenizer.save_pretrained(student)
    job = language_model_job(tmp_path, tiny_teacher, f"{{model: 'hf:{student}'}}")
    folder = pipeline.run(load_recipe(job / "attar.yaml"))
    assert evaluation(job, "lm")["arms"]["student"]["quality"]["n"] == 120
    served = AutoModelForSequenceClassification.from_pretrained(folder / "export/student/seed-0")
    assert served.config.id2label == {0: "alpha", 1: "beta"}

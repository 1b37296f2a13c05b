"""Whole jobs of `task: agent`: a small world, a scripted expert, a tiny student, real stages."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from agents import Counter, counting
from attar import pipeline
from attar.data.episodes import Episode
from attar.engines.scripted import ScriptedChat
from attar.errors import Stopped
from attar.recipe import load_recipe
from chats import QWEN

RECIPE = """
name: tiny-agent
task: agent
environment: {use: "test_agent_job:World", options: {count: 24}, steps: 6, answer_tokens: 12}
teacher: {model: "test_agent_job:Expert"}
student: {model: "hf:STUDENT"}
curate: {max_tokens: 1000}
distill: {objectives: [{kind: response}]}
train: {epochs: 1, tokens_per_batch: 3000, evaluations: 2, learning_rate: 0.003}
evaluate: {splits: [test, far], demonstrations: 1, replay: 6, latency_requests: 2, throughput_requests: 2,
  throughput_rounds: 2, resamples: 200}
export: {gguf: false}
run: {device: cpu, threads: 1}
"""


class World(Counter):
    """The counter, with tasks that no training family has."""

    def tasks(self, split):
        if split == "far":
            return [t.__class__(f"far-{t.id}", "far", {"goal": 5}) for t in super().tasks("val")]
        return [t.__class__(t.id, t.family, {"goal": 1 + n % 3}) for n, t in enumerate(super().tasks(split))]

    def start(self, task):
        beginning = super().start(task)
        system, user = beginning.messages
        said = user.__class__("user", f"{user.content} This is {task.id}.")
        return beginning._replace(messages=(system, said), tools=beginning.tools[:1])


class Expert(ScriptedChat):
    """Solves every task of the counter, but one that it is told to fail."""

    def __init__(self):
        super().__init__(counting)


@pytest.fixture
def job(tmp_path, tiny_teacher):
    student = tmp_path / "student-model"
    shutil.copytree(tiny_teacher, student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.chat_template = QWEN
    tokenizer.save_pretrained(student)
    config = json.loads((student / "config.json").read_text())
    config["max_position_embeddings"] = 4096
    (student / "config.json").write_text(json.dumps(config))
    (tmp_path / "attar.yaml").write_text(RECIPE.replace("STUDENT", str(student)))
    return tmp_path


def recipe_of(job, *changes):
    return load_recipe(job / "attar.yaml", list(changes))


def run(job, *changes, until=None):
    return pipeline.run(recipe_of(job, *changes), until=until)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_job_from_the_experts_episodes_to_the_report(job):
    folder = run(job)
    played = [Episode.read(row) for row in rows(folder / "raw/episodes/train.jsonl")]
    assert [episode.task for episode in played] == [f"train-{n}" for n in range(24)]
    assert all(episode.policy == "scripted" and episode.outcome.success for episode in played)
    trained = rows(folder / "data/train.jsonl")
    assert {row["group"] for row in trained} == {f"train-{n}" for n in range(24)}
    report = json.loads((folder / "report/report.json").read_text())
    assert report["verdict"] == "hold"
    assert "imitates a script" in report["reasons"][0]
    assert report["arms"]["teacher"]["quality"] == {
        "metric": "success",
        "value": 1.0,
        "ci": [pytest.approx(0.438, abs=0.001), 1.0],
        "n": 3,
    }
    assert report["arms"]["teacher"]["latency_ms"] is None
    assert report["speedup_p50"] is None
    assert report["arms"]["control"] is None
    assert "its own control" in report["null_arms"]["control"]
    assert report["arms"]["student"]["latency_ms"]["p50"] > 0
    evaluation = json.loads((folder / "evaluate/evaluation.json").read_text())
    assert evaluation["splits"]["far"]["tasks"] == 2
    assert evaluation["metrics"]["acceptable (steps)"]["teacher"] == 1.0
    assert evaluation["steps_replayed"] == 6
    page = (folder / "report/report.html").read_text()
    assert "a script and no model" in page


def test_rounds_of_relabelling_learn_what_the_teacher_would_have_done(job):
    folder = run(
        job, "distill.relabel={rounds: 2, tasks: 3, corrections: 2}", "collect.rollout.tasks=18", until="train"
    )
    first, second = (
        [Episode.read(row) for row in rows(folder / f"rounds/{number}/episodes.jsonl")] for number in (1, 2)
    )
    # Tasks that the teacher did not play come first.
    assert sorted(e.task for e in first) == ["train-18", "train-19", "train-20"]
    assert sorted(e.task for e in second) == ["train-21", "train-22", "train-23"]
    assert all(episode.policy == "student" for episode in first + second)
    labels = rows(folder / "rounds/1/labels.jsonl")
    assert len(labels) == sum(len(episode.steps) for episode in first)
    learned = rows(folder / "rounds/1/relabelled.jsonl")
    assert all(any(m.get("train") is not False for m in row["messages"] if m["role"] == "assistant") for row in learned)
    told = json.loads((folder / "manifest.json").read_text())["stages"]["train"]["counts"]
    assert [entry["episodes"] for entry in told["rounds"]] == [3, 3]
    assert told["rounds"][0]["states"] == len(labels)
    assert told["rounds"][0]["agreed"] + told["rounds"][0]["corrected"] == sum(
        sum(m.get("train") is not False for m in row["messages"] if m["role"] == "assistant") for row in learned
    )
    assert not told["control_equals_student"]
    assert (folder / "models/student/seed-0/model.safetensors").exists()
    assert (folder / "models/control/seed-0/model.safetensors").exists()
    assert not (folder / "rounds/2/models").exists()


def test_a_round_that_was_cut_off_asks_for_what_is_missing(job, monkeypatch):
    asked = []

    def answer(request):
        asked.append(request)
        if len(asked) == 10:
            raise Stopped("the budget is used up")
        return counting(request)

    class Poor(ScriptedChat):
        def __init__(self):
            super().__init__(answer)

    changes = ["distill.relabel={rounds: 1, tasks: 6}", "collect.rollout.tasks=2", "collect.rollout.val_tasks=1"]
    monkeypatch.setattr("test_agent_job.Expert", Poor)
    with pytest.raises(Stopped):
        run(job, *changes, until="train")
    before = len(asked)
    assert before == 10
    folder = run(job, *changes, until="train")
    labels = rows(folder / "rounds/1/labels.jsonl")
    steps = sum(len(Episode.read(row).steps) for row in rows(folder / "rounds/1/episodes.jsonl"))
    assert len(labels) == steps == len({(row["episode"], row["step"]) for row in labels})
    # What was said before the end is not asked again, but for the steps of an episode that was being asked about.
    assert len(asked) - before < steps

"""Whole jobs with a served teacher, scripted in vLLM's shape: what is learned, compared, resumed and refused."""

import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from attar import pipeline
from attar.cli import app
from attar.errors import AttarError, CapabilityError, ModelError, RecipeError, Stopped
from attar.evaluate import arms
from attar.preflight import check
from attar.recipe import load_recipe
from attar.signals.chat import open_reader
from attar.workspace import open_run
from servers import Reply
from vllmserver import Vllm

WORDS = "turn off the lamp please play wake me at seven cold here buy milk and bread".split()
RECIPE = """
name: served
task: chat
teacher: {TEACHER}
student: {model: "hf:FOLDER", shrink: {layers: 1}}
data: {train: conversations.jsonl}
curate: {val_size: 6, test_size: 6, max_tokens: 64}
distill:
  objectives: [{kind: logit}]
  signals: {kind: top_k, entries: 12}
train: {epochs: 1, tokens_per_batch: 160, evaluations: 2, learning_rate: 0.003}
export: {gguf: false}
evaluate:
  {answers: 4, answer_tokens: 6, latency_requests: 2, throughput_requests: 3, throughput_rounds: 2, resamples: 100}
run: {device: cpu, threads: 1}
"""


def conversations():
    rng = random.Random(3)
    for _ in range(40):
        question, answer = (" ".join(rng.choices(WORDS, k=rng.randint(2, 6))) for _ in range(2))
        yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def job(tmp_path):
    rows = "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations())
    (tmp_path / "conversations.jsonl").write_text(rows)
    return tmp_path


@pytest.fixture(scope="module")
def taught(tiny_teacher, tmp_path_factory):
    """A folder with a model that has seen the conversations, so that it gets some tokens right."""
    folder = tmp_path_factory.mktemp("taught")
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for messages in conversations():
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe_of(job, folder, *changes, url=None):
    remote = f'model: "openai:teacher", base_url: "{url}", tokenizer: "hf:{folder}"'
    teacher = f'model: "hf:{folder}"' if url is None else remote
    text = RECIPE.replace("TEACHER", teacher).replace("FOLDER", str(folder))
    (job / "attar.yaml").write_text(text)
    return load_recipe(job / "attar.yaml", [f"run.folder={job / ('served' if url else 'local')}", *changes])


def fake_measure(settings, name, opener, arguments, requests, *, warm_up):
    """Speeds without a process, asked of the very subject that would be measured there."""
    import importlib

    module, _, function = opener.partition(":")
    subject = getattr(importlib.import_module(module), function)(arguments)
    first = subject.answer(requests[:2])
    return {
        "latency_ms": [20.0, 30.0],
        "first_token_ms": first,
        "seconds_a_request": [0.02] * settings.throughput_rounds,
        "memory_mb": 100.0,
        "parameters": subject.parameters,
    }


def test_a_student_learns_and_is_compared_as_from_the_same_teacher_here(job, taught, monkeypatch):
    monkeypatch.setattr(arms, "measure", fake_measure)
    local = pipeline.run(recipe_of(job, taught))
    with Vllm(taught) as server:
        recipe = recipe_of(job, taught, url=server.url)
        folder = pipeline.run(recipe)
        asked = len(server.requests)
        assert pipeline.run(recipe) == folder
        assert len(server.requests) == asked
        here, there = (json.loads((f / "evaluate/evaluation.json").read_text()) for f in (local, folder))
        price = "teacher.price={input_usd_per_million_tokens: 2.0, output_usd_per_million_tokens: 8.0}"
        pipeline.run(recipe_of(job, taught, price, url=server.url))
        billed = json.loads((folder / "evaluate/evaluation.json").read_text())
    parity = json.loads((folder / "manifest.json").read_text())["stages"]["score"]["counts"]["parity"]
    assert parity["against"] == f"hf:{taught}"
    # the same signals make the same student
    one, other = (
        AutoModelForCausalLM.from_pretrained(f / "models/student/seed-0").state_dict() for f in (local, folder)
    )
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
    for arm in ("teacher", "base", "student"):
        assert there["arms"][arm]["quality"]["value"] == pytest.approx(here["arms"][arm]["quality"]["value"], abs=0.02)
    for name in ("bits_per_byte", "top1_agreement"):
        for arm in ("teacher", "base"):
            assert there["metrics"][name][arm] == pytest.approx(here["metrics"][name][arm], rel=1e-3)
    # of 13 buckets: no more than of all tokens, and not nothing
    assert there["metrics"]["kl_to_teacher"]["teacher"] == 0
    for arm in ("base", "control", "student"):
        assert 0.3 < there["metrics"]["kl_to_teacher"][arm] / here["metrics"]["kl_to_teacher"][arm] <= 1.0001
    assert there["metrics"]["greedy_exact"] == here["metrics"]["greedy_exact"]
    teacher = there["arms"]["teacher"]
    assert [teacher[key] for key in ("memory_mb", "parameters", "size_mb")] == [None, None, None]
    assert "answers and speed through its server" in teacher["about"]
    assert any("12 likeliest tokens" in limit for limit in there["limits"])
    assert any("no teacher.price is stated" in limit for limit in there["limits"])
    assert (folder / "report/report.html").stat().st_size > 1000
    # a teacher that is billed costs what it bills
    prompts = [b["prompt"] for b in server.requests[asked:] if b["max_tokens"] == 6 and not b.get("stream")]
    wanted = (np.mean([len(prompt) for prompt in prompts]) * 2 + 6 * 8) / 1e6
    assert len(prompts) == 4
    assert billed["arms"]["teacher"]["cost_usd_per_1k"] == pytest.approx(1000 * wanted)
    assert there["spend"]["teacher_usd"] == 0
    tokens = there["spend"]["tokens"]
    assert 2e-6 * tokens < billed["spend"]["teacher_usd"] < 8e-6 * tokens
    assert not any("no teacher.price" in limit for limit in billed["limits"])
    # nothing but ids was ever sent
    assert all(isinstance(body["prompt"][0], int) for body in server.requests)
    assert not (folder / "evaluate/states").exists()


def test_a_served_teacher_is_asked_about_what_the_student_wrote(job, taught):
    with Vllm(taught) as server:
        changes = ["distill.objectives=[{kind: logit, divergence: reverse_kl}]"]
        recipe = recipe_of(job, taught, *changes, "distill.on_policy={share: 0.5, max_new_tokens: 9}", url=server.url)
        pipeline.run(recipe, until="score")
        recorded = len(server.prompts)
        folder = pipeline.run(recipe, until="train")
    curves = json.loads((folder / "models/student/seed-0/curves.json").read_text())
    assert all(point["on_policy_logit_reverse_kl"] > 0 for point in curves if "on_policy_tokens" in point)
    asked = server.prompts[recorded:]
    tokenizer = AutoTokenizer.from_pretrained(taught)
    [mark] = tokenizer.encode("<|im_start|>", add_special_tokens=False)
    # what it wrote itself, with the recorded prompt before it and nothing after
    known = [
        tokenizer.apply_chat_template(c[:1], add_generation_prompt=True, return_dict=False) for c in conversations()
    ]
    written = [ids for ids in asked if ids.count(mark) >= 2 and len(ids) > 2]
    assert len(written) > 5
    assert all(any(ids[: len(k)] == k and len(k) < len(ids) <= len(k) + 9 for k in known) for ids in written)


def test_a_server_that_dies_costs_a_shard_at_most(job, tiny_teacher, monkeypatch):
    monkeypatch.setattr("attar.signals.chat.SHARD", 8)
    # Longer than all patience: the first failure is the end.
    monkeypatch.setattr("attar.engines.served._FIRST_WAIT_S", 1e6)
    dead = []

    def dies(number, body):
        scored = sum(bool(b.get("prompt_logprobs")) and len(b["prompt"]) > 2 for b in server.requests if b)
        if body is not None and not dead and scored > 8 + 20:
            return Reply(b"", cut=True)
        return None

    changes = ("teacher.concurrency=2", "teacher.parity=internal")
    with Vllm(tiny_teacher, before=dies) as server:
        recipe = recipe_of(job, tiny_teacher, *changes, url=server.url)
        with pytest.raises(Stopped, match="what it said before is kept"):
            pipeline.run(recipe, until="score")
        kept = len(list((recipe.folder / "signals/tokens").glob("shard-*.json")))
        dead.append(True)
        server.prompts.clear()
        pipeline.run(recipe, until="score")
        again = len(server.prompts)
    counts = json.loads((recipe.folder / "manifest.json").read_text())["stages"]["score"]["counts"]
    assert counts["examples"] == 34
    assert kept == 2
    # the limit and the parity check are asked anew: 1 + 2 * 4
    assert again == 34 - 8 * kept + 9
    undisturbed = []
    with Vllm(tiny_teacher) as other:
        calm = recipe_of(job, tiny_teacher, *changes, f"run.folder={job / 'calm'}", url=other.url)
        pipeline.run(calm, until="score")
    for folder in (recipe.folder, calm.folder):
        files = sorted((folder / "signals/tokens").glob("shard-*"))
        undisturbed.append({path.name: path.read_bytes() for path in files})
    assert undisturbed[0] == undisturbed[1]


def test_signals_of_another_server_are_not_read(job, tiny_teacher):
    with Vllm(tiny_teacher) as server:
        recipe = recipe_of(job, tiny_teacher, url=server.url)
        pipeline.run(recipe, until="score")
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    moved = recipe_of(job, tiny_teacher, url="http://127.0.0.1:1/v1")
    renamed = recipe_of(job, tiny_teacher, "teacher.model=openai:other", url=server.url)
    with open_run(recipe.folder, recipe.name) as opened:
        assert json.loads((recipe.folder / "signals/tokens/meta.json").read_text())["teacher"] == {
            "model": "openai:teacher",
            "base_url": server.url,
        }
        open_reader(recipe, opened, tokenizer, 339)
        for other in (moved, renamed):
            with pytest.raises(AttarError, match="made with another teacher;"):
                open_reader(other, opened, tokenizer, 339)
        tokenizer.chat_template += " "
        with pytest.raises(AttarError, match="another tokenizer and template"):
            open_reader(recipe, opened, tokenizer, 339)
    reasons = {plan.stage: plan.reasons for plan in pipeline.plan(moved)}
    assert any("teacher.model" in reason for reason in reasons["score"])


def test_another_tokenizer_asks_the_teacher_again_and_other_weights_beside_it_do_not(job, tiny_teacher, tmp_path):
    folder = tmp_path / "tokens"
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(folder)
    with Vllm(tiny_teacher) as server:
        named = f"teacher.tokenizer=hf:{folder}"
        recipe = recipe_of(job, tiny_teacher, named, url=server.url)
        pipeline.run(recipe, until="score")
        (folder / "model.safetensors").write_bytes(b"x")
        assert not [plan for plan in pipeline.plan(recipe, "score") if plan.reasons]
        (folder / "tokenizer_config.json").write_text("{}")
        assert [plan.stage for plan in pipeline.plan(recipe, "score") if plan.reasons] == ["score"]


def test_attar_score_of_a_chat(job, tiny_teacher):
    with Vllm(tiny_teacher) as server:
        recipe = recipe_of(job, tiny_teacher, url=server.url)
        command = ["score", str(job / "attar.yaml"), "--set", f"run.folder={recipe.folder}"]
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert list((recipe.folder / "signals/tokens").glob("shard-*.json"))
    assert not (recipe.folder / "models").exists()


UNFIT = [
    ("distill.signals={kind: sampled}", CapabilityError, "set kind: top_k, and entries to what it gives"),
    ("distill.signals={kind: hidden}", CapabilityError, "hidden needs the teacher's whole distribution"),
    ("distill.signals={source: live}", CapabilityError, "live asks the teacher in every step"),
    ("distill.signals.entries=64", CapabilityError, "max allowed: 20.*set distill.signals.entries to 20"),
    ("distill.objectives=[{kind: logit, temperature: 2.0}]", CapabilityError, "temperature 2 is wanted"),
    (
        "distill.objectives=[{kind: logit}, {kind: feature, match: {model.layers.0: model.layers.1}}]",
        CapabilityError,
        "needs 'hidden', the teacher's layer model.layers.1",
    ),
    ("student.model=null", RecipeError, "shows no weights that a student could be cut from"),
    ("student.shrink={vocabulary: trim}", RecipeError, "trim needs the teacher's whole distribution|hold ids of"),
    ("teacher.tokenizer=null", ModelError, "asked with token ids, and none is named"),
    ("teacher.tokenizer=hf:/nowhere", ModelError, "/nowhere is no folder here"),
    ("teacher.tokenizer=gpt2", RecipeError, "'gpt2' is not `hf:FOLDER`"),
    ("teacher.parity=maybe", RecipeError, "'maybe' is not `hf:FOLDER` or `internal`"),
    ("curate.max_tokens=600", None, None),
]


@pytest.mark.parametrize(("change", "kind", "message"), UNFIT)
def test_what_a_server_cannot_give_is_refused_by_name_before_it_is_asked(job, tiny_teacher, change, kind, message):
    with Vllm(tiny_teacher) as server:
        if kind is None:
            pipeline.run(recipe_of(job, tiny_teacher, change, url=server.url), until="score")
            return
        with pytest.raises(kind, match=message):
            pipeline.run(recipe_of(job, tiny_teacher, change, url=server.url), until="score")
        assert not server.prompts


def test_a_budget_that_would_not_be_kept_is_refused(job, tiny_teacher):
    price = "teacher.price={input_usd_per_million_tokens: 2, output_usd_per_million_tokens: 8}"
    recipe = recipe_of(job, tiny_teacher, "budget.usd=5", price, url="http://127.0.0.1:1/v1")
    with pytest.raises(RecipeError, match=r"budget\.usd: 5 is not kept"):
        pipeline.run(recipe, until="score")


def test_keys_of_a_served_teacher_belong_to_one(job, tiny_teacher):
    for key in ("tokenizer", "parity"):
        with pytest.raises(RecipeError, match=f"teacher.{key} belongs to a served teacher"):
            recipe_of(job, tiny_teacher, f"teacher.{key}=hf:{tiny_teacher}")


def test_check_asks_the_server_what_it_gives(job, tiny_teacher):
    with Vllm(tiny_teacher) as server:
        findings = check(recipe_of(job, tiny_teacher, url=server.url))
        assert not [f.message for f in findings if f.level == "refuse"]
        text = "\n".join(f.message for f in findings)
        assert "is there, with room for 512 tokens" in text
        assert "parity: at " in text
        refused = [f.message for f in check(recipe_of(job, tiny_teacher, "distill.signals.entries=64", url=server.url))
                   if f.level == "refuse"]  # fmt: skip
        assert len(refused) == 1
        assert "max allowed: 20" in refused[0]


def test_response_alone_needs_no_signals_of_the_server(job, tiny_teacher):
    with Vllm(tiny_teacher) as server:
        recipe = recipe_of(job, tiny_teacher, "distill.objectives=[{kind: response}]", url=server.url)
        pipeline.run(recipe, until="score")
        assert not server.requests

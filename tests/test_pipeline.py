import errno
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
from attar.errors import AttarError, DataError, NoSpaceError, PreflightRefused
from attar.recipe import load_recipe

HERE = Path(__file__).parent
RECIPE = """
name: letters
task: classify
data: {labels: [alpha, beta], pool: pool.jsonl, test: test.jsonl}
teacher: {model: "fakes:Keyword", prior: uniform, prompts: [{template: "{{ text }}"}]}
curate: {val_size: 60}
student: {form: ngrams, buckets: 256, width: 8, units: 8}
train: {epochs: 2, evaluations: 4}
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    make_job(tmp_path)
    return tmp_path


def make_job(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcxyz", k=6)) for _ in range(400)]
    words = list(dict.fromkeys(words))
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps({"text": w}) + "\n" for w in words[:300]))
    test = [{"text": w, "label": "alpha" if i % 2 else "beta"} for i, w in enumerate(words[300:340])]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in test))
    (tmp_path / "attar.yaml").write_text(RECIPE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The files of a run that nobody disturbed."""
    job = tmp_path_factory.mktemp("undisturbed")
    make_job(job)
    done = cli(job, "train")
    assert done.returncode == 0, done.stderr
    return files(job / "runs/letters")


def cli(job, *arguments, **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command = [sys.executable, "-c", "from attar.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=job, env=environment, capture_output=True, text=True, **options)


def files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("manifest.json", ".lock")
    }


def test_second_run_does_nothing_and_a_changed_value_reruns_what_depends_on_it(job):
    recipe = load_recipe(job / "attar.yaml")
    pipeline.run(recipe, until="train")
    assert all(not p.reasons for p in pipeline.plan(recipe, "train"))
    changed = load_recipe(job / "attar.yaml", ["teacher.prior={alpha: 0.9, beta: 0.1}"])
    plans = {p.stage: p.reasons for p in pipeline.plan(changed, "train")}
    assert plans["curate"] == plans["score"] == ()
    assert any("teacher.prior" in reason for reason in plans["calibrate"])
    assert plans["train"] == ("depends on calibrate",)
    before = np.load(recipe.folder / "signals/labels/val.npy")
    pipeline.run(changed, until="calibrate")
    after = np.load(recipe.folder / "signals/labels/val.npy")
    assert np.exp(after)[:, 0].mean() > np.exp(before)[:, 0].mean() + 0.1


KILLER = """
import os, signal, sys
from attar.cli import main
kind, left = sys.argv.pop(1), [int(sys.argv.pop(1))]
def count():
    left[0] -= 1
    left[0] or os.kill(os.getpid(), signal.SIGKILL)
if kind == "write":
    real = os.fsync
    os.fsync = lambda fd: (count(), real(fd))[1]
else:
    import attar.train.trainer as t
    step = t.Trainer.training_step
    def training_step(self, *a, **k):
        count()
        return step(self, *a, **k)
    t.Trainer.training_step = training_step
main()
"""


@pytest.mark.parametrize(
    ("kind", "point"), [("write", n) for n in (3, 11, 17, 26, 35, 44, 53)] + [("step", n) for n in (2, 7, 13, 29)]
)
def test_killed_anywhere_ends_with_the_same_files(job, finished, kind, point):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command = [sys.executable, "-c", KILLER, kind, str(point), "train", "attar.yaml"]
    first = subprocess.run(command, cwd=job, env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == -signal.SIGKILL, first.stderr
    again = cli(job, "train")
    assert again.returncode == 0, again.stderr
    found = files(job / "runs/letters")
    assert found.keys() == finished.keys()
    assert [n for n in found if found[n] != finished[n] and n != "recipe.resolved.yaml"] == []


def test_leak_is_dropped_and_listed_or_refused(job):
    with (job / "pool.jsonl").open("a") as pool:
        first = json.loads((job / "test.jsonl").read_text().splitlines()[0])["text"]
        pool.write(json.dumps({"text": first.upper() + "!"}) + "\n")
    refusing = ["curate.decontaminate.action=refuse"]
    with pytest.raises(PreflightRefused, match=r"leak: 1 row\(s\) of data.pool"):
        pipeline.run(load_recipe(job / "attar.yaml", refusing))
    assert cli(job, "curate", "--set", *refusing).returncode == 3
    assert cli(job, "curate").returncode == 0
    assert cli(job, "curate", "--explain", "leak").stdout.startswith("pool.jsonl:301  ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no file"),
        (b"", "holds no usable row"),
        (b'{"text": "a"\n', "line 1: no JSON"),
        ('{"text": "caf\xe9", "label": "alpha"}\n'.encode("latin1"), "is not UTF-8"),
        (b'{"text": "a", "label": "gamma"}\n', "label 'gamma' is not in data.labels"),
        (b'{"text": "a", "label": "alpha"}\n', "accuracy on one class"),
        (b'{"words": "a", "label": "alpha"}\n', "'text' is None"),
        (b'{"text": "a"}\n', "'label' is missing"),
    ],
)
def test_a_bad_file_is_named_and_nothing_is_written(job, content, message):
    path = job / "test.jsonl"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        pipeline.run(load_recipe(job / "attar.yaml"))
    assert not (job / "runs/letters/data").exists()


def test_bad_lines_can_be_skipped_and_are_counted(job):
    with (job / "pool.jsonl").open("a") as pool:
        pool.write("{oops\n")
    recipe = load_recipe(job / "attar.yaml", ["data.on_bad_line=skip"])
    pipeline.run(recipe, until="curate")
    manifest = json.loads((recipe.folder / "manifest.json").read_text())
    assert manifest["stages"]["curate"]["counts"]["dropped"] == {"malformed (pool)": 1}


def test_a_full_disk_stops_with_one_line_and_the_same_command_goes_on(job, monkeypatch):
    recipe = load_recipe(job / "attar.yaml")
    real, left = os.fsync, [9]

    def full(handle):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpaceError, match="run the same command again, it goes on from there"):
        pipeline.run(recipe, until="calibrate")
    monkeypatch.setattr(os, "fsync", real)
    pipeline.run(recipe, until="calibrate")
    assert not list(recipe.folder.rglob("*.partial"))


def test_a_folder_of_another_recipe_and_a_damaged_manifest_are_refused(job):
    recipe = load_recipe(job / "attar.yaml")
    pipeline.run(recipe, until="curate")
    other = cli(job, "curate", "--set", "name=other", "--set", f"run.folder={recipe.folder}")
    assert other.returncode == 1
    assert "belongs to the recipe 'letters'" in other.stderr
    manifest = recipe.folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:80])
    damaged = cli(job, "curate")
    assert damaged.returncode == 1
    assert "is damaged" in damaged.stderr
    assert "Traceback" not in other.stderr + damaged.stderr


def test_a_folder_that_is_no_model_is_named(job, tmp_path):
    (tmp_path / "empty").mkdir()
    done = cli(job, "score", "--set", f"teacher.model=hf:{tmp_path / 'empty'}")
    assert done.returncode == 2
    assert "is no causal language model that transformers can load" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_teacher_that_is_no_model(job):
    with pytest.raises(AttarError, match=r"teacher.model: nowhere is no file or folder"):
        pipeline.run(load_recipe(job / "attar.yaml", ["teacher.model=hf:nowhere"]))


@pytest.mark.parametrize("arguments", [["rnu"], ["run", "missing.yaml"], ["run", "--set", "trian.x=1"]])
def test_a_wrong_call_exits_2_without_a_traceback(job, arguments):
    done = cli(job, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_import_and_help_do_not_load_torch():
    script = (
        "import sys, attar\nfrom attar.cli import app, main\nverbs = [c.name for c in app.registered_commands]\n"
        "for verb in ['', *verbs]:\n    sys.argv = ['attar', *verb.split(), '--help']\n"
        "    try:\n        main()\n    except SystemExit as e:\n        assert not e.code, verb\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

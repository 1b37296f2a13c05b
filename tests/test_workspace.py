import errno
import os

import pytest

from attar import workspace
from attar.errors import NoSpaceError, RecipeError, WorkspaceError
from attar.recipe import parse_recipe
from attar.workspace import open_run, write_atomic

MINIMAL = {
    "name": "r",
    "task": "classify",
    "data": {"labels": ["a", "b"], "pool": "p.jsonl", "test": "t.jsonl"},
    "teacher": {"model": "hf:x", "prior": "uniform", "prompts": [{"template": "{{ text }}"}]},
}


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomic(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(workspace.os, "fsync", full)
    with pytest.raises(NoSpaceError, match="goes on from there"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_runs_in_one_folder(tmp_path):
    with (
        open_run(tmp_path, "r"),
        pytest.raises(WorkspaceError, match="another run is at work"),
        open_run(tmp_path, "r"),
    ):
        pass


def test_another_recipes_folder(tmp_path):
    with open_run(tmp_path, "r") as run:
        run._save()
    with pytest.raises(WorkspaceError, match="belongs to the recipe 'r'"), open_run(tmp_path, "other"):
        pass


def test_manifest_cut_short(tmp_path):
    with open_run(tmp_path, "r") as run:
        run._save()
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:20])
    with pytest.raises(WorkspaceError, match="damaged"), open_run(tmp_path, "r"):
        pass
    assert len(manifest.read_bytes()) == 20


def test_changes_name_the_value(tmp_path):
    fingerprint = {"recipe": {"train.epochs": 1}, "inputs": {}, "version": "1"}
    with open_run(tmp_path, "r") as run:
        assert run.changes("train", fingerprint) == ["not done yet"]
        assert run.begin("train", fingerprint, ["m"]) is False
        write_atomic(run.path("m", "w"), b"1")
        assert run.begin("train", fingerprint, ["m"]) is True
        assert run.path("m", "w").exists()
        run.finish("train", fingerprint, ["m"], {}, 0.0)
        assert run.changes("train", fingerprint) == []
        other = {**fingerprint, "recipe": {"train.epochs": 2}}
        assert run.changes("train", other) == ["train.epochs: 1 -> 2"]
        run.path("m", "w").write_bytes(b"22")
        assert run.changes("train", fingerprint) == ["m/w was changed by hand"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trian": {}}, "trian: unknown key (nearest: train)"),
        ({"train": {"epoch": 3}}, "train.epoch: unknown key (nearest: epochs)"),
        ({"train": {"batch_size": "many"}}, "train.batch_size: 'many'"),
        ({"task": "clasify"}, "nearest: classify"),
        ({"distill": {"objectives": [{"kind": "response", "temperature": 2}]}}, "temperature belongs to kind: logit"),
        ({"train": {"seeds": [1, 1]}}, "names a seed twice"),
        (
            {"teacher": {**MINIMAL["teacher"], "label_words": {"a-b": [True]}}},
            "teacher.label_words.a-b.0: YAML reads this as True; a text is wanted, so put it in quotes",
        ),
        (
            {"teacher": {**MINIMAL["teacher"], "prior": {"a": "many"}}},
            "teacher.prior.a: 'many': input should be a valid number",
        ),
    ],
)
def test_recipe_errors_name_key_and_cure(change, message):
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**MINIMAL, **change}, "attar.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

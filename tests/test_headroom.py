"""What a handful of episodes allows to say before anything is trained."""

import json

import pytest

from attar.cli import main
from attar.errors import RecipeError
from attar.evaluate.stats import Estimate
from attar.preflight.headroom import headroom, judge
from attar.progress import Silent
from attar.recipe import load_recipe
from test_agent_job import job  # noqa: F401


@pytest.mark.parametrize(
    ("teacher", "gap", "tasks", "best", "says"),
    [
        (
            (0.2, 0.1, 0.45),
            (0.2, 0.1, 0.3),
            30,
            "base",
            "do not distil this: the teacher itself succeeds in at most 45%",
        ),
        ((0.9, 0.8, 1.0), (0.5, 0.3, 0.7), 30, "prompted", "there is something to gain: 30% to 70%"),
        ((0.9, 0.8, 1.0), (0.0, -0.1, 0.04), 30, "prompted", "a prompt is enough: at most 4% are missing"),
        ((0.9, 0.8, 1.0), (-0.1, -0.2, -0.02), 30, "base", "the untrained student is enough: at most 0% are missing"),
        ((0.9, 0.8, 1.0), (0.1, -0.1, 0.3), 30, "base", "not known"),
        ((0.9, 0.6, 1.0), (0.5, 0.3, 0.7), 7, "base", "too few tasks"),
    ],
)
def test_what_the_intervals_allow_to_say(teacher, gap, tasks, best, says):
    assert judge(Estimate(*teacher), Estimate(*gap), tasks, best).startswith(says)


def test_teacher_student_and_prompt_play_the_same_tasks_of_val(job, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(job)
    monkeypatch.setattr("sys.argv", ["attar", "check", "attar.yaml", "--headroom", "--tasks", "2", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (None, 0)
    found = json.loads(capsys.readouterr().out)
    rooms = {room["family"]: room for room in found["headroom"]}
    assert set(rooms) == {"all", "even", "odd"}
    assert rooms["all"]["tasks"] == 2
    assert rooms["all"]["teacher"]["value"] == 1.0
    assert rooms["all"]["says"].startswith("too few tasks")
    played = {path.name for path in (job / "runs/tiny-agent/headroom").iterdir()}
    assert played == {"teacher-val.jsonl", "base-val.jsonl", "teacher-train.jsonl", "prompted-val.jsonl"}
    assert not (job / "runs/tiny-agent/manifest.json").exists()


def test_other_tasks_have_no_headroom_to_play(job):  # noqa: F811
    recipe = load_recipe(job / "attar.yaml", ["environment=null", "data.train=x.jsonl"])
    with pytest.raises(RecipeError, match="with an environment"):
        headroom(recipe, tasks=2, progress=Silent())

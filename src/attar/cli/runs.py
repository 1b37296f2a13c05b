"""The verbs that run a recipe: run, its stages, check, report, init, demo."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attar.cli.app import EXIT_HOLD, EXIT_REFUSED, DryOption, JsonOption, RecipeArgument, SetOption, app
from attar.cli.terminal import Terminal

if TYPE_CHECKING:
    from attar.preflight.headroom import Room
    from attar.recipe import Recipe


def run_recipe(recipe: Recipe, as_json: bool, dry_run: bool, until: str | None) -> None:
    """Run a recipe up to a stage, or say what would be run; prints what came out."""
    from attar import pipeline

    if dry_run:
        plans = pipeline.plan(recipe, until)
        if as_json:
            print(json.dumps({"plan": {p.stage: list(p.reasons) for p in plans}}))
        for item in () if as_json else plans:
            print(f"{item.stage}: {pipeline.shorten(item.reasons) or 'done, nothing to do'}")
        return
    folder = pipeline.run(recipe, until=until, progress=Terminal())
    ship = True
    if until is None:
        content = json.loads((folder / "report" / "report.json").read_text("utf-8"))
        ship = content["verdict"] == "ship"
        if as_json:
            print(json.dumps({"folder": str(folder), "report": content}))
        else:
            _print_verdict(folder)
    elif as_json:
        print(json.dumps({"folder": str(folder)}))
    else:
        print(f"run folder: {folder}")
    if not ship:
        raise typer.Exit(EXIT_HOLD)


def _stage_command(until: str | Callable[[Recipe], str] | None, text: str) -> Callable[..., None]:
    def command(
        recipe: RecipeArgument = Path("attar.yaml"),
        overrides: SetOption = None,
        as_json: JsonOption = False,
        dry_run: DryOption = False,
    ) -> None:
        from attar.recipe import load_recipe

        loaded = load_recipe(recipe, overrides or ())
        run_recipe(loaded, as_json, dry_run, until(loaded) if callable(until) else until)

    command.__doc__ = text
    return command


app.command("run")(_stage_command(None, "Run the recipe; what is done already is not done again."))


def _last_of_score(recipe: Recipe) -> str:
    from attar.stages import STAGES

    return next(s.name for s in reversed(STAGES[recipe.task]) if s.name in ("score", "calibrate"))


app.command("rollout")(
    _stage_command("rollout", "Have the teacher play the environment's tasks: task: agent -> raw/episodes/.")
)
app.command("score")(_stage_command(_last_of_score, "Run up to the signals: what the teacher says about the examples."))

app.command("train")(_stage_command("train", "Run up to the trained models: student, control and baseline."))

app.command("export")(
    _stage_command("export", "Run up to the student as it is served, checked against what was trained.")
)
app.command("evaluate")(_stage_command("evaluate", "Run up to the comparison of all arms on the test cases."))


@app.command("report")
def _report(
    folder: Annotated[Path, typer.Argument(help="The run folder, or the recipe file.")] = Path("attar.yaml"),
    as_json: JsonOption = False,
) -> None:
    """Open the evidence of a finished run in the browser, or print its path where there is none."""
    from attar.errors import UsageError

    if folder.is_file():
        from attar.recipe import load_recipe

        folder = load_recipe(folder).folder
    page, content = folder / "report" / "report.html", folder / "report" / "report.json"
    if not page.is_file():
        raise UsageError(f"{folder} holds no report yet; `attar run` makes it")
    if as_json:
        print(content.read_text("utf-8"), end="")
        return
    _print_verdict(folder)
    if sys.stdout.isatty():
        typer.launch(str(page))


def _print_verdict(folder: Path) -> None:
    """Print the decision, its reasons, and where the evidence is."""
    result = json.loads((folder / "report" / "report.json").read_text("utf-8"))
    print(f"verdict: {result['verdict'].upper()}")
    for reason in result["reasons"]:
        print(f"  {reason}")
    print(f"report: {folder / 'report' / 'report.html'}")


@app.command("demo")
def _demo(
    folder: Annotated[Path, typer.Argument(help="Where the run goes.")] = Path("runs/router"),
    overrides: SetOption = None,
    as_json: JsonOption = False,
    dry_run: DryOption = False,
) -> None:
    """Run the main job on real weights: distil an agent's tool-routing decisions, and print the verdict."""
    from attar.demo import demo_recipe

    run_recipe(demo_recipe(folder, overrides or [], Terminal()), as_json, dry_run, None)


@app.command("init")
def _init(
    folder: Annotated[Path, typer.Argument(help="The folder to make.")],
    task: Annotated[
        str, typer.Option("--task", help="classify: a narrow decision; chat: a language model.")
    ] = "classify",
    as_json: JsonOption = False,
) -> None:
    """Write a commented recipe for your own task."""
    from attar.template import write_template

    path = write_template(folder, task)
    print(json.dumps({"recipe": str(path)}) if as_json else f"wrote {path}; edit it, then: attar check {path}")


@app.command("check")
def _check(
    recipe: RecipeArgument = Path("attar.yaml"),
    overrides: SetOption = None,
    as_json: JsonOption = False,
    headroom: Annotated[
        bool, typer.Option("--headroom", help="Agents: play a few tasks to see what distillation could gain.")
    ] = False,
    tasks: Annotated[int, typer.Option("--tasks", help="Of --headroom: tasks that are played.", min=1)] = 24,
) -> None:
    """Say what can be known before time is spent; exit 3 on a refusal."""
    from attar.preflight import check
    from attar.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    findings = check(loaded)
    refused = [finding for finding in findings if finding.level == "refuse"]
    rooms = []
    if headroom and not refused:
        from attar.preflight.headroom import headroom as play

        rooms = play(loaded, tasks=tasks, progress=Terminal())
    if as_json:
        found = {"findings": [vars(finding) for finding in findings], "refused": bool(refused)}
        print(json.dumps(found | ({"headroom": [room.to_json() for room in rooms]} if headroom else {})))
    else:
        for finding in findings:
            print(f"{finding.level:>6}  {finding.message}")
        for room in rooms:
            _print_room(room)
    if refused:
        raise typer.Exit(EXIT_REFUSED)


def _print_room(room: Room) -> None:
    """One line of successes, one of what they say."""
    arms = {"teacher": room.teacher, "base": room.base, "prompted": room.prompted}
    words = ", ".join(f"{arm} {e.value:.0%} [{e.lo:.0%}, {e.hi:.0%}]" for arm, e in arms.items() if e is not None)
    print(f"{room.family} ({room.tasks} tasks): {words}")
    more = "" if room.cases is None else f"; {room.cases} tasks would tell it to 10 points on either side"
    print(f"    {room.says}{more}")

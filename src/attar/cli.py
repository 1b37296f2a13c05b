"""The command line: parse -> recipe -> stage; formats errors and progress; nothing else."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attar import __version__
from attar.errors import AttarError, Interrupted

if TYPE_CHECKING:
    from attar.recipe import Recipe

# What a wrong call raises: the common base of typer's own errors.
_ClickError: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="attar",
    help="Distil an expensive model into a small one, and prove what was kept.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

EXIT_REFUSED = 3
EXIT_HOLD = 4

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe file.", show_default=True)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one value, e.g. train.epochs=3; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON result on stdout and nothing else.")]
DryOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and why, and do nothing.")]


class _Terminal:
    """Progress on stderr: a live bar in a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()

    def note(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    def step(self, name: str, total: int) -> Iterator[Any]:
        if self._live:
            yield from _bar(name, total)
        else:
            yield _Lines(name, total)


class _Lines:
    """A line at most every ten seconds, and one at the end."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._done = name, total, 0
        self._start = self._said = time.monotonic()

    def advance(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._said >= 10 or self._done >= self._total:
            self._said = now
            rate = self._done / max(now - self._start, 1e-9)
            left = (self._total - self._done) / rate if rate else 0.0
            print(
                f"  {self._name}: {self._done}/{self._total}, {rate:.1f}/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )


def _bar(name: str, total: int) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    class Bar:
        def advance(self, n: int = 1) -> None:
            progress.advance(task, n)

    class Speed(Progress):
        """A progress bar whose speed column is 0 until one is known."""

        def get_renderables(self) -> Iterator[Any]:
            for item in self.tasks:
                item.fields["rate"] = item.speed or 0.0
            yield from super().get_renderables()

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f}/s"),
        TimeRemainingColumn(),
    )
    with Speed(*columns, console=Console(stderr=True), transient=False) as progress:
        task = progress.add_task(name, total=total, rate=0.0)
        yield Bar()


def _run(recipe: Recipe, as_json: bool, dry_run: bool, until: str | None) -> None:
    from attar import pipeline

    if dry_run:
        plans = pipeline.plan(recipe, until)
        if as_json:
            print(json.dumps({"plan": {p.stage: list(p.reasons) for p in plans}}))
        for item in () if as_json else plans:
            print(f"{item.stage}: {pipeline.shorten(item.reasons) or 'done, nothing to do'}")
        return
    folder = pipeline.run(recipe, until=until, progress=_Terminal())
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


def _stage_command(stage: str | None, text: str) -> Callable[..., None]:
    def command(
        recipe: RecipeArgument = Path("attar.yaml"),
        overrides: SetOption = None,
        as_json: JsonOption = False,
        dry_run: DryOption = False,
    ) -> None:
        from attar.recipe import load_recipe

        _run(load_recipe(recipe, overrides or ()), as_json, dry_run, stage)

    command.__doc__ = text
    return command


app.command("run")(_stage_command(None, "Run the recipe; what is done already is not done again."))
app.command("curate")(_stage_command("curate", "Run up to the splits: the user's files -> data/."))
app.command("score")(
    _stage_command("calibrate", "Run up to the signals: the teacher's calibrated label distributions.")
)

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

    _run(demo_recipe(folder, overrides or [], _Terminal()), as_json, dry_run, None)


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
    recipe: RecipeArgument = Path("attar.yaml"), overrides: SetOption = None, as_json: JsonOption = False
) -> None:
    """Say what can be known before time is spent; exit 3 on a refusal."""
    from attar.preflight import check
    from attar.recipe import load_recipe

    findings = check(load_recipe(recipe, overrides or ()))
    refused = [finding for finding in findings if finding.level == "refuse"]
    if as_json:
        print(json.dumps({"findings": [vars(finding) for finding in findings], "refused": bool(refused)}))
    else:
        for finding in findings:
            print(f"{finding.level:>6}  {finding.message}")
    if refused:
        raise typer.Exit(EXIT_REFUSED)


def _version(show: bool) -> None:
    if show:
        print(f"attar {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


def main() -> None:
    """Entry point: turns exceptions into one line and an exit code."""
    try:
        code = app(standalone_mode=False) or 0
        if code == Interrupted.exit_code:
            # typer turns Ctrl-C into this code and says nothing.
            raise KeyboardInterrupt
        sys.exit(code)
    except _ClickError as error:
        error.show()
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail(Interrupted("interrupted; the same command goes on from here"))
    except AttarError as error:
        _fail(error)
    except OSError as error:
        # A folder that may not be written, a file that vanished: the machine's answer, not a fault in attar.
        _fail(AttarError(f"{error.filename or 'the system'}: {error.strerror or error}"))


def _fail(error: AttarError) -> None:
    print(f"attar: {error}", file=sys.stderr)
    sys.exit(error.exit_code)

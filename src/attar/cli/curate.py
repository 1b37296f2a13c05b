"""The verb that makes splits, and tells why rows are not in them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from attar.cli.app import DryOption, JsonOption, RecipeArgument, SetOption, app
from attar.cli.runs import run_recipe
from attar.errors import UsageError

# What stands for `--explain` without a reason; no reason is empty.
_ALL = ""


class _OptionalReason(TyperCommand):
    """A command whose `--explain` may stand without its value, which typer has no word for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the empty value where none is given."""
        if "--explain" in args:
            after = args.index("--explain") + 1
            if after == len(args) or args[after].startswith("--"):
                args = [*args[:after], _ALL, *args[after:]]
        return super().parse_args(ctx, args)


@app.command("curate", cls=_OptionalReason)
def _curate(
    recipe: RecipeArgument = Path("attar.yaml"),
    overrides: SetOption = None,
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain",
            metavar="[REASON]",
            help="List what was dropped for REASON, such as 'near duplicate'; without one, the reasons with counts.",
        ),
    ] = None,
    as_json: JsonOption = False,
    dry_run: DryOption = False,
) -> None:
    """Run up to the splits: the user's files -> data/; or tell why rows were dropped."""
    from attar.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if explain is None:
        run_recipe(loaded, as_json, dry_run, "curate")
    else:
        _explain(loaded.folder, explain, as_json)


def _explain(folder: Path, reason: str, as_json: bool) -> None:
    path = folder / "data" / "dropped.jsonl"
    if not path.is_file():
        raise UsageError(f"{folder} holds no splits yet; `attar curate` makes them")
    counts: Counter[str] = Counter()
    listed: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as handle:
        for line in handle:
            drop = json.loads(line)
            named = f"{drop['reason']} ({drop['split']})"
            counts[named] += 1
            if reason in (named, drop["reason"]):
                listed.append(drop)
                if not as_json:
                    print(f"{drop['file']}:{drop['line']}  {drop['id'] or '-'}  {drop['detail']}")
    if reason == _ALL:
        if as_json:
            print(json.dumps({"dropped": counts}))
            return
        for named, n in counts.most_common():
            print(f"{n:>9,}  {named}")
        if not counts:
            print("nothing was dropped")
        return
    if not listed:
        raise UsageError(f"--explain {reason}: nothing was dropped for that; there are: {', '.join(counts) or 'none'}")
    if as_json:
        print(json.dumps({"reason": reason, "dropped": listed}))

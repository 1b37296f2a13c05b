"""The verb that records: a proxy between an application and its API."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attar.cli.app import DryOption, JsonOption, SetOption, app

if TYPE_CHECKING:
    from attar.recipe import Record


def _settings(
    recipe: Path | None, overrides: list[str], given: dict[str, Any], deleting: bool = False
) -> tuple[Record, Path]:
    """The recorder's part of the recipe, with what the command line says on top, and its folder."""
    from pydantic import ValidationError

    from attar.errors import RecipeError, UsageError
    from attar.recipe import Record, load_recipe

    if recipe is None and "upstream" not in given and Path("attar.yaml").is_file():
        recipe = Path("attar.yaml")
    stated: dict[str, Any] = {}
    folder = Path("raw")
    if recipe is not None:
        whole = load_recipe(recipe, overrides)
        folder = whole.folder / "raw"
        if whole.collect.record is not None:
            stated = whole.collect.record.model_dump()
    if deleting:
        # The folder is all that matters then.
        given = {"upstream": "http://localhost"} | given
    if recipe is None and overrides:
        raise UsageError("--set overrides values of a recipe, and none is named: attar record attar.yaml --set ...")
    if not (stated | given).get("upstream"):
        raise UsageError(
            "no upstream: name the API to record with --upstream https://api.openai.com, or a recipe with "
            "collect.record.upstream"
        )
    try:
        settings = Record.model_validate(stated | given)
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors())
        raise RecipeError(f"attar record: {said}") from error
    return settings, settings.folder or folder


def _patterns(values: list[str]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise typer.BadParameter(f"{wrong[0]!r}: write it as NAME=REGEX", param_hint="--redact")
    return {name: pattern for name, _, pattern in pairs}


@app.command("record")
def _record(
    recipe: Annotated[
        Path | None, typer.Argument(help="The recipe file, for its collect.record; or say all by options.")
    ] = None,
    upstream: Annotated[str | None, typer.Option(help="The API to record: what base_url was.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the rows go; raw/ where nothing is said.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 where nothing is said.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 8100 where nothing is said.")] = None,
    token_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the token that callers must send.")
    ] = None,
    workload: Annotated[str | None, typer.Option(help="Workload of calls that name none.")] = None,
    keep_days: Annotated[int | None, typer.Option(metavar="DAYS", help="Erase rows that are older.")] = None,
    redact: Annotated[
        list[str] | None, typer.Option(metavar="NAME=REGEX", help="Redact what REGEX finds as [NAME]; may be repeated.")
    ] = None,
    delete_episode: Annotated[
        str | None, typer.Option(metavar="ID", help="Delete what was recorded of an episode, and record nothing.")
    ] = None,
    delete_user: Annotated[str | None, typer.Option(metavar="ID", help="Delete what was recorded of a user.")] = None,
    delete_older_than: Annotated[
        float | None, typer.Option(metavar="DAYS", help="Delete what was recorded before that many days.")
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    dry_run: DryOption = False,
) -> None:
    """Stand in front of an API and record its traffic; or delete what was recorded."""
    stated = {
        "upstream": upstream,
        "folder": folder,
        "host": host,
        "port": port,
        "token_env": token_env,
        "workload": workload,
        "keep_days": keep_days,
        "patterns": _patterns(redact) if redact else None,
    }
    given = {key: value for key, value in stated.items() if value is not None}
    if (delete_episode, delete_user, delete_older_than) != (None, None, None):
        _delete(recipe, given, delete_episode, delete_user, delete_older_than, overrides or [], as_json, dry_run)
        return
    settings, where = _settings(recipe, overrides or [], given)
    if dry_run:
        plan = settings.model_dump(mode="json") | {"folder": str(where)}
        print(json.dumps({"plan": plan}) if as_json else "\n".join(f"{key}: {value}" for key, value in plan.items()))
        return
    from attar.collect.record import record

    result = record(settings, where, lambda line: print(line, file=sys.stderr, flush=True))
    if as_json:
        print(json.dumps(result))
        return
    print(f"recorded {result['recorded']} calls and {result['outcomes']} outcomes in {where}")
    for reason, n in result["lost"].items():
        print(f"  lost: {n} ({reason})")
    if result["last_error"]:
        print(f"  last: {result['last_error']}")


def _delete(
    recipe: Path | None,
    given: dict[str, Any],
    episode: str | None,
    user: str | None,
    older_than_days: float | None,
    overrides: list[str],
    as_json: bool,
    dry_run: bool,
) -> None:
    from attar.collect.store import Deletions, delete, read_exchanges

    folder = given.get("folder") or _settings(recipe, overrides, given, deleting=True)[1]
    if dry_run:
        wanted = Deletions.of(episode=episode, user=user, older_than_days=older_than_days)
        n = sum(wanted.hit(row) for row in read_exchanges(folder))
        print(json.dumps({"would_delete": n}) if as_json else f"would delete {n} rows from {folder}")
        return
    erased = delete(folder, episode=episode, user=user, older_than_days=older_than_days)
    if as_json:
        print(json.dumps({"erased": erased}))
    elif erased is None:
        print(f"deleted; the recorder at work in {folder} erases the rows within seconds, and nobody reads them now")
    else:
        print(f"erased {erased} rows and outcomes from {folder}")

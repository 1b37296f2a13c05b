"""The verb that brings in other tools' logs and data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attar.cli.app import JsonOption, app

if TYPE_CHECKING:
    from attar.collect.importers import Imported, Skipped


@app.command("import")
def _import(
    files: Annotated[list[Path], typer.Argument(help="JSON (lines, an array, documents), Parquet or CSV.")],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="auto, openai, exchanges, anthropic, sharegpt, trl, langfuse, litellm, otel, atif, or your own "
            "package.module:function.",
        ),
    ] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", help="The file to write; raw/NAME.jsonl after the first file's name.")
    ] = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge/--no-merge",
            help="Make one conversation of calls that repeat the turns before them, or leave each.",
        ),
    ] = True,
    explain: Annotated[bool, typer.Option("--explain", help="List each row that was left out, and why.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Import logs and data sets of other tools: files -> raw/."""
    from attar.collect.importers import import_files

    target = out or Path("raw") / f"{files[0].stem}.jsonl"
    listed: list[dict[str, object]] = []

    def on_skipped(skipped: Skipped) -> None:
        if explain and as_json:
            listed.append(skipped._asdict())
        elif explain:
            print(f"{skipped.file} line {skipped.number}: {skipped.reason}: {skipped.detail}")

    result = import_files(files, target, format=format, merge=merge, on_skipped=on_skipped)
    if as_json:
        print(json.dumps({"out": str(target)} | vars(result) | ({"skipped_rows": listed} if explain else {})))
    else:
        _print(target, result)


_JOINED = {
    "merged": "calls are further turns of a conversation",
    "repeated": "calls stood twice",
    "reasoning dropped": "calls stay apart: they leave out the reasoning of the answer before",
    "unlogged answer": "answers stand only in what was sent: read, not learned",
}


def _print(target: Path, result: Imported) -> None:
    for file, name in result.formats.items():
        print(f"{file}: {name}")
    print(f"{target}: {result.conversations} conversations from {result.rows} rows")
    for what, n in result.joined.items():
        print(f"  {n} {_JOINED[what]}")
    for reason, n in result.skipped.most_common():
        print(f"  {n} skipped: {reason}")
    for what, n in result.left_out.most_common():
        print(f"  {n} left out: {what}")

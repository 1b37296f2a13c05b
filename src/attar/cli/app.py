"""The application that every verb registers with, and the options that verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["EXIT_HOLD", "EXIT_REFUSED", "DryOption", "JsonOption", "RecipeArgument", "SetOption", "app"]

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

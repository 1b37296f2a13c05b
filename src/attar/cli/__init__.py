"""The command line: parse -> recipe -> stage; formats errors and progress; nothing else."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from attar import __version__
from attar.cli import curate as _curate  # noqa: F401 - registers its verb
from attar.cli import generate as _generate  # noqa: F401
from attar.cli import imports as _imports  # noqa: F401
from attar.cli import record as _record  # noqa: F401
from attar.cli import runs as _runs  # noqa: F401
from attar.cli.app import app
from attar.errors import AttarError, Interrupted

__all__ = ["app", "main"]

# What a wrong call raises: the common base of typer's own errors.
_ClickError: Any = typer.BadParameter.__mro__[2]


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

"""Write docs/cli.md from the commands' own --help; with --check, exit 1 if the page is out of date."""

import os
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "cli.md"
SCRIPT = "import sys; sys.argv[0] = 'attar'; from attar.cli import main; main()"


def _help(*verb: str) -> str:
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    command = [sys.executable, "-c", SCRIPT, *verb, "--help"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def page() -> str:
    """The whole reference."""
    from attar.cli import app

    verbs = sorted(str(command.name) for command in app.registered_commands)
    parts = ["# Command line\n\nWritten by `make docs` from `--help`.\n", f"```\n{_help()}\n```\n"]
    parts += [f"## attar {verb}\n\n```\n{_help(verb)}\n```\n" for verb in verbs]
    return "\n".join(parts)


if __name__ == "__main__":
    text = page()
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if PAGE.read_text("utf-8") == text else "docs/cli.md is out of date: make docs")
    PAGE.write_text(text, "utf-8")

"""Other tools' logs and data sets -> ``raw/``; see docs/import.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from attar.collect.importers import run
from attar.collect.importers.atif import has_steps, read_atif
from attar.collect.importers.chat import has_anthropic_messages, has_messages, read_chat
from attar.collect.importers.exchanges import has_exchange, read_exchanges
from attar.collect.importers.found import Found, Importer, each_row
from attar.collect.importers.langfuse import has_observation, read_langfuse
from attar.collect.importers.litellm import has_call_type, read_litellm
from attar.collect.importers.otel import has_spans, read_otel
from attar.collect.importers.run import Format, Imported, Skipped
from attar.collect.importers.sharegpt import has_conversations, read_sharegpt
from attar.collect.importers.trl import has_prompt_or_pair, read_trl

__all__ = ["FORMATS", "Format", "Found", "Imported", "Importer", "Skipped", "each_row", "import_files"]

FORMATS: dict[str, Format] = {
    "openai": Format(read_chat, has_messages),
    "exchanges": Format(read_exchanges, has_exchange),
    "anthropic": Format(read_chat, has_anthropic_messages),
    "sharegpt": Format(read_sharegpt, has_conversations),
    "trl": Format(read_trl, has_prompt_or_pair),
    "langfuse": Format(read_langfuse, has_observation),
    "litellm": Format(read_litellm, has_call_type),
    "otel": Format(read_otel, has_spans),
    "atif": Format(read_atif, has_steps),
}


def import_files(
    paths: Sequence[Path],
    out: Path,
    *,
    format: str = "auto",
    merge: bool = True,
    on_skipped: Callable[[Skipped], None] = lambda skipped: None,
) -> Imported:
    """Import files with the formats that attar knows; see :func:`attar.collect.importers.run.import_files`."""
    return run.import_files(paths, out, FORMATS, format=format, merge=merge, on_skipped=on_skipped)

"""``gguf:FILE`` that continues conversations: llama.cpp's own server in this process, asked as any other server is.

The conversation is rendered by the template in the file, and tool calls and JSON schemas are llama.cpp's. Its answers
go through a ledger like those of an API, at no cost, so that a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from attar.engines.api import ApiEngine, ledger_path
from attar.engines.base import Answer, Capability, ChatRequest, Failure
from attar.engines.flow import Limits
from attar.engines.gguf import GgufEngine, load_gguf
from attar.engines.ledger import Accounts, Ledger
from attar.engines.prices import Price
from attar.engines.servers import Server
from attar.recipe.base import Recipe
from attar.workspace import file_digest

__all__ = ["GgufChat", "load_gguf_chat"]

_FREE = Price(0.0, 0.0, 0.0, 0.0, 1.0, "this machine")


class GgufChat:
    """A GGUF model that continues conversations, one at a time.

    Args:
        model: kept loaded as long as this is.
        name: of the model, for its answers' keys: the same file has the same.
        limits: how long an answer may take.
        ledger: where answers are kept.
    """

    def __init__(self, model: GgufEngine, name: str, limits: Limits, ledger: Accounts | None) -> None:
        self.model = model
        server = Server("openai", name, f"{model.address}/v1", "none", "nowhere", place="llama.cpp in this process")
        self._engine = ApiEngine(server, limits, price=_FREE, ledger=ledger)

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Text, and the likeliest tokens of it."""
        return self._engine.capabilities

    def chat(self, requests: Iterable[ChatRequest | None]) -> Iterator[tuple[int, Answer | Failure]]:
        """Answer requests one after another; see :class:`attar.engines.base.ChatEngine`."""
        yield from self._engine.chat(requests)


def load_gguf_chat(recipe: Recipe, ledger: Accounts | None = None) -> GgufChat:
    """The engine of a recipe whose teacher is ``gguf:FILE``; its ledger stands in the run folder.

    Args:
        recipe: names it.
        ledger: the run's, where another process owns it; None to open the file.

    Raises:
        MissingExtra: ``xllamacpp`` or ``openai`` is not installed.
        ModelError: there is no such model.
    """
    model = load_gguf(recipe.teacher.model, threads=recipe.run.threads)
    name = file_digest(Path(recipe.teacher.model.removeprefix("gguf:")).expanduser())
    # A model on this machine may be slow, and is never gone.
    limits = Limits(1, timeout_s=3600.0, total_timeout_s=3600.0)
    return GgufChat(model, name, limits, ledger or Ledger(ledger_path(recipe), budget_usd=recipe.budget.usd))

"""What tokens cost: a dated table, or the recipe's word."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from attar.data.wire import Usage
from attar.recipe.base import TokenPrice

__all__ = ["Price", "list_price", "stated_price"]

_MILLION = 1e6


@dataclass(frozen=True)
class Price:
    """USD per million tokens of one model."""

    input: float
    output: float
    cached_input: float
    cache_write: float
    batch: float
    """share of it that is billed in batch mode"""
    source: str

    def cost_usd(self, usage: Usage, *, batch: bool = False) -> float:
        """What a call cost."""
        plain = usage.prompt_tokens - usage.cached_tokens - usage.cache_written_tokens
        usd = (
            plain * self.input
            + usage.cached_tokens * self.cached_input
            + usage.cache_written_tokens * self.cache_write
            + usage.completion_tokens * self.output
        ) / _MILLION
        return usd * self.batch if batch else usd

    def most_usd(self, prompt_tokens: int, max_tokens: int, *, batch: bool = False) -> float:
        """The most that a call can cost: every token of its prompt at the dearest rate, every token allowed written."""
        dearest = max(self.input, self.cached_input, self.cache_write)
        usd = (prompt_tokens * dearest + max_tokens * self.output) / _MILLION
        return usd * self.batch if batch else usd


def stated_price(stated: TokenPrice) -> Price:
    """The price that a recipe states."""
    plain, cached = stated.input_usd_per_million_tokens, stated.cached_input_usd_per_million_tokens
    return Price(
        input=plain,
        output=stated.output_usd_per_million_tokens,
        cached_input=plain if cached is None else cached,
        cache_write=plain,
        batch=stated.batch_share,
        source="teacher.price",
    )


def list_price(provider: str, model: str) -> Price | None:
    """The provider's list price of a model, at the provider itself; None where the table has none."""
    for entry in _table():
        if entry["provider"] == provider and model in entry["models"]:
            plain = float(entry["input"])
            return Price(
                input=plain,
                output=float(entry["output"]),
                cached_input=float(entry.get("cached_input", plain)),
                cache_write=float(entry.get("cache_write", plain)),
                batch=float(entry.get("batch", 1.0)),
                source=f"{entry['source']}, {entry['date']}",
            )
    return None


@cache
def _table() -> list[dict[str, Any]]:
    text = resources.files("attar.engines").joinpath("prices.yaml").read_text("utf-8")
    table: list[dict[str, Any]] = yaml.safe_load(text)
    return table

"""attar: distil an expensive model into a small one, and prove what was kept.

Public names load lazily, so that ``import attar`` and ``attar --help`` never load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module that owns it; ``None`` as the attribute means the module itself
_PUBLIC: dict[str, tuple[str, str | None]] = {
    "run": ("attar.pipeline", "run"),
    "Recipe": ("attar.recipe", "Recipe"),
    "load_recipe": ("attar.recipe", "load_recipe"),
    "DistillationTrainer": ("attar.train.trainer", "DistillationTrainer"),
    "Engine": ("attar.engines.base", "Engine"),
    "Response": ("attar.train.objectives", "Response"),
    "Feature": ("attar.train.objectives", "Feature"),
    "Logit": ("attar.train.objectives", "Logit"),
    "objectives": ("attar.train.objectives", None),
    "losses": ("attar.losses", None),
    "taps": ("attar.taps", None),
    "errors": ("attar.errors", None),
}

__all__ = [
    "DistillationTrainer",
    "Engine",
    "Feature",
    "Logit",
    "Recipe",
    "Response",
    "__version__",
    "errors",
    "load_recipe",
    "losses",
    "objectives",
    "run",
    "taps",
]

if TYPE_CHECKING:
    from attar import errors, losses, taps
    from attar.engines.base import Engine
    from attar.pipeline import run
    from attar.recipe import Recipe, load_recipe
    from attar.train import objectives
    from attar.train.objectives import Feature, Logit, Response
    from attar.train.trainer import DistillationTrainer


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'attar' has no attribute {name!r}")
    module_name, attribute = _PUBLIC[name]
    module = importlib.import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

"""From a model's name in the recipe to an engine."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from attar.engines.base import Engine
from attar.errors import ModelError
from attar.recipe import Recipe

__all__ = ["load_teacher", "teacher_files"]


def _hugging_face(recipe: Recipe) -> Engine:
    from attar.engines.local import load_local, resolve_device

    teacher = recipe.teacher
    return load_local(
        teacher.model,
        dtype=teacher.dtype,
        device=resolve_device(recipe.run.device),
        tokens_per_batch=teacher.tokens_per_batch,
    )


_OPENERS: dict[str, Callable[[Recipe], Engine]] = {"hf": _hugging_face}


def load_teacher(recipe: Recipe) -> Engine:
    """Load the recipe's teacher: ``hf:...`` or the user's own ``package.module:Class``, made without arguments.

    Raises:
        ModelError: there is no such model or class, or the class is no engine.
    """
    name = recipe.teacher.model
    scheme, _, rest = name.partition(":")
    if scheme in _OPENERS:
        return _OPENERS[scheme](recipe)
    try:
        made = getattr(importlib.import_module(scheme), rest)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(
            f"teacher.model: {name!r} is neither {', '.join(f'{s}:...' for s in _OPENERS)} "
            f"nor a class package.module:Class ({error})"
        ) from error
    if not isinstance(made, Engine):
        raise ModelError(f"teacher.model: {name} is no engine; it needs {', '.join(sorted(_members()))}")
    return made


def _members() -> set[str]:
    return {name for name in vars(Engine) if not name.startswith("_")}


def teacher_files(recipe: Recipe) -> Path:
    """The file or folder whose content identifies the teacher.

    Raises:
        ModelError: there is nothing at that place.
    """
    scheme, _, rest = recipe.teacher.model.partition(":")
    if scheme in _OPENERS:
        path = Path(rest).expanduser()
        if path.exists():
            return path
        raise ModelError(
            f"teacher.model: {rest} is no file or folder here; download the model first and name its folder, hf:FOLDER"
        )
    load_teacher(recipe)
    return Path(str(sys.modules[scheme].__file__))

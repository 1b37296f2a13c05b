"""From a model's name in the recipe to an engine."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from attar.engines.base import ChatEngine, Engine
from attar.engines.ledger import Accounts
from attar.errors import ModelError, RecipeError
from attar.recipe import ClassifyRecipe, Recipe
from attar.workspace import Run, digest

__all__ = [
    "for_workers",
    "load_chat_teacher",
    "load_teacher",
    "scripted",
    "served",
    "teacher_files",
    "teacher_fingerprint",
    "teacher_tokenizer",
    "tokenizer_place",
]

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)

_PROVIDERS = ("openai", "anthropic")
# Files of a model's folder that hold weights, and nothing of its tokenizer.
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".onnx", ".h5", ".msgpack")


def _hugging_face(recipe: Recipe, fresh: bool, ledger: Accounts | None) -> Engine:
    del fresh, ledger
    from attar.engines.local import load_local, resolve_device

    teacher = recipe.teacher
    return load_local(
        teacher.model,
        dtype=teacher.dtype,
        device=resolve_device(recipe.run.device),
        tokens_per_batch=teacher.tokens_per_batch,
    )


def _llama(recipe: Recipe, fresh: bool, ledger: Accounts | None) -> Engine:
    from attar.engines.gguf import load_gguf

    del fresh, ledger
    return load_gguf(recipe.teacher.model, threads=recipe.run.threads)


def _api(recipe: Recipe, fresh: bool, ledger: Accounts | None) -> Engine:
    from attar.engines.api import load_api
    from attar.engines.labels import LabelEngine

    teacher = recipe.teacher
    if not isinstance(recipe, ClassifyRecipe):
        raise ModelError(
            f"teacher.model: task {recipe.task} learns from a model's weights, and {teacher.model} shows none; name a "
            "folder, hf:FOLDER, or let the teacher write the answers first, into data.train"
        )
    engine = load_api(recipe, fresh=fresh, ledger=ledger)
    if engine.price is None:
        raise RecipeError(
            f"teacher.price: no price of {teacher.model} at {engine.server.address} is known, and the report compares "
            "costs; state input_usd_per_million_tokens and output_usd_per_million_tokens"
        )
    return LabelEngine(
        engine,
        samples=recipe.teacher.samples,
        constrained=recipe.teacher.constrained,
        max_tokens=teacher.max_tokens,
    )


_OPENERS: dict[str, Callable[[Recipe, bool, Accounts | None], Engine]] = {
    "hf": _hugging_face,
    "gguf": _llama,
    "openai": _api,
    "anthropic": _api,
}


def load_teacher(recipe: Recipe, *, fresh: bool = False, ledger: Accounts | None = None) -> Engine:
    """Load the recipe's teacher: by its scheme, or the user's own ``package.module:Class``, made without arguments.

    Args:
        recipe: names it.
        fresh: ask a teacher behind an API anew, whatever its ledger holds: for measurements of speed.
        ledger: the run's, where another process owns it; None to open the file.

    Raises:
        ModelError: there is no such model or class, or the class is no engine.
    """
    scheme = recipe.teacher.model.partition(":")[0]
    if scheme in _OPENERS:
        return _OPENERS[scheme](recipe, fresh, ledger)
    if scheme == "vllm":
        raise ModelError(
            f"teacher.model: {recipe.teacher.model} scores no words of labels; name the same folder as hf:FOLDER"
        )
    made = _users_own(recipe)
    if not isinstance(made, Engine):
        raise ModelError(f"teacher.model: {recipe.teacher.model} is no engine; it needs {_members(Engine)}")
    return made


def load_chat_teacher(recipe: Recipe, *, fresh: bool = False, ledger: Accounts | None = None) -> ChatEngine:
    """Load the recipe's teacher to continue conversations: behind an API, in this process, or the user's own class.

    Args:
        recipe: names it.
        fresh: ask a teacher behind an API anew, whatever its ledger holds: for measurements of speed.
        ledger: the run's, where another process owns it; None to open the file.

    Raises:
        ModelError: there is no such model or class, or it continues no conversations.
    """
    scheme = recipe.teacher.model.partition(":")[0]
    if scheme in _PROVIDERS:
        from attar.engines.api import load_api

        return load_api(recipe, fresh=fresh, ledger=ledger)
    if scheme == "vllm":
        from attar.engines.vllm import load_vllm

        return load_vllm(recipe.teacher.model, dtype=recipe.teacher.dtype)
    if scheme == "gguf":
        from attar.engines.gguf_chat import load_gguf_chat

        return load_gguf_chat(recipe, ledger)
    if scheme == "hf":
        from attar.engines.local_chat import load_local_chat

        teacher = recipe.teacher
        return load_local_chat(
            teacher.model, dtype=teacher.dtype, device=recipe.run.device, tokens_per_batch=teacher.tokens_per_batch
        )
    made = _users_own(recipe)
    if not isinstance(made, ChatEngine):
        raise ModelError(f"teacher.model: {recipe.teacher.model} is no chat engine; it needs {_members(ChatEngine)}")
    return made


def scripted(recipe: Recipe) -> bool:
    """Whether the teacher follows a script, as its class says by an attribute ``scripted``: it is imitated, and nothing
    is distilled from it.
    """
    if recipe.teacher.model.partition(":")[0] in (*_OPENERS, "vllm"):
        return False
    return bool(getattr(_users_class(recipe), "scripted", False))


def _users_own(recipe: Recipe) -> object:
    return _users_class(recipe)()


def _users_class(recipe: Recipe) -> Any:
    name = recipe.teacher.model
    module, _, rest = name.partition(":")
    try:
        return getattr(importlib.import_module(module), rest)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(
            f"teacher.model: {name!r} is neither {', '.join(f'{s}:...' for s in _OPENERS)} "
            f"nor a class package.module:Class ({error})"
        ) from error


def _members(protocol: type) -> str:
    return ", ".join(sorted(name for name in vars(protocol) if not name.startswith("_")))


def teacher_files(recipe: Recipe) -> Path:
    """The file or folder whose content identifies the teacher.

    Raises:
        ModelError: there is nothing at that place.
    """
    scheme, _, rest = recipe.teacher.model.partition(":")
    if scheme in _PROVIDERS:
        raise ModelError(f"teacher.model: {recipe.teacher.model} is behind an API and has no files here")
    if scheme in (*_OPENERS, "vllm"):
        path = Path(rest).expanduser()
        if path.exists():
            return path
        raise ModelError(
            f"teacher.model: {rest} is no file or folder here; download the model first and name its folder, "
            f"{scheme}:FOLDER"
        )
    _users_class(recipe)
    return Path(str(sys.modules[scheme].__file__))


def served(recipe: Recipe) -> bool:
    """Whether the teacher stands behind a server: ``openai:NAME`` or ``anthropic:NAME``."""
    return recipe.teacher.model.partition(":")[0] in _PROVIDERS


def for_workers(recipe: AnyRecipe) -> AnyRecipe:
    """The recipe for workers, who may stand in another folder: the place of the teacher's files is absolute.

    Raises:
        ModelError: there is nothing at that place.
    """
    scheme = recipe.teacher.model.partition(":")[0]
    if scheme in _PROVIDERS or scheme not in (*_OPENERS, "vllm"):
        return recipe
    model = f"{scheme}:{teacher_files(recipe).resolve()}"
    return recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"model": model})})


def tokenizer_place(recipe: Recipe) -> Path:
    """The file or folder that holds the teacher's tokenizer: its own, or the one that is named for a served teacher.

    Raises:
        ModelError: there is nothing at that place, or none is named.
    """
    if not served(recipe):
        return teacher_files(recipe)
    name = getattr(recipe.teacher, "tokenizer", None)
    if name is None:
        raise ModelError(
            f"teacher.tokenizer: {recipe.teacher.model} is asked with token ids, and none is named; name the folder of "
            "its tokenizer and chat template, hf:FOLDER"
        )
    folder = Path(name.removeprefix("hf:")).expanduser()
    if not folder.is_dir():
        raise ModelError(f"teacher.tokenizer: {folder} is no folder here; name the one of the served model's tokenizer")
    return folder


def teacher_fingerprint(recipe: Recipe, run: Run) -> str:
    """SHA-256 of what identifies the teacher: the content of its files; of a served one, whose weights are not to be
    seen, its name, its address, and the content of its tokenizer's folder, weights aside, where one is named.

    Raises:
        ModelError: there is nothing at that place.
    """
    if not served(recipe):
        return run.fingerprint_path(teacher_files(recipe))
    teacher = recipe.teacher
    about: dict[str, Any] = {"model": teacher.model, "base_url": teacher.base_url}
    if getattr(teacher, "tokenizer", None):
        files = [p for p in sorted(tokenizer_place(recipe).iterdir()) if p.is_file() and p.suffix not in _WEIGHTS]
        about["tokenizer"] = {path.name: run.fingerprint_file(path) for path in files}
    return digest(about)


def teacher_tokenizer(recipe: Recipe) -> Any:
    """The teacher's tokenizer, with its chat template.

    Raises:
        ModelError: there is none at its place.
    """
    from transformers import AutoTokenizer

    place = tokenizer_place(recipe)
    try:
        if place.is_file():
            return AutoTokenizer.from_pretrained(str(place.parent), gguf_file=place.name)
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{place} holds no tokenizer that transformers can load ({first_line})") from error

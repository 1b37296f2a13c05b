"""The official parts of BFCL, from the ``bfcl-eval`` wheel: its data, converter, checkers and tool classes.

The wheel as a whole needs every provider's client, and makes folders beside itself when it is imported. Of all that,
these parts need one constant. So they are imported under stand-ins, and taken out of ``sys.modules`` again: whoever
imports ``bfcl_eval`` gets the wheel as it is. Each load is a copy of its own, with its own module globals.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from attar.errors import MissingExtra, require

__all__ = ["Official", "classes", "official", "version"]

_PACKAGE = "bfcl_eval"
_NAME = "attar"
_SWAP = threading.Lock()


class Official:
    """The parts that judge and describe; one copy for the process, which keeps no state."""

    model_name = _NAME
    """under which the checkers know who answered; says that this model's tools have no dots in their names"""

    def __init__(self) -> None:
        with _imported() as load:
            self.python = load("constants.enums").Language.PYTHON
            # Of the styles with OpenAI's shape and no dots in names, the one that adds no key of its own to a function.
            self.style = load("constants.enums").ModelStyle.NOVITA_AI
            self.types: dict[str, str] = load("constants.type_mappings").GORILLA_TO_OPENAPI
            prompts = load("constants.default_prompts")
            self.ast_checker = load("eval_checker.ast_eval.ast_checker").ast_checker
            self.convert_to_tool = load("model_handler.utils").convert_to_tool
            data = load("utils")
        # The wheel's own reader takes a lock file beside the wheel for each look.
        data.load_file = _rows
        self.load_dataset_entry = data.load_dataset_entry
        self.load_ground_truth_entry = data.load_ground_truth_entry
        self.step_limit: int = prompts.MAXIMUM_STEP_LIMIT
        """the most answers with calls in one turn"""
        self.more_tools: str = prompts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC
        """what the user says as missing tools arrive"""


@functools.cache
def official() -> Official:
    """The official parts.

    Raises:
        MissingExtra: the wheel, or one of the two packages that these parts need, is not installed.
    """
    return Official()


def classes() -> tuple[dict[str, type[Any]], frozenset[str], Any]:
    """A fresh copy of the executable tool classes and of the multi-turn checker.

    Two copies share no object: the classes keep long texts, and mpmath its precision, in globals that calls write.

    Returns:
        The classes by name; the names of those that take no scenario; the module of ``multi_turn_checker``, whose
        ``execute_multi_turn_func_call`` is to be replaced.

    Raises:
        MissingExtra: as ``official``.
    """
    mpmath = require("mpmath", "bfcl")
    with _imported() as load:
        backend = load("constants.executable_backend_config")
        checker = load("eval_checker.multi_turn_eval.multi_turn_checker")
        paths = {name: path for name, path in backend.CLASS_FILE_PATH_MAPPING.items() if not _agentic(name)}
        modules = {name: load(path.removeprefix(f"{_PACKAGE}.")) for name, path in paths.items()}
    context = mpmath.MPContext()
    modules["MathAPI"].mpmath = SimpleNamespace(mp=context, log=context.log)
    return {name: getattr(modules[name], name) for name in paths}, frozenset(backend.STATELESS_CLASSES), checker


def version() -> str:
    """The wheel's version.

    Raises:
        MissingExtra: it is not installed.
    """
    _folder()
    return importlib.metadata.version("bfcl-eval")


def _agentic(name: str) -> bool:
    """Classes of the categories that need a network or an embedding model."""
    return name == "WebSearchAPI" or name.startswith("MemoryAPI")


def _folder() -> Path:
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise MissingExtra(
            'bfcl-eval is not installed: pip install "attar[bfcl]", then pip install --no-deps bfcl-eval '
            "(with its dependencies it brings every provider's client and exact pins of numpy and others)"
        )
    return Path(found.origin).parent


@functools.cache
def _text(path: Path) -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8").splitlines())


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _text(path)]


def _stand_ins(data: Path) -> dict[str, dict[str, Any]]:
    """What stands in for the modules that these parts import and do not need, by name."""
    return {
        # Of some hundred models, all that is asked is whether dots in names became underscores.
        "constants.model_config": {"MODEL_CONFIG_MAPPING": {_NAME: SimpleNamespace(underscore_to_dot=True)}},
        # Makes folders when it is imported.
        "constants.eval_config": {
            "PROMPT_PATH": data,
            "MULTI_TURN_FUNC_DOC_PATH": data / "multi_turn_func_doc",
            "POSSIBLE_ANSWER_PATH": data / "possible_answer",
        },
        # Need compiled grammars.
        "model_handler.parser.java_parser": {"parse_java_function_call": None},
        "model_handler.parser.js_parser": {"parse_javascript_function_call": None},
    }


@contextmanager
def _imported() -> Iterator[Any]:
    """A function that imports a module of the wheel into a copy that is nobody else's."""
    folder = _folder()
    require("tenacity", "bfcl")
    with _SWAP:
        before = {name: module for name, module in sys.modules.items() if _ours(name)}
        for name in before:
            del sys.modules[name]
        try:
            for name, content in _stand_ins(folder / "data").items():
                module = ModuleType(f"{_PACKAGE}.{name}")
                vars(module).update(content)
                sys.modules[module.__name__] = module
            yield lambda name: importlib.import_module(f"{_PACKAGE}.{name}")
        finally:
            for name in [name for name in sys.modules if _ours(name)]:
                del sys.modules[name]
            sys.modules.update(before)


def _ours(name: str) -> bool:
    return name == _PACKAGE or name.startswith(f"{_PACKAGE}.")
